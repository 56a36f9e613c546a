"""Beats: what a rank says of itself, what it hears of the others, and the thread that does both through the store.

    beat RANK    of every rank, once an interval
    word         of rank 0, which reads all beats: what has been found, and its own beat, by which the others judge it

Three records are written by one thread and read by others. Progress belongs to the main thread, News to the threads; a
beat is what the first was at a moment. No field depends on another, so that only waiting for news takes a lock.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # there at run time

_LEAVE = 2.0  # seconds for the thread to say its last, at the end of the process
_DISTRIBUTED = Path(dist.__file__).parent
# Sources in which a main thread waits for other ranks, and those among them that start it, or compute and write in it.
_WAITS = (
    str(_DISTRIBUTED),
    str(Path(__file__).parents[1] / "averaging"),
    *(str(Path(__file__).with_name(name)) for name in ("watchdog.py", "halt.py")),
)
_WAITS_NOT = tuple(
    str(_DISTRIBUTED / name) for name in ("algorithms", "checkpoint", "elastic", "launch.py", "launcher", "run.py")
)

State = Literal["starting", "running", "failed", "finished", "closed", "ended"]
Target = tuple[int, bool]  # the step to stop after, and whether all ranks stand there


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int = 0
    moves: int = 0  # grows while the main thread gets on, with any engine of its process
    state: State = "starting"
    waiting: bool = False  # the main thread is in a collective, or in Halt.at()
    stop: bool = False
    heard: bool = False  # it has the verdict
    step: int = 0
    begun: int = 0  # the step under way
    halted: int = -1  # the step after which it stands in Halt.at(); -1 where it does not
    round: int = 0
    host: str = ""
    place: str = ""  # where the main thread is
    where: str = "in round 0, after step 0"  # of the engine with which it got on last, for a message
    busy: bool = False  # the main thread is in something that takes its time (Watchdog.busy())

    def encode(self) -> str:
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Beat:
        return cls(*json.loads(text))


@dataclasses.dataclass(frozen=True)
class Word:
    """What a judge finds in the beats, and rank 0 tells everybody."""

    stop: bool = False  # some rank was asked to stop
    verdict: str | None = None
    target: Target | None = None
    all_heard: bool = False  # everybody that still speaks has the verdict
    beat: str = dataclasses.field(default_factory=lambda: Beat().encode())  # of rank 0

    def encode(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Word:
        fields = json.loads(text)
        return cls(**{**fields, "target": fields["target"] and tuple(fields["target"])})


class _Process:
    """What the engines of this process share (a GAN has two): one main thread gets on for all of them."""

    def __init__(self) -> None:
        self.moves = 0
        self.busy = 0  # blocks of Watchdog.busy() that it is in
        self.last: Progress | None = None  # the engine with which it got on last
        self.engines: list[weakref.ref[Progress]] = []  # whose beats are said, or were


process = _Process()


@dataclasses.dataclass(eq=False)
class Progress:
    """How far this rank is with one engine. The main thread alone writes it, but for `stop`; the threads read it."""

    rank: int
    host: str = dataclasses.field(default_factory=socket.gethostname)
    main: int = dataclasses.field(default_factory=threading.get_ident)  # the thread that makes this object
    state: State = "starting"
    step: int = 0
    begun: int = 0
    halted: int = -1
    round: int = 0
    raised: Literal["no", "soon", "yes"] = "no"  # the verdict; soon: once the others have heard it
    stop: bool = False  # this rank was asked to stop: also by a signal's handler, or another thread

    def moved(self) -> None:
        """The main thread gets on, with this engine."""
        process.moves += 1
        process.last = self

    @property
    def where(self) -> str:
        """Round and step of the engine with which the main thread got on last."""
        living = [one for one in (found() for found in tuple(process.engines)) if one is not None and not one.over]
        last = process.last if process.last in living else self
        which = f" of engine {living.index(last) + 1} of {len(living)}" if last in living and len(living) > 1 else ""
        return f"in round {last.round}, after step {last.step}{which}"

    @property
    def over(self) -> bool:
        return self.state in ("closed", "ended")

    def close(self) -> None:
        if self.state != "ended":
            self.state = "closed"

    def end(self) -> None:
        """The process ends."""
        if not self.over:
            self.state = "closed" if self.state == "finished" else "ended"

    def main_thread(self) -> tuple[bool, str]:
        """Whether the main thread waits for other ranks, and the place that a message names."""
        frame, place = sys._current_frames().get(self.main), ""
        while frame is not None:
            name = frame.f_code.co_filename
            here = f"{Path(name).name}, line {frame.f_lineno}, {frame.f_code.co_name}()"
            if name.startswith(_WAITS) and not name.startswith(_WAITS_NOT):
                return True, here
            if not place and not name.startswith("<"):
                place = here
            frame = frame.f_back
        return False, place

    def beat(self, number: int, *, heard: bool) -> Beat:
        waiting, place = self.main_thread()
        return Beat(
            number,
            process.moves,
            self.state,
            waiting and not self.over,  # else it waits for a thread of its own to end, and for no rank
            self.stop,
            heard,
            self.step,
            self.begun,
            self.halted,
            self.round,
            self.host,
            place,
            self.where,
            process.busy > 0,
        )


class News:
    """What this rank has heard. The threads write it; the main thread reads it, and waits for `changed`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.stop = False  # some rank was asked to stop
        self.verdict: str | None = None  # the first one
        self.target: Target | None = None
        self.all_heard = False  # on rank 0: everybody has the verdict
        self.answered = time.monotonic()  # when the store last did
        self.broken = False  # the store is not there any more

    def learn(
        self, *, stop: bool = False, verdict: str | None = None, target: Target | None = None, all_heard: bool = False
    ) -> None:
        with self.changed:
            self.stop = self.stop or stop
            self.verdict = self.verdict or verdict
            self.target = target or self.target
            self.all_heard = self.all_heard or (all_heard and self.verdict is not None)
            self.changed.notify_all()


class Talk:
    """The thread that says this rank's beats and hears of the others, until the rank is over and has said so.

    Args:
        interval: seconds between beats.
        judge: finds the word in beats: on rank 0 in those of all, on another in rank 0's and its own.
    """

    def __init__(
        self,
        store: Store,
        progress: Progress,
        news: News,
        *,
        ranks: int,
        interval: float,
        judge: Callable[[Mapping[int, Beat]], Word],
    ) -> None:
        self._store, self._progress, self._news, self._judge = store, progress, news, judge
        self._ranks, self._interval = ranks, interval
        self._wake = threading.Event()
        process.engines[:] = [found for found in process.engines if found() is not None]
        process.engines.append(weakref.ref(progress))
        self._thread = threading.Thread(target=self._run, name="qsr beats", daemon=True)
        self._thread.start()
        atexit.register(_end, weakref.ref(self))

    def end(self) -> None:
        """The process ends by itself. Before it does, whoever waits for this rank must hear that it waits in vain.

        A thread that comes back from the store to an interpreter that is gone would abort the process: it ends before.
        """
        self._progress.end()
        self._wake.set()
        self._thread.join(_LEAVE)  # a store that hangs holds nobody up

    def _run(self) -> None:
        """A store that hangs keeps this thread, which another sees."""
        progress, news = self._progress, self._news
        number, said = 0, progress.state
        while said not in ("closed", "ended"):
            number += 1
            try:
                beat = progress.beat(number, heard=news.verdict is not None)
                self._store.set(f"beat {progress.rank}", beat.encode())
                said = beat.state
                if progress.rank == 0:
                    self._tell_all(beat)
                else:
                    self._hear_rank_0(beat)
                news.answered, news.broken = time.monotonic(), False
            except (dist.DistError, RuntimeError, ValueError):
                news.broken = True
                if progress.over:
                    return
            hurry = news.verdict is not None or progress.state == "failed" or progress.stop or news.stop
            self._wake.wait(self._interval / 4 if hurry else self._interval)

    def _tell_all(self, mine: Beat) -> None:
        """As rank 0: read all beats, and tell what they say. It also shows that rank 0 is alive."""
        keys = [f"beat {rank}" for rank in range(self._ranks)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        beats = {rank: Beat() for rank in range(self._ranks)}
        texts = self._store.multi_get(keys)
        beats |= {int(key.split()[1]): Beat.decode(text) for key, text in zip(keys, texts, strict=True)}
        word = self._judge(beats)
        self._news.learn(stop=word.stop, verdict=word.verdict)
        told = dataclasses.replace(word, stop=self._news.stop, verdict=self._news.verdict, beat=mine.encode())
        self._store.set("word", told.encode())
        self._news.learn(target=word.target, all_heard=word.all_heard)

    def _hear_rank_0(self, mine: Beat) -> None:
        """As another rank: what rank 0 says, and whether it still says something. The store may outlive it."""
        word = Word.decode(self._store.get("word")) if self._store.check(["word"]) else Word()
        self._news.learn(stop=word.stop, verdict=word.verdict, target=word.target)
        judged = self._judge({0: Beat.decode(word.beat), self._progress.rank: mine})
        self._news.learn(verdict=judged.verdict)


def _end(reference: weakref.ref[Talk]) -> None:
    talk = reference()
    if talk is not None:
        talk.end()
