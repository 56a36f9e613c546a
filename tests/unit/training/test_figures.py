"""Figures of a run that goes on from a checkpoint. Engine, monitor and time are stubs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsr_engine.records.records import Record
from qsr_engine.training.figures import Clock, Figures

BATCH = 32


class Stub:
    """A run at a step, and what it told its monitor."""

    def __init__(self, step: int, now: list[float]) -> None:
        costs: dict[str, Any] = {"averagings": 0, "bytes_sent": 0, "parallel_bytes_so_far": 0, "seconds_waiting": 0.0}
        costs |= {"skipped_steps_of_all_workers": 0, "left_out": {}}
        self.state = SimpleNamespace(step=step, relative_distance=None, costs=SimpleNamespace(**costs), **costs)
        engine: Any = SimpleNamespace(local_steps=self.state, seconds_averaging=None, device=torch.device("cpu"))
        self.told: list[Record] = []
        monitor: Any = SimpleNamespace(log=self.told.append)
        self.clock = Clock(started=now[0])
        self.figures = Figures(engine, self.clock, monitor, BATCH)

    def log(self, step: int) -> Record:
        self.state.step = step
        self.figures.add_loss(torch.tensor(1.0))
        known = {"round": 0, "period": 1, "lr": 0.1}
        self.figures.log(images_seen=step * BATCH, skipped_samples=0, **known)
        return self.told[-1]


@pytest.mark.parametrize("older", [False, True])
def test_the_first_record_after_a_resumption_counts_the_steps_before_it_too(
    monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """A record after step 8, a checkpoint after step 11, and the next record after step 12; a step takes 2 s."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    before = Stub(0, now)
    now[0] += 16
    assert before.log(8).images_per_second == BATCH / 2
    now[0] += 6
    before.state.step = 11
    state = {**before.clock.state_dict(), **before.figures.state_dict(), "images_seen": 11 * BATCH}
    if older:
        del state["logged"][3]
    now[0] += 1000
    after = Stub(11, now)
    after.clock.load_state_dict(state)
    after.figures.load_state_dict(state)
    now[0] += 2
    assert after.log(12).images_per_second == BATCH / 2
