"""Who is lost, by what every rank says of itself: beats, and the judgement over them. Nothing here talks or waits."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Literal

_SUSPECT = 10.0  # silence that is too long once a rank was asked to stop, perhaps by a launcher that saw another die
MISSED = 4  # beats; whoever misses them after a collective has failed is taken to be gone

State = Literal["starting", "running", "failed", "finished", "closed", "ended"]


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int = 0
    moves: int = 0  # grows while the main thread gets on
    state: State = "starting"
    waiting: bool = False  # the main thread is in a collective, or in halt()
    stop: bool = False
    heard: bool = False  # it has the verdict
    step: int = 0
    begun: int = 0  # the step under way
    halted: int = -1  # the step after which it stands in halt(); -1 where it does not
    round: int = 0
    host: str = ""
    place: str = ""  # where the main thread is

    def encode(self) -> str:
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        return cls(*json.loads(text))


class Judge:
    """Who is lost, from one reading of the beats to the next; rank 0's own clock counts."""

    def __init__(self, ranks: int, seconds: float | None, interval: float) -> None:
        self._ranks, self._seconds = ranks, seconds
        self._soon = max(1.0, MISSED * interval)
        self._looked: float | None = None  # when it judged last
        self._beats: dict[int, tuple[int, float]] = {}  # of each rank: last number, and when it changed
        self._moves: dict[int, tuple[int, float]] = {}

    def lost(self, beats: Mapping[int, Beat], now: float | None = None) -> dict[int, str]:
        """The lost ranks, and why each is."""
        now = time.monotonic() if now is None else now
        self._forgive(now)
        for rank, beat in beats.items():
            for seen, value in ((self._beats, beat.number), (self._moves, beat.moves)):
                if rank not in seen or seen[rank][0] != value:
                    seen[rank] = value, now
        if self._seconds is None:
            return {}
        failed = any(beat.state == "failed" for beat in beats.values())
        waited = any(beat.waiting and now - self._moves[rank][1] > self._soon for rank, beat in beats.items())
        limit = self._seconds
        if any(beat.stop for beat in beats.values()):
            limit = min(limit, _SUSPECT)
        if failed:
            limit = min(limit, self._soon)
        found = {}
        for rank, beat in beats.items():
            silent, still = now - self._beats[rank][1], now - self._moves[rank][1]
            if beat.state == "ended":
                if failed or waited:
                    found[rank] = "its process has ended; its own message says why"
            elif silent > limit and self._is_missed(beat.state, failed=failed, waited=waited):
                found[rank] = f"no sign of life for {silent:.1f} s: it has died, is stopped, or cannot be reached"
            elif beat.state == "running" and not beat.waiting and still > self._seconds and silent <= self._soon:
                found[rank] = f"no progress for {still:.1f} s, at {beat.place}"
        return found

    @staticmethod
    def _is_missed(state: State, *, failed: bool, waited: bool) -> bool:
        """Whether silence in this state is a loss: who has finished or closed may have left."""
        if state == "finished":
            return failed or waited
        return failed if state == "closed" else state != "failed"

    def _forgive(self, now: float) -> None:
        """This process may have been stopped for a while, and with it all others: that time does not count."""
        missed = 0.0 if self._looked is None else max(0.0, now - self._looked - self._soon)
        self._looked = now
        for seen in (self._beats, self._moves):
            seen.update({rank: (number, since + missed) for rank, (number, since) in seen.items()})

    def target(self, beats: Mapping[int, Beat]) -> tuple[int, bool] | None:
        """For ranks in halt(): the step of the foremost rank, and whether all stand after it; None where none halts.

        A rank that had passed this step before it heard of the stop may be in a collective of the boundary (records, an
        evaluation), which needs those that halt: then all take one step more.
        """
        if all(beat.halted < 0 for beat in beats.values()):
            return None
        furthest = max(max(beat.halted, beat.begun) for beat in beats.values())
        if any(beat.halted < 0 and beat.waiting and beat.begun == beat.step == furthest for beat in beats.values()):
            furthest += 1
        return furthest, len(beats) == self._ranks and all(beat.halted == furthest for beat in beats.values())

    def all_heard(self, beats: Mapping[int, Beat]) -> bool:
        """Whether everybody that still speaks has the verdict."""
        return all(beat.heard or rank == 0 for rank, beat in beats.items() if not self._is_silent(rank))

    def _is_silent(self, rank: int) -> bool:
        return time.monotonic() - self._beats[rank][1] > self._soon


def verdict_of(lost: Mapping[int, str], beats: Mapping[int, Beat]) -> str:
    """The verdict in words."""
    lines = [
        f"  rank {rank} on {beats[rank].host or 'its host'}: {why}; it was last heard of in round {beats[rank].round}, "
        f"after step {beats[rank].step}"
        for rank, why in sorted(lost.items())
    ]
    more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
    name = f"rank {next(iter(lost))} is" if len(lost) == 1 else f"ranks {_list(sorted(lost))} are"
    return f"{name} lost (qsr.faults.timeout_seconds):\n" + "\n".join(lines[:20] + more)


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:20])) + (", ..." if len(ranks) > 20 else "")
