"""Seconds that steps spend on averaging, true on a GPU too, where the host is ahead of the device."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up the seconds of what runs on a device. The host never waits for it.

    On a CPU they are wall-clock seconds. On a GPU they lie between two events on the stream of the steps, which are
    read when both have passed.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.cuda.Event.html
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._passed = 0.0
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside counts, unless it raises."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._under_way.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._passed += time.perf_counter() - started

    def take(self) -> float:
        """The seconds since take() was last called, of what the device has done by now."""
        while self._under_way and self._under_way[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._under_way.popleft()
            self._passed += begin.elapsed_time(end) / 1e3
        passed, self._passed = self._passed, 0.0
        return passed
