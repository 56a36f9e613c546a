"""One row of the table for every check: whether it went well, what it took, and what it found."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from benchmarks.report import table

State = Literal["ok", "failed", "not run"]
FAILED, NOT_RUN = 1, 3  # exit codes; argparse has 2


@dataclasses.dataclass
class Row:
    """seconds: it took; None where nobody measured. found: in words. figures: raw."""

    part: str
    check: str
    state: State
    found: str = ""
    seconds: float | None = None
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)


Found = tuple[bool, str, dict[str, Any]]  # whether it is as wanted, in words, raw


def checked(part: str, check: str, look: Callable[[], Found]) -> Row:
    """The row of a check, which has failed where it raises."""
    started = time.perf_counter()
    try:
        good, words, figures = look()
    except Exception as error:  # the others are still to be run
        traceback.print_exc()
        row = Row(part, check, "failed", f"{type(error).__name__}: {error}")
    else:
        row = Row(part, check, "ok" if good else "failed", words, figures=figures)
    row.seconds = time.perf_counter() - started
    return row


def not_run(part: str, checks: Iterable[str], why: str) -> list[Row]:
    return [Row(part, check, "not run", why) for check in checks]


def exit_code(rows: Sequence[Row]) -> int:
    states = {row.state for row in rows}
    return FAILED if "failed" in states else NOT_RUN if "not run" in states or not rows else 0


def shown(rows: Sequence[Row]) -> str:
    """The table, and a sentence of what is wrong with it."""
    lines = [
        [row.part, row.check, row.state, "" if row.seconds is None else f"{row.seconds:.1f}", _one_line(row.found)]
        for row in rows
    ]
    counts = {state: sum(row.state == state for row in rows) for state in ("ok", "failed", "not run")}
    total = ", ".join(f"{count} {state}" for state, count in counts.items())
    verdict = "" if exit_code(rows) == 0 else " So this run has failed."
    return f"{table(('part', 'check', 'result', 's', 'found'), lines)}\n\n{total}.{verdict}"


def _one_line(text: str) -> str:
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= 160 else line[:157] + "..."
