"""What may be said: means with 95 % intervals, and differences of two rules trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.intervals import Interval, interval

Row = dict[str, Any]


def difference(one: Row, other: Row) -> Interval:
    """Of the errors in points, trial by trial: one - other, with half the width of its 95 % interval."""
    return interval([a - b for a, b in zip(one["errors"], other["errors"], strict=True)])


def with_interval(values: tuple[float, float], sign: bool = False) -> str:
    return f"{values[0]:{'+' if sign else ''}.2f} ± {values[1]:.2f}"


def verdict(one: Row, other: Row) -> str:
    """In words, of two rules at the same budget."""
    gap, half = difference(one, other)
    if abs(gap) <= half:
        return f"{one['rule']} and {other['rule']} cannot be told apart ({gap:+.2f} ± {half:.2f})"
    first, second = (one, other) if gap < 0 else (other, one)
    return f"{first['rule']} errs less than {second['rule']} by {abs(gap):.2f} ± {half:.2f} points"


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    return [(one, other) for number, one in enumerate(rows) for other in rows[number + 1 :]]
