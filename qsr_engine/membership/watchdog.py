"""Which ranks are alive, and whether all are to stop: every rank has threads that talk through the run's store.

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

To stop (SIGTERM, SIGUSR1), a rank says so in its beat. A worker's round ends at its own time, so ranks that take local
steps agree in the boundary's header; those that meet at every step, or are to cut the round, agree here (`halt`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # there at run time

from qsr_engine.averaging import CollectiveError
from qsr_engine.membership.judge import MISSED, Beat, Judge, State, verdict_of

_SHORTEST, _LONGEST = 0.1, 1.0  # seconds between beats
_RANKS_A_SECOND = 1000  # that rank 0 reads at most; with more ranks beats are rarer
_GRACE = 5.0  # for a main thread to raise the verdict, and for rank 0 to see that everybody has it
_LEAVE = 2.0  # for the thread that talks, at the end of the process
_PATIENCE = timedelta(days=7)
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # the name in torch 2.11
_WAITS = (str(Path(dist.__file__).parent), str(Path(__file__).parents[1] / "averaging"), __file__)  # sources of waiting


class LostRankError(CollectiveError):
    """Ranks are lost: they have died, hang, or cannot be reached. The message names them, the step and the round."""


class Liveness:
    """This rank's part; what is called `main` must be called by the main thread.

    Args:
        store: where the ranks meet, for this alone; None for one rank by itself.
        seconds: after which a rank is lost; None for never, where ranks are only asked to stop.
    """

    def __init__(self, store: Store | None, rank: int, ranks: int, seconds: float | None) -> None:
        self._rank, self._ranks, self._seconds = rank, ranks, seconds
        shortest = _SHORTEST if seconds is None else max(_SHORTEST, seconds / 20)
        self._interval = max(min(_LONGEST, shortest), ranks / _RANKS_A_SECOND)
        self._host = socket.gethostname()
        self._main = threading.get_ident()
        # Written by the main thread alone:
        self._state: State = "starting"
        self._moves = self._step = self._begun = self._round = 0
        self._halted = -1
        self._stop = False  # this rank was asked to stop; also by a handler of a signal
        # Written by the threads:
        self._told: State | None = None  # the state that the others know
        self._beats = 0
        self._place = ""
        self._asked = False  # some rank was asked to stop
        self._verdict: str | None = None
        self._lingers = False  # the main thread is in _linger(), which ends by itself
        self._raised = False  # the main thread has the verdict, and may clean up
        self._target: tuple[int, bool] | None = None  # step to halt at, and whether everybody stands there
        self._heard = False  # rank 0: everybody has the verdict
        self._news = threading.Condition()
        self._answered = time.monotonic()  # when the store last did
        self._broken = False  # the store is not there any more
        if store is not None:
            judge = Judge(ranks, seconds, self._interval)
            me, wake = weakref.ref(self), threading.Event()
            talk = threading.Thread(target=_talk, args=(me, rank, store, judge, wake), name="qsr liveness", daemon=True)
            talk.start()
            threading.Thread(target=_watch, args=(me,), name="qsr liveness", daemon=True).start()
            atexit.register(_end_talk, me, talk, wake)

    @classmethod
    def of_this_run(cls, seconds: float | None, across: dist.ProcessGroup | None = None) -> Liveness:
        """Every rank must call it; the process group of all ranks is there already.

        Args:
            across: the group that averages over workers. Where lost ranks are found here, its time-out and that of the
                group of all ranks are lifted: a worker that is slow and gets on may come to a boundary much later.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if seconds is not None:
            for group in dict.fromkeys((dist.group.WORLD, across)):
                if group is not None:
                    _set_timeout(_PATIENCE, group)
        if ranks == 1:
            return cls(None, rank, ranks, seconds)
        name = [uuid.uuid4().hex]  # torchrun's store outlives restarts, and with it what was said in it
        dist.broadcast_object_list(name, 0)
        store = dist.distributed_c10d._get_default_store().clone()  # own connection
        return cls(PrefixStore(f"qsr_engine/liveness/{name[0]}", store), rank, ranks, seconds)

    # ------------------------------------------------------------------------------------------------- main

    def begin(self, step: int, round_: int) -> None:
        """The step after `step` begins. Raises LostRankError."""
        self._moves, self._step, self._begun, self._round = self._moves + 1, step, step + 1, round_
        self.check()

    def moved(self) -> None:
        """The main thread gets on, in something that takes its time. Raises LostRankError."""
        self._moves += 1
        self.check()

    def done(self, step: int, round_: int, *, finished: bool = False) -> None:
        """A step has been taken. From the first one on a main thread that does not get on is stalled."""
        self._moves, self._step, self._round = self._moves + 1, step, round_
        self._state = "finished" if finished else "running"

    def check(self) -> None:
        """Raises LostRankError if there is a verdict."""
        if self._verdict is not None:
            self._linger()
            raise LostRankError(self._text())

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn the failure of a collective into a LostRankError where a rank is lost; this takes some beats.

        Raises:
            LostRankError: a collective failed in the block, and ranks are lost.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LostRankError) or not _of_a_collective(error):
                raise
            if not self._is_lost():
                raise
            self._linger()
            raise LostRankError(f"{self._text()} ({error})") from error

    def request_stop(self) -> None:
        """Ask all ranks to stop. May be called by a signal's handler or another thread."""
        self._stop = True

    @property
    def stop_requested(self) -> bool:
        """Whether this rank knows that a rank was asked to stop."""
        return self._asked or self._stop

    def halt(self, step: int) -> bool:
        """Wait until all ranks stand after the same step, that of the foremost one.

        Returns:
            True if that is this step; False if this rank must go on to get there.
        Raises:
            LostRankError
        """
        if self._ranks == 1:
            return True
        self._halted = step
        try:
            with self._news:
                while self._verdict is None:
                    if self._target is not None and self._target[0] > step:
                        return False
                    if self._target == (step, True):
                        return True
                    self._news.wait(self._interval)
        finally:
            if self._target != (step, True):
                self._halted = -1
        self.check()
        return False

    def close(self) -> None:
        """Say and judge nothing any more, and do not be judged, unless a collective of another rank fails."""
        if self._state != "ended":
            self._state = "closed"

    # ----------------------------------------------------------------------------------------------- inside

    @property
    def _over(self) -> bool:
        return self._state in ("closed", "ended")

    def _is_lost(self) -> bool:
        """After a collective has failed: wait until somebody has judged."""
        if self._ranks == 1 or self._over or self._seconds is None:
            return False
        before, self._state = self._state, "failed"
        with self._news:
            self._news.wait_for(lambda: self._verdict is not None, 2 * max(1.0, MISSED * self._interval) + 2)
        if self._verdict is None:
            self._state = before
        return self._verdict is not None

    def _linger(self) -> None:
        """Before the verdict is raised. Rank 0 may hold the store: the others must hear it before rank 0 ends."""
        if self._rank == 0:
            self._lingers = True
            with self._news:
                self._news.wait_for(lambda: self._heard or self._broken, _GRACE)
        self._raised, self._lingers = True, False

    def _text(self) -> str:
        where = f"Rank {self._rank} on {self._host} was in round {self._round}, after step {self._step}"
        return f"{self._verdict}\n{where}."

    def _learn(self, verdict: str | None = None, target: tuple[int, bool] | None = None) -> None:
        with self._news:
            if verdict is not None and self._verdict is None:
                self._verdict = verdict
            if target is not None:
                self._target = target
            self._news.notify_all()

    def _next_beat(self) -> Beat:
        waiting, self._place = _standing(sys._current_frames().get(self._main))
        self._beats += 1
        return Beat(
            self._beats,
            self._moves,
            self._state,
            waiting and not self._over,  # in _end_talk() it waits for its own thread, and for no rank
            self._stop,
            self._verdict is not None,
            self._step,
            self._begun,
            self._halted,
            self._round,
            self._host,
            self._place,
        )


def _standing(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and the place that a message names."""
    place = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_WAITS):
            return True, f"{Path(name).name}, line {frame.f_lineno}, {frame.f_code.co_name}()"
        if not place and not name.startswith("<"):
            place = f"{Path(name).name}, line {frame.f_lineno}, {frame.f_code.co_name}()"
        frame = frame.f_back
    return False, place


def _of_a_collective(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (CollectiveError, dist.DistError)) or "gloo" in text or "NCCL" in text or "c10d" in text


# ---------------------------------------------------------------------------------------------------- threads


def _talk(reference: weakref.ref[Liveness], rank: int, store: Store, judge: Judge, wake: threading.Event) -> None:
    """Beats, and what the others say. A store that hangs keeps this thread, which _watch() sees."""
    while (me := reference()) is not None and me._told not in ("closed", "ended"):
        interval = me._interval
        try:
            beat = me._next_beat()
            store.set(f"beat {rank}", beat.encode())
            me._told = beat.state
            if rank == 0:
                _say_and_judge(me, beat, store, judge)
            else:
                _hear_and_judge(me, beat, store, judge)
            me._answered, me._broken = time.monotonic(), False
        except (dist.DistError, RuntimeError, ValueError):
            me._broken = True
            if me._over:
                return
        hurry = me._verdict is not None or me._state == "failed" or me.stop_requested
        del me
        wake.wait(interval / 4 if hurry else interval)
    if me is None:  # nobody holds it any more, and it was not closed
        with contextlib.suppress(dist.DistError, RuntimeError):
            store.set(f"beat {rank}", Beat(-1, state="closed").encode())


def _say_and_judge(me: Liveness, mine: Beat, store: Store, judge: Judge) -> None:
    """Rank 0: its word tells the others what they need to know, and that rank 0 is alive."""
    keys = [f"beat {rank}" for rank in range(me._ranks)]
    if not store.check(keys):
        keys = [key for key in keys if store.check([key])]
    beats = {rank: Beat() for rank in range(me._ranks)}
    beats |= {int(key.split()[1]): Beat.decode(text) for key, text in zip(keys, store.multi_get(keys), strict=True)}
    me._asked = me._asked or any(beat.stop for beat in beats.values())
    lost = judge.lost(beats)
    if lost:
        me._learn(verdict_of(lost, beats))
    target = judge.target(beats)
    word = {"stop": me._asked, "verdict": me._verdict, "target": target, "beat": mine.encode()}
    store.set("word", json.dumps(word))
    me._learn(target=target)
    me._heard = me._verdict is not None and judge.all_heard(beats)


def _hear_and_judge(me: Liveness, mine: Beat, store: Store, judge: Judge) -> None:
    """Another rank: what rank 0 says, and whether it still says something. The store may outlive it."""
    first = Beat()
    if store.check(["word"]):
        word = json.loads(store.get("word"))
        first = Beat.decode(word["beat"])
        me._asked = me._asked or word["stop"]
        me._learn(word["verdict"], word["target"] and tuple(word["target"]))
    lost = judge.lost({0: first, me._rank: mine})
    if 0 in lost:
        me._learn(verdict_of({0: lost[0]}, {0: first}))


def _watch(reference: weakref.ref[Liveness]) -> None:
    """Judge a store that does not answer, and end a process whose main thread cannot raise the verdict."""
    stuck_since, looked = None, time.monotonic()
    while (me := reference()) is not None and me._state != "closed":
        now = time.monotonic()
        if now - looked > 2 * _LONGEST + me._interval:  # this process was stopped for a while, and goes on
            me._answered += now - looked
        looked = now
        silence = now - me._answered
        limit = me._seconds if me._seconds is not None else float("inf")
        if me._broken and me._state == "failed":
            limit = min(limit, MISSED * me._interval)
        if me._verdict is None and silence > limit and me._state != "finished":
            other = "torchrun's agent, which" if me._rank == 0 else "rank 0, or torchrun's agent that"
            me._learn(
                f"{other} holds the store, has not answered for {silence:.1f} s (qsr.faults.timeout_seconds): it "
                "has ended, hangs, or the network between is cut"
            )
        waiting, _ = _standing(sys._current_frames().get(me._main))
        if me._verdict is None or me._lingers or (me._raised and not waiting):
            stuck_since = None
        else:
            stuck_since = stuck_since or now
            if now - stuck_since > (_GRACE if waiting else max(_GRACE, limit)):
                _end(f"{me._text()} Its main thread is stuck at {me._place}; this process ends.")
        interval = me._interval
        del me
        time.sleep(interval)


def _end(text: str) -> None:
    """End the process from a thread, whatever its main thread does."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {text}\n".encode())
    os._exit(1)


def _end_talk(reference: weakref.ref[Liveness], talk: threading.Thread, wake: threading.Event) -> None:
    """The process ends by itself. Before the run does, whoever waits for this rank must hear that it waits for nothing.

    A thread that comes back from the store to an interpreter that is gone would abort the process: it ends before.
    """
    me = reference()
    if me is not None and not me._over:
        me._state = "closed" if me._state == "finished" else "ended"
    wake.set()
    talk.join(_LEAVE)  # a store that hangs holds nobody up
