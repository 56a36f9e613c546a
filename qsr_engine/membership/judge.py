"""Who is lost, by what every rank says of itself in its beats. Nothing here talks or waits."""

from __future__ import annotations

import time
from collections.abc import Mapping

from qsr_engine.membership.beats import Beat, State, Word
from qsr_engine.membership.halt import target
from qsr_engine.membership.spelling import first_lines, spell_ranks

_SUSPECT = 10.0  # silence that is too long once a rank was asked to stop, perhaps by a launcher that saw another die
_BUSY = 6  # times the limit, for a main thread in Watchdog.busy(): a disk may take long, and hang for ever
MISSED = 4  # beats; whoever misses them after a collective has failed is taken to be gone


def moment(interval: float) -> float:
    """Seconds in which whoever lives has given several signs of it, with so many seconds between beats."""
    return max(1.0, MISSED * interval)


class Judge:
    """Who is lost, from one reading of the beats to the next; rank 0's own clock counts."""

    def __init__(self, seconds: float | None, interval: float) -> None:
        self._seconds = seconds
        self._soon = moment(interval)
        self._looked: float | None = None  # when it judged last
        self._beats: dict[int, tuple[int, float]] = {}  # of each rank: last number, and when it changed
        self._moves: dict[int, tuple[int, float]] = {}

    def of_all(self, beats: Mapping[int, Beat]) -> Word:
        """What rank 0 finds in the beats of all ranks."""
        lost = self.lost(beats)
        return Word(
            stop=any(beat.stop for beat in beats.values()),
            verdict=verdict_of(lost, beats) if lost else None,
            target=target(beats),
            all_heard=self.all_heard(beats),
        )

    def of_rank_0(self, beats: Mapping[int, Beat]) -> Word:
        """What another rank finds in the beat of rank 0 and its own: who judges all may be lost itself."""
        lost = self.lost(beats)
        return Word(verdict=verdict_of({0: lost[0]}, beats) if 0 in lost else None)

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
        waits = {rank: now - self._moves[rank][1] for rank, beat in beats.items() if beat.waiting}
        waited = any(still > self._soon for still in waits.values())
        needed = any(still > self._seconds and beats[rank].begun for rank, still in waits.items())
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
            elif self._is_stalled(beat, still, needed=needed) and silent <= self._soon:
                found[rank] = f"no progress for {still:.1f} s, at {beat.place}"
        return found

    def _is_stalled(self, beat: Beat, still: float, *, needed: bool) -> bool:
        """Whether a rank that lives does not get on, though it waits for nobody.

        Args:
            needed: a rank that has begun to train has waited for longer than the limit. Before its first step a rank
                may compile or read its data for any time, and after the last one write what it likes, while nobody
                waits for it so.
        """
        assert self._seconds is not None
        if beat.waiting or still <= self._seconds * (_BUSY if beat.busy else 1):
            return False
        return beat.state == "running" or (needed and beat.state in ("starting", "finished"))

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

    def all_heard(self, beats: Mapping[int, Beat]) -> bool:
        """Whether everybody that still speaks has the verdict."""
        return all(beat.heard or rank == 0 for rank, beat in beats.items() if not self._is_silent(rank))

    def _is_silent(self, rank: int) -> bool:
        return time.monotonic() - self._beats[rank][1] > self._soon


def verdict_of(lost: Mapping[int, str], beats: Mapping[int, Beat]) -> str:
    """The verdict in words."""
    lines = [
        f"  rank {rank} on {beats[rank].host or 'its host'}: {why}; it was last heard of {beats[rank].where}"
        for rank, why in sorted(lost.items())
    ]
    ranks = f"{spell_ranks(sorted(lost), 20)} {'is' if len(lost) == 1 else 'are'}"
    return f"{ranks} lost (qsr.faults.timeout_seconds):\n{first_lines(lines)}"
