"""Who took part in a run whose workers come and go, from the run folder's `events.jsonl`.

A line is an object with at least {"step": optimizer steps done, "event": "join" | "leave" | ..., "member": name}. Who
is "missing" is no member from there on, until it comes "late" or joins. At a "resume" all who were there have left, and
those who begin join. The event "data" has what a change of members
did to the data ("samples_lost", "samples_twice", "samples_missed"), and "batch" how many "samples" a step has from then
on. Of other events only step and name are shown. A line that cannot be read is left out, since no figure needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MemberEvent:
    """Something happened to a member; its name is empty where it happened to all."""

    step: int
    event: str
    member: str
    samples: tuple[int, int, int] = (0, 0, 0)  # lost, twice, missed


def read_events(path: Path) -> list[MemberEvent]:
    """In the order of their steps; none where there is no such file."""
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):
                match json.loads(line):
                    case {"step": int(step), "event": str(event), "member": str(member), **more} if step >= 0:
                        found.append(MemberEvent(step, event, member, _samples(more)))
    return sorted(found, key=lambda event: event.step)


def _samples(line: Mapping[Any, Any]) -> tuple[int, int, int]:
    lost, twice, missed = (line.get(name, 0) for name in ("samples_lost", "samples_twice", "samples_missed"))
    counts = (lost, twice, missed)
    return counts if all(isinstance(count, int) for count in counts) else (0, 0, 0)


def spans(events: Sequence[MemberEvent], last_step: int) -> dict[str, list[tuple[int, int]]]:
    """By member, in the order of their coming: (first, last step) of each time that it took part.

    One that leaves before it has joined was there from the beginning; one that does not leave is there to the end.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    came: dict[str, int] = {}
    for event in events:
        if event.event == "resume":
            for member in list(came):
                found[member].append((came.pop(member), event.step))
        comes, goes = event.event in ("join", "late"), event.event in ("leave", "missing")
        own = found.setdefault(event.member, []) if comes or goes else []
        if comes:
            came.setdefault(event.member, event.step)
        elif goes and (event.member in came or not own):
            own.append((came.pop(event.member, 0), event.step))
    for member, step in came.items():
        found[member].append((step, max(step, last_step)))
    first = {member: min(start for start, _ in own) for member, own in found.items()}
    return {member: found[member] for member in sorted(found, key=lambda member: (first[member], member))}


def counts(events: Sequence[MemberEvent], last_step: int) -> list[tuple[int, int]]:
    """(step, members from it on), from the first step to the last; empty without events of members."""
    changes: dict[int, int] = {0: 0, last_step: 0}
    for own in (taken := spans(events, last_step)).values():
        for start, end in own:
            changes[start] = changes.get(start, 0) + 1
            if end < last_step:
                changes[end] = changes.get(end, 0) - 1
    total, found = 0, []
    for step in sorted(changes):
        total += changes[step]
        found.append((step, total))
    return found if taken else []
