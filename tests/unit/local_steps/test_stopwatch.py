"""Seconds of a device. There is no GPU here, so its events are stand-ins that pass when the test says so."""

from __future__ import annotations

import time

import pytest
import torch

from qsr_engine.local_steps.stopwatch import Stopwatch


def test_on_a_cpu_it_is_the_clock_on_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 3.5, 10.0, 10.25, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            pass
    assert watch.take() == 2.75
    assert watch.take() == 0.0
    with pytest.raises(KeyError), watch.running():
        raise KeyError
    assert watch.take() == 0.0, "what failed does not count"


class Event:
    """Stands in for torch.cuda.Event: each is recorded 3 ms after the one before."""

    made: list[Event] = []
    passed = 0  # so many have

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.made.append(self)

    def query(self) -> bool:
        return self.made.index(self) < Event.passed

    def elapsed_time(self, other: Event) -> float:
        assert other.query(), "torch raises an error then"
        return 3.0 * (self.made.index(other) - self.made.index(self))


def test_on_a_gpu_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        with watch.running():
            pass
    assert watch.take() == 0.0
    Event.passed = 5  # the third's end is still to come
    assert watch.take() == pytest.approx(0.006)
    Event.passed = 6
    assert watch.take() == pytest.approx(0.003)
    assert watch.take() == 0.0
