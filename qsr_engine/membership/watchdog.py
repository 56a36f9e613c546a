"""Which ranks are alive: every rank tells the others by beats, and raises LostRankError where one is lost.

Between boundaries no worker waits for another, so nobody would notice that one is gone; and who waits for it at the
boundary would wait for the time-out of the process group and learn only that it ran out.

    every rank      a beat once an interval: a number that grows, whether its main thread gets on, waits for others or
                    neither, its step and round, and whether it has been asked to stop
    rank 0          reads all beats and judges: silent, stalled or ended ranks are lost; its word goes to everybody: the
                    verdict, and its own beat, by which every other rank judges rank 0
    every rank      raises the verdict at the next step. A main thread that is stuck in a collective cannot, so after a
                    moment its process is ended, as NCCL's own watchdog does
    without a store that answers, every rank judges by itself

Nothing here is a collective of a process group: the store belongs to rank 0 or to torchrun's agent.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # there at run time

from qsr_engine.averaging import CollectiveError
from qsr_engine.membership.beats import News, Progress, Talk, process
from qsr_engine.membership.halt import Halt
from qsr_engine.membership.judge import MISSED, Judge, moment
from qsr_engine.membership.timeouts import lift

_SHORTEST, _LONGEST = 0.1, 1.0  # seconds between beats
_RANKS_A_SECOND = 1000  # that rank 0 reads at most; with more ranks beats are rarer
_GRACE = 5.0  # for a main thread to raise the verdict, and for rank 0 to see that everybody has it


class LostRankError(CollectiveError):
    """Ranks are lost: they have died, hang, or cannot be reached. The message names them, the step and the round."""


class Watchdog:
    """This rank's part; only its main thread may call it.

    Args:
        store: where the ranks meet, for this alone; None for one rank by itself.
        seconds: after which a rank is lost; None for never, where ranks are only asked to stop.
        closed: called once, when this is closed or nobody holds it any more.
    Attributes:
        halt: ask all ranks to stop, and agree on the step.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        ranks: int,
        seconds: float | None,
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        self._ranks, self._seconds = ranks, seconds
        shortest = _SHORTEST if seconds is None else max(_SHORTEST, seconds / 20)
        self._interval = interval = max(min(_LONGEST, shortest), ranks / _RANKS_A_SECOND)
        self._progress, self._news = progress, news = Progress(rank), News()
        self.halt = Halt(progress, news, ranks=ranks, interval=interval, check=partial(_raise_verdict, progress, news))
        if store is not None:
            judge = Judge(seconds, interval)
            judged = judge.of_all if rank == 0 else judge.of_rank_0
            Talk(store, progress, news, ranks=ranks, interval=interval, judge=judged)
            _Guard(progress, news, seconds=seconds, interval=interval)
        self._close = weakref.finalize(self, _close, progress, closed)
        self._close.atexit = False

    @classmethod
    def of_this_run(cls, seconds: float | None, *averaging: dist.ProcessGroup) -> Watchdog:
        """Every rank must call it; the process group of all ranks is there already.

        Args:
            averaging: the groups of the averaging. Where lost ranks are found here, their time-outs and that of the
                group of all ranks are lifted until close(): a worker that is slow and gets on may come to a boundary
                much later.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        restore = lift([dist.group.WORLD, *averaging] if seconds is not None else [])
        if ranks == 1:
            return cls(None, rank, ranks, seconds, restore)
        name = [uuid.uuid4().hex]  # torchrun's store outlives restarts, and with it what was said in it
        dist.broadcast_object_list(name, 0)
        store = dist.distributed_c10d._get_default_store().clone()  # own connection
        return cls(PrefixStore(f"qsr_engine/beats/{name[0]}", store), rank, ranks, seconds, restore)

    def begin(self, step: int, round_: int) -> None:
        """The step after `step` begins. Raises LostRankError."""
        self._progress.step, self._progress.begun, self._progress.round = step, step + 1, round_
        self.moved()

    def moved(self) -> None:
        """The main thread gets on, in something that takes its time. Raises LostRankError."""
        self._progress.moved()
        self.check()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """The main thread does what may take longer than the limit by itself, as writing a checkpoint does.

        In the block it is stalled after a multiple of the limit only; if it is silent it is lost as ever.

        Raises:
            LostRankError: as the block begins.
        """
        self.moved()
        process.busy += 1
        try:
            yield
        finally:
            process.busy -= 1
            self._progress.moved()

    def done(self, step: int, round_: int, *, finished: bool = False) -> None:
        """A step has been taken. From the first one on a main thread that does not get on is stalled."""
        self._progress.moved()
        self._progress.step, self._progress.round = step, round_
        self._progress.state = "finished" if finished else "running"

    def check(self) -> None:
        """Raises LostRankError if there is a verdict."""
        _raise_verdict(self._progress, self._news)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the failure of a collective into a LostRankError where a rank is lost; this takes some beats.

        Raises:
            LostRankError: a collective failed in the block, and ranks are lost.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, LostRankError) and _of_a_collective(error) and self._is_lost():
                _raise_verdict(self._progress, self._news, error)
            raise

    def close(self) -> None:
        """Say and judge nothing any more, and do not be judged, unless a collective of another rank fails.

        The time-outs of process groups are as they were before. Again is harmless.
        """
        self._close()

    def _is_lost(self) -> bool:
        """After a collective has failed: wait until somebody has judged."""
        if self._ranks == 1 or self._progress.over or self._seconds is None:
            return False
        before, self._progress.state = self._progress.state, "failed"
        with self._news.changed:
            self._news.changed.wait_for(lambda: self._news.verdict is not None, 2 * moment(self._interval) + 2)
        if self._news.verdict is None:
            self._progress.state = before
        return self._news.verdict is not None


def _close(progress: Progress, closed: Callable[[], None]) -> None:
    progress.close()
    closed()


class _Guard:
    """A thread that judges a store that does not answer, and ends a process whose main thread is stuck.

    That is one which does not raise the verdict, or waits for others again after it has.
    """

    def __init__(self, progress: Progress, news: News, *, seconds: float | None, interval: float) -> None:
        self._progress, self._news = progress, news
        self._seconds = math.inf if seconds is None else seconds
        self._interval = interval
        threading.Thread(target=self._run, name="qsr watchdog", daemon=True).start()

    def _run(self) -> None:
        stuck_since: float | None = None
        looked, answered = time.monotonic(), self._news.answered
        while self._progress.state != "closed":
            now = time.monotonic()
            if now - looked > 2 * _LONGEST + self._interval:  # this process was stopped for a while, and goes on
                answered += now - looked
            looked, answered = now, max(answered, self._news.answered)
            self._judge_the_store(now - answered)
            stuck, limit, place = self._main_thread()
            stuck_since = (stuck_since or now) if stuck else None
            if stuck_since is not None and now - stuck_since > limit:
                _end(f"{_text(self._progress, self._news)} Its main thread is stuck at {place}; this process ends.")
            time.sleep(self._interval)

    def _limit(self) -> float:
        """Seconds of silence after which the store is lost."""
        if self._news.broken and self._progress.state == "failed":
            return min(self._seconds, MISSED * self._interval)
        return self._seconds

    def _judge_the_store(self, silence: float) -> None:
        if self._news.verdict is None and silence > self._limit() and self._progress.state != "finished":
            other = "torchrun's agent, which" if self._progress.rank == 0 else "rank 0, or torchrun's agent that"
            self._news.learn(
                verdict=f"{other} holds the store, has not answered for {silence:.1f} s (qsr.faults.timeout_seconds): "
                "it has ended, hangs, or the network between is cut"
            )

    def _main_thread(self) -> tuple[bool, float, str]:
        """Whether it does not do what it must, for how many seconds it may be so, and where it is."""
        waiting, place = self._progress.main_thread()
        raised = self._progress.raised
        free = self._news.verdict is None or raised == "soon" or (raised == "yes" and not waiting)
        return not free, _GRACE if waiting else max(_GRACE, self._limit()), place


def _raise_verdict(progress: Progress, news: News, error: Exception | None = None) -> None:
    """Raise LostRankError where there is a verdict; `error` is what it explains.

    Rank 0 may hold the store: the others must hear the verdict before rank 0 ends.
    """
    if news.verdict is None:
        return
    if progress.rank == 0:
        progress.raised = "soon"
        with news.changed:
            news.changed.wait_for(lambda: news.all_heard or news.broken, _GRACE)
    progress.raised = "yes"
    if error is not None:
        raise LostRankError(f"{_text(progress, news)} ({error})") from error
    raise LostRankError(_text(progress, news))


def _text(progress: Progress, news: News) -> str:
    return f"{news.verdict}\nRank {progress.rank} on {progress.host} was {progress.where}."


def _of_a_collective(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (CollectiveError, dist.DistError)) or "gloo" in text or "NCCL" in text or "c10d" in text


def _end(text: str) -> None:
    """End the process from a thread, whatever its main thread does."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {text}\n".encode())
    os._exit(1)
