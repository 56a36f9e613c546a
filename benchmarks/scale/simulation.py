"""One run, simulated from event to event: rounds, averagings, checkpoints and failures."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.scale.closed_form import CostModel
from benchmarks.scale.step_times import Counts, Drawn, Floats, Sampler
from qsr_engine.schedule import Round


class FailureQueue:
    """Which worker fails next, and when; each fails after an exponential time, and so does what replaces it.

    Args:
        mean_seconds: between two failures of one worker; math.inf for none.
    """

    def __init__(self, workers: int, mean_seconds: float, random: np.random.Generator) -> None:
        self._mean, self._random = mean_seconds, random
        self._events: list[tuple[float, int]] = []
        if math.isfinite(mean_seconds):
            self._events = list(zip(random.exponential(mean_seconds, workers).tolist(), range(workers), strict=True))
            heapq.heapify(self._events)

    @property
    def next_time(self) -> float:
        return self._events[0][0] if self._events else math.inf

    def pop(self) -> tuple[float, int]:
        seconds, worker = self._events[0]
        heapq.heapreplace(self._events, (seconds + self._random.exponential(self._mean), worker))
        return seconds, worker


@dataclass(frozen=True)
class Failures:
    """What failures cost.

    Args:
        mean_seconds: between two failures of one worker; math.inf for none.
        restart_seconds: until all work again at the last checkpoint.
        save_seconds: that a checkpoint stops all workers.
        save_every: steps; at the first boundary after them. None: no checkpoints.
        notice: "boundary": when the others meet; "at_once": all stop when one fails.
        way: "restart": all go back to the last checkpoint; "elastic": the others go on without the one that failed, and
            it joins again at the first boundary after restart_seconds.
        timeout_seconds: that the others wait at a boundary for who does not come any more, if elastic.
        join_seconds: that a boundary takes longer at which members join, if elastic.
        give_up: seconds after which a run is called off.
    """

    mean_seconds: float = math.inf
    restart_seconds: float = 300.0
    save_seconds: float = 10.0
    save_every: int | None = None
    notice: Literal["boundary", "at_once"] = "boundary"
    way: Literal["restart", "elastic"] = "restart"
    timeout_seconds: float = 10.0
    join_seconds: float = 0.0
    give_up: float = math.inf


NO_FAILURES = Failures()


@dataclass
class Outcome:
    """Seconds, and bytes that a worker has sent; compute and waiting have one entry per column of the sampler.

    All of compute, waiting, communication and saving belong to work that was kept, all else is lost. Bytes are those of
    all averagings that ended, lost ones too.

    last_begun: how often the last round was begun. absent: steps of workers that are in no average, since the worker
    failed before its boundary, or had not joined again by its start.
    """

    total: float
    compute: Floats
    waiting: Floats
    communication: float
    saving: float
    lost: float
    bytes: float
    failures: int
    finished: bool = True
    last_begun: int = 1
    absent: int = 0

    def share(self, part: Literal["waiting", "communication", "saving", "lost"]) -> float:
        return float(np.mean(getattr(self, part))) / self.total


@dataclass
class _Clock:
    """Where a run is: rounds before `position` are done, those before `saved` cannot be lost."""

    now: float = 0.0
    position: int = 0
    saved: int = 0
    saved_at: float = 0.0  # when the work that is not saved began
    lost: float = 0.0
    bytes: float = 0.0
    failures: int = 0
    last_begun: int = 1
    absent: int = 0
    joins: list[float] = field(default_factory=list)  # when those that failed can take part again; a heap


class Simulation:
    """One run, from event to event.

    Args:
        model: communication and bytes of a round.
    """

    def __init__(
        self, schedule: Sequence[Round], model: CostModel, sampler: Sampler, failures: Failures, seed: Sequence[int]
    ) -> None:
        self._sampler, self._failures = sampler, failures
        self._random = np.random.default_rng(seed)
        self._queue = FailureQueue(model.workers, failures.mean_seconds, self._random)
        self._lengths = np.array([r.length for r in schedule], dtype=np.int64)
        costs = {r: model.round(Round(0, *r)) for r in {(r.length, r.mode) for r in schedule}}
        kinds = [costs[r.length, r.mode] for r in schedule]
        self._communication = np.array([cost.communication for cost in kinds])
        self._bytes = np.array([cost.bytes for cost in kinds])
        self._saves = _saved_boundaries(self._lengths, failures.save_every)

    def run(self, queue: FailureQueue | None = None) -> Outcome:
        """Args: queue: of failures, in place of the drawn ones."""
        queue = queue or self._queue
        clock, drawn = _Clock(), self._sampler.draw(self._lengths, self._random)
        last = len(self._lengths)
        while clock.position < last and clock.now < self._failures.give_up:
            saving = self._saves[clock.position :] * self._failures.save_seconds
            durations = drawn.slowest[clock.position :] + self._communication[clock.position :] + saving
            ends = clock.now + np.cumsum(durations)
            happens = min([queue.next_time, *clock.joins[:1]])
            reached = clock.position + int(np.searchsorted(ends, happens, side="right"))
            self._advance(clock, ends, reached)
            if reached < last and self._failures.way == "elastic":
                self._go_on(clock, queue, float(drawn.slowest[reached]))
            elif reached < last:
                arrival = clock.now + float(drawn.slowest[reached])
                if queue.next_time >= arrival + self._communication[reached]:  # while its checkpoint is written
                    clock.bytes += float(self._bytes[reached])
                self._fail(clock, queue, arrival)
                again = slice(clock.saved, reached + 1)
                redrawn = self._sampler.draw(self._lengths[again], self._random)
                drawn.slowest[again], drawn.compute[again] = redrawn.slowest, redrawn.compute
        return self._outcome(clock, drawn)

    def _advance(self, clock: _Clock, ends: Floats, reached: int) -> None:
        """To the end of the last round before `reached`."""
        if reached == clock.position:
            return
        saves = np.flatnonzero(self._saves[clock.position : reached])
        if len(saves):
            clock.saved, clock.saved_at = clock.position + int(saves[-1]) + 1, float(ends[saves[-1]])
        clock.bytes += float(self._bytes[clock.position : reached].sum())
        clock.absent += len(clock.joins) * int(self._lengths[clock.position : reached].sum())
        clock.now, clock.position = float(ends[reached - clock.position - 1]), reached

    def _go_on(self, clock: _Clock, queue: FailureQueue, slowest: float) -> None:
        """A round in which members fail or join, and its boundary: nothing is done again but an averaging.

        The boundary waits for the time-out where somebody has failed. Who fails in that time or in the averaging lets
        it fail too, and it is tried again without. Who fails while a checkpoint is written is missed at the next one.
        """
        failures, at = self._failures, clock.position
        started, now = clock.now, clock.now + slowest
        gone = self._gone(clock, queue, now)
        while True:
            now += failures.timeout_seconds * bool(gone) + float(self._communication[at])
            gone = self._gone(clock, queue, now)
            if not gone:
                break
        clock.absent += len(clock.joins) * int(self._lengths[at])
        if clock.joins and clock.joins[0] <= now:
            now += failures.join_seconds
        while clock.joins and clock.joins[0] <= now:
            heapq.heappop(clock.joins)
        clock.lost += now - started - slowest - float(self._communication[at])
        clock.bytes += float(self._bytes[at])
        clock.now, clock.position = now + float(self._saves[at]) * failures.save_seconds, at + 1

    def _gone(self, clock: _Clock, queue: FailureQueue, until: float) -> int:
        """How many members fail until then; each starts again."""
        count = 0
        while queue.next_time < until:
            failed, _ = queue.pop()
            heapq.heappush(clock.joins, failed + self._failures.restart_seconds)
            count += 1
        clock.failures += count
        return count

    def _fail(self, clock: _Clock, queue: FailureQueue, arrival: float) -> None:
        """From a failure to the restart at the last checkpoint; machines fail in between, too.

        Args:
            arrival: when the last worker comes to the boundary of the round that fails.
        """
        failed, _ = queue.pop()
        clock.failures += 1
        noticed = max(failed, arrival) if self._failures.notice == "boundary" else failed
        restarted = noticed + self._failures.restart_seconds
        while queue.next_time < restarted:
            again, _ = queue.pop()
            clock.failures += 1
            if again > noticed:  # before that, it is one more that is missing at the boundary
                restarted = again + self._failures.restart_seconds
        clock.lost += restarted - clock.saved_at
        clock.last_begun += clock.position == len(self._lengths) - 1
        clock.now = clock.saved_at = restarted
        clock.position = clock.saved

    def _outcome(self, clock: _Clock, drawn: Drawn) -> Outcome:
        kept = slice(0, clock.position)
        compute = drawn.compute[kept].sum(axis=0)
        return Outcome(
            total=clock.now,
            compute=compute,
            waiting=(drawn.slowest[kept, None] - drawn.compute[kept]).sum(axis=0),
            communication=float(self._communication[kept].sum()),
            saving=float(self._saves[kept].sum()) * self._failures.save_seconds,
            lost=clock.lost,
            bytes=clock.bytes,
            failures=clock.failures,
            finished=clock.position == len(self._lengths),
            last_begun=clock.last_begun,
            absent=clock.absent,
        )


def _saved_boundaries(lengths: Counts, every: int | None) -> npt.NDArray[np.bool_]:
    """At which boundaries a checkpoint is written: the first after every so many steps, and not at the run's end."""
    saves, steps, due = np.zeros(len(lengths), dtype=bool), 0, every or math.inf
    for number, length in enumerate(lengths[:-1].tolist()):
        steps += length
        if every and steps >= due:
            saves[number], due = True, (steps // every + 1) * every
    return saves
