"""Reads that fail and may succeed later: which those are, how often they are tried again, and when."""

from __future__ import annotations

import errno
import itertools
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from qsr_engine.data.errors import DataError, PassingError

LONGEST_WAIT = 60.0  # seconds; doubled for ever, one wait would soon be longer than any fault

# What a file server, a network or a disk says for a while. A file that is not there may be about to come back: it is
# replaced, or its server is being changed.
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "ENOENT", "EAGAIN", "EBUSY", "ENFILE", "EREMOTEIO", "ENOLINK", "ECOMM"),
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN", "ESHUTDOWN", "EPIPE"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
    )
    if hasattr(errno, name)
)
Result = TypeVar("Result")


class Retry(NamedTuple):
    """How often a read is tried again, and the seconds before the first time; they double from then on."""

    retries: int = 3
    seconds: float = 1.0


RETRY = Retry()  # where the configuration is not known


class Tries:
    """The tries of one read. `again` is called after each that failed."""

    def __init__(self, retry: Retry) -> None:
        self._retry, self._failed, self._started = retry, 0, time.monotonic()

    def again(self, error: PassingError) -> None:
        """Wait until the next try.

        Raises:
            DataError: there is none any more; it says how many there were, and over how many seconds.
        """
        self._failed += 1
        most = self._retry.retries if error.most_retries is None else min(error.most_retries, self._retry.retries)
        if self._failed > most:
            tries = "1 try" if self._failed == 1 else f"{self._failed} tries"
            raise DataError(f"{error} ({tries} over {time.monotonic() - self._started:.1f} s)") from error
        wait = min(LONGEST_WAIT, self._retry.seconds * 2.0 ** min(self._failed - 1, 64))
        warnings.warn(f"{error}; trying again in {wait:g} s", stacklevel=2)  # Python shows the same text once
        time.sleep(wait)


def retried(action: Callable[[], Result], retry: Retry) -> Result:
    """What the action returns. Raises DataError where it fails for good, or has used up its tries."""
    tries = Tries(retry)
    for _ in itertools.count():
        try:
            return action()
        except PassingError as error:
            tries.again(error)
    raise AssertionError("the tries have an end")


def may_pass(error: BaseException) -> bool:
    """Whether an error of the operating system may be gone at the next try."""
    return isinstance(error, OSError) and error.errno in _PASSING
