"""What the package says in its log."""

from __future__ import annotations

import logging

from tests.support.pool import undo


def messages_of_this_job() -> list[str]:
    """Grows with each message of the package, until the job of the pool ends."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("qsr_engine")
    logger.addHandler(handler)
    undo.callback(logger.removeHandler, handler)
    return said
