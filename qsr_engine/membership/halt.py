"""To stop: a rank that is asked to (SIGTERM, SIGUSR1) says so in its beat, and all ranks stop after the same step.

A worker's round ends at its own time, so ranks that take local steps agree in the boundary's header; those that meet at
every step, or are to cut the round, agree here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qsr_engine.membership.beats import Beat, News, Progress, Target


class Halt:
    """Ask all ranks to stop, and agree with them on a step to stop after.

    Args:
        check: raises the verdict over lost ranks, if there is one.
    """

    def __init__(
        self, progress: Progress, news: News, *, ranks: int, interval: float, check: Callable[[], None]
    ) -> None:
        self._progress, self._news = progress, news
        self._ranks, self._interval, self._check = ranks, interval, check

    def request(self) -> None:
        """Ask all ranks to stop. May be called by a signal's handler or another thread."""
        self._progress.stop = True

    @property
    def requested(self) -> bool:
        """Whether this rank knows that a rank was asked to stop."""
        return self._news.stop or self._progress.stop

    def at(self, step: int) -> bool:
        """Wait until all ranks stand after the same step, that of the foremost one. The main thread must call it.

        Returns:
            True if that is this step; False if this rank must go on to get there.
        Raises:
            LostRankError
        """
        if self._ranks == 1:
            return True
        self._progress.halted = step
        try:
            with self._news.changed:
                while self._news.verdict is None:
                    if self._news.target is not None and self._news.target[0] > step:
                        return False
                    if self._news.target == (step, True):
                        return True
                    self._news.changed.wait(self._interval)
        finally:
            if self._news.target != (step, True):
                self._progress.halted = -1
        self._check()
        return False


def target(beats: Mapping[int, Beat]) -> Target | None:
    """Where ranks stand in Halt.at(), by the beats of all: the step of the foremost rank, and whether all stand there.

    A rank that had passed this step before it heard of the stop may be in a collective of the boundary (records, an
    evaluation), which needs those that halt: then all take one step more.

    Returns:
        None where no rank halts.
    """
    if all(beat.halted < 0 for beat in beats.values()):
        return None
    furthest = max(max(beat.halted, beat.begun) for beat in beats.values())
    if any(beat.halted < 0 and beat.waiting and beat.begun == beat.step == furthest for beat in beats.values()):
        furthest += 1
    return furthest, all(beat.halted == furthest for beat in beats.values())
