"""How much memory a way needs: this process's anonymous memory, sampled, or what torch's profiler counts."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def anonymous() -> float:
    """This process's anonymous memory in MB (1e6 bytes)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status has no RssAnon")


def release() -> None:
    """Give back to the system what malloc keeps."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def peak_memory(peak: list[float]) -> Iterator[None]:
    """Appends the highest anonymous memory in MB while the context runs."""
    stop, seen = threading.Event(), [anonymous()]

    def sample() -> None:
        while not stop.wait(0.001):
            seen.append(anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        peak.append(max(*seen, anonymous()))


def most_held(profiler: Any, mark: str) -> tuple[int, int]:
    """From a torch profile: the most bytes held above its beginning, and inside `mark` above that one's beginning."""
    events = profiler.profiler.kineto_results.events()
    marks = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == mark]
    begin, end = marks[0]
    most = kept = at_begin = above = 0
    for when, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        kept += change
        most = max(most, kept)
        if when < begin:
            at_begin = kept
        elif when <= end:
            above = max(above, kept - at_begin)
    return most, above
