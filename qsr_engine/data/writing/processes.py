"""Run jobs in several processes, and leave no process behind.

The processes are started anew ("spawn"), not forked: a fork copies locks that another thread holds. They end when the
process that started them does, even when that was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import c_byte
from typing import TypeVar

from qsr_engine.data.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")

_stop: c_byte | None = None  # of a process that run_jobs() started: 1 when nobody wants its result any more


class UnwantedError(Exception):
    """Nobody wants the result of this job any more: another one has failed, or the command was interrupted."""


def usable_cores() -> int:
    """The cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], processes: int, take: Callable[[Result], None]
) -> None:
    """Call take(function(job)) for every job, in the order in which they finish.

    With more than one process, function, jobs and results are pickled, and `take` is called in this process. Jobs are
    taken from the iterable as they are needed. When a job raises, the others are stopped and its error is raised.

    Raises:
        DataError: a process was killed.
    """
    if processes == 1:
        for job in jobs:
            take(function(job))
        return
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue(c_byte, 0)  # no lock: a process that is killed could hold it for ever
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(stop,))
    waiting: set[Future[Result]] = set()
    try:
        for job in jobs:
            with _without_interrupts():  # it starts a process, which has this mask too
                waiting.add(pool.submit(function, job))
            if len(waiting) > processes:  # one job more than processes, so that none of them waits for this one
                waiting = _take_finished(waiting, take)
        while waiting:
            waiting = _take_finished(waiting, take)
    except BrokenProcessPool as error:
        raise DataError(
            "one of the processes was killed or did not start: with too little memory, take fewer with --processes; in "
            'a script of your own, call this under `if __name__ == "__main__":`'
        ) from error
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


def check_wanted() -> None:
    """Raises UnwantedError in a process of run_jobs() whose result nobody wants any more. Long jobs call it often."""
    if _stop is not None and _stop.value:
        raise UnwantedError


def _take_finished(waiting: set[Future[Result]], take: Callable[[Result], None]) -> set[Future[Result]]:
    done, left = wait(waiting, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=lambda future: future.exception() is not None):  # what is finished is taken first
        take(future.result())
    return left


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A terminal sends Ctrl-C to all processes; this one receives it, a moment later, and stops the others.

    SIGTERM is another matter: the pool sends it to its processes when one of them was killed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(stop: c_byte) -> None:
    """Run once in each process."""
    global _stop
    _stop = stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
