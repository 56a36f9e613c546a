"""What one rank tells of itself, and when its threads end; test_lost_ranks.py has real ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # there at run time

from qsr_engine.membership.beats import Beat, News, Progress, Talk, Word
from qsr_engine.membership.halt import Halt
from qsr_engine.membership.watchdog import Watchdog

LIMIT = 60.0  # seconds, for anything that is waited for


def until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)  # between looks at what a thread does


def test_a_process_that_ends_waits_for_nobody() -> None:
    """Else it would look as if somebody waited for this very rank, which has ended: everybody would hear it is lost."""
    store, progress = HashStore(), Progress(1)
    talk = Talk(store, progress, News(), ranks=2, interval=LIMIT, judge=lambda beats: Word())
    progress.state, progress.step = "running", 1
    talk.end()
    beat = Beat.decode(store.get("beat 1"))
    assert (beat.state, beat.step, beat.waiting) == ("ended", 1, False)


def test_who_stands_after_a_step_waits_for_others() -> None:
    store, ready = HashStore(), threading.Event()
    news, where, ended = News(), [], []

    def main() -> None:
        progress = Progress(1)
        where.append(progress)
        ready.set()
        ended.append(Halt(progress, news, ranks=2, interval=0.1, check=lambda: None).at(3))

    thread = threading.Thread(target=main)
    thread.start()
    assert ready.wait(LIMIT)
    until(lambda: where[0].main_thread()[0])
    assert where[0].main_thread()[1].startswith("halt.py, line ")
    Talk(store, where[0], news, ranks=2, interval=LIMIT, judge=lambda beats: Word()).end()
    beat = Beat.decode(store.get("beat 1"))
    assert beat.halted == 3
    news.learn(target=(3, True))
    thread.join(LIMIT)
    assert ended == [True]


@pytest.mark.parametrize("rank", [0, 1])
def test_threads_end_with_the_watchdog(rank: int) -> None:
    store, before = HashStore(), set(threading.enumerate())
    watchdog = Watchdog(store, rank, 2, 60.0)
    assert len(set(threading.enumerate()) - before) == 2
    del watchdog
    until(lambda: not set(threading.enumerate()) - before)
    assert Beat.decode(store.get(f"beat {rank}")).state == "closed"


def test_a_step_of_another_engine_is_progress() -> None:
    """Else the ranks of a GAN would be lost as soon as one of its engines trains for longer than the limit."""
    one, other = (Watchdog(HashStore(), 1, 2, 60.0) for _ in range(2))
    alone = Watchdog(None, 0, 1, None)
    one.done(1, 0)
    before = other._progress.beat(1, heard=False).moves
    one.done(2, 1)
    for watchdog in (one, other):
        beat = watchdog._progress.beat(2, heard=False)
        assert (beat.moves, beat.where) == (before + 1, "in round 1, after step 2 of engine 1 of 2")
    assert other._progress.beat(3, heard=False).step == 0, "each has its own"
    one.close()
    other.done(7, 3)
    assert other._progress.where == "in round 3, after step 7"
    alone.done(9, 9)
    assert other._progress.where == "in round 3, after step 7"
    with other.busy(), other.busy():
        assert other._progress.beat(4, heard=False).busy
    last = other._progress.beat(5, heard=False)
    assert (last.busy, last.moves) == (False, before + 7)
    other.close()


@pytest.mark.parametrize(
    ("source", "waits"),
    [
        ("distributed_c10d.py", True),
        ("elastic/multiprocessing/api.py", False),  # a notebook's ranks are forks inside it
        ("launcher/api.py", False),
        ("checkpoint/filesystem.py", False),  # writes
        ("algorithms/_checkpoint/checkpoint_wrapper.py", False),  # computes
    ],
)
def test_who_waits_for_others(source: str, waits: bool) -> None:
    space: dict[str, Callable[..., tuple[bool, str]]] = {}
    path = str(Path(dist.__file__).parent / source)
    exec(compile("def run(inside): return inside()", path, "exec"), space)
    assert space["run"](Progress(0).main_thread)[0] is waits


def test_the_words_of_rank_0_come_as_they_were_said() -> None:
    for word in (Word(), Word(stop=True, verdict="lost", target=(3, True), all_heard=True, beat=Beat(5).encode())):
        assert Word.decode(word.encode().encode()) == word
