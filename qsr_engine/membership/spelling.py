"""How messages name ranks and hosts, and the first of many lines."""

from __future__ import annotations

from collections.abc import Sequence

_LINES = 20


def some(names: Sequence[str], most: int = 8) -> str:
    """Names in a row, the first few of many and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def spell_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """Ranks in a row, the first few of many."""
    shown = ", ".join(map(str, ranks[:most])) + (", ..." if len(ranks) > most else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def first_lines(lines: Sequence[str], what: str = "") -> str:
    """The first of many lines, and a line that counts the others; `what` they are."""
    more = [f"  ... and {len(lines) - _LINES} more{what}"] if len(lines) > _LINES else []
    return "\n".join([*lines[:_LINES], *more])
