"""What is passed over, counted and named, so that nothing is left out in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class PassedOver(NamedTuple):
    """Files that nothing reads: what they are, how many, and the name of the first."""

    what: str
    files: int
    first: str


class Passed:
    """Counts what nothing reads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, name: str) -> None:
        self._counts[what] += 1
        self._first.setdefault(what, name)

    def found(self) -> list[PassedOver]:
        return [PassedOver(what, count, self._first[what]) for what, count in self._counts.items()]


def say_passed_over(places: Iterable[tuple[str, Sequence[PassedOver]]], say: Callable[[str], object]) -> None:
    """Say what nothing reads, a line for each kind over all places: shards by their names."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for place, found in places:
        for what, count, name in found:
            counts[what] += count
            first.setdefault(what, f"{place}: {name!r}" if place else repr(name))
    for what, count in counts.items():
        say(f"passed over: {count} {'file' if count == 1 else 'files'} {what} (the first: {first[what]})")
