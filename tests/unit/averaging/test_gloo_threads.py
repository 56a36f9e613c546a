"""What a process waits for at its end; test_overlap.py has the end itself, after a real averaging."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsr_engine.averaging.gloo_threads import await_idle_threads

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are looked up in Linux's /proc")


@contextmanager
def a_thread(name: str, busy_seconds: float) -> Iterator[list[float]]:
    """One that computes for so long without the interpreter's lock, then waits; yields the time when it was done."""
    begun, leave, finished = threading.Event(), threading.Event(), list[float]()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        end = time.monotonic() + busy_seconds
        begun.set()
        while time.monotonic() < end and not leave.is_set():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000)
        finished.append(time.monotonic())
        leave.wait()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    try:
        yield finished
    finally:
        leave.set()
        thread.join()


def test_busy_threads_are_waited_for() -> None:
    with a_thread("qsr-idle", 0), a_thread("qsr-idle", 0.3) as finished:
        assert await_idle_threads("qsr-idle", 60)
        assert finished, "it was still computing"


def test_no_end_is_put_off_for_ever_or_by_another_thread() -> None:
    with a_thread("qsr-busy", 100):
        assert not await_idle_threads("qsr-busy", 0.1)
        assert await_idle_threads("qsr-other", 0)
