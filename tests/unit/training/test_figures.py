"""Figures of a run that goes on from a checkpoint. Engine, monitor and time are stubs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsr_engine.data.device import MixUp
from qsr_engine.records.records import Record, WorkersRecord
from qsr_engine.training.figures import Clock, Figures
from qsr_engine.training.images import accuracy_of

BATCH = 32


class Stub:
    """A run at a step, and what it told its monitor."""

    def __init__(self, step: int, now: list[float]) -> None:
        costs: dict[str, Any] = {"averagings": 0, "bytes_sent": 0, "parallel_bytes_so_far": 0, "seconds_waiting": 0.0}
        costs |= {"averagings_percent": 0.0, "bytes_percent": 0.0}
        costs |= {"skipped_steps_of_all_workers": 0, "left_out": {}, "clipped": {}, "late": 0}
        qsr = SimpleNamespace(worker_size=1)
        self.state = SimpleNamespace(
            step=step, qsr=qsr, relative_distance=None, largest_z=None, costs=SimpleNamespace(**costs), **costs
        )
        engine: Any = SimpleNamespace(
            local_steps=self.state, seconds_averaging=None, device=torch.device("cpu"), measured=dict
        )
        self.told: list[Record] = []
        self.told_by_workers: list[WorkersRecord] = []
        monitor: Any = SimpleNamespace(log=self.told.append, log_workers=self.told_by_workers.append)
        self.clock = Clock(started=now[0])
        self.figures = Figures(engine, self.clock, monitor, BATCH)

    def log(self, step: int) -> Record:
        self.state.step = step
        self.figures.add(torch.tensor(1.0), torch.tensor(50.0))
        known = {"round": 0, "period": 1, "lr": 0.1}
        self.figures.log(samples_seen=step * BATCH, skipped_samples=0, **known)
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


def test_workers_tell_at_the_same_steps_whether_or_not_a_run_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A boundary after every third step, a record every four; the accuracy of a step is its number."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("qsr_engine.training.figures.all_gather_flat", lambda told, mine: told.copy_(mine))

    def run(stops: list[int]) -> tuple[list[tuple[int, list[float] | None]], float | None]:
        told, state, done = [], None, 0
        for stop in [*stops, 15]:
            part = Stub(done, [0.0])
            if state is not None:
                part.figures.load_state_dict(state)
            for step in range(done + 1, stop + 1):
                part.state.step = done = step
                part.figures.add(torch.tensor(1.0), torch.tensor(float(step)))
                due = part.figures.workers_are_due(4)
                if step % 3 == 0 and (due or step == stop):
                    part.figures.log_workers(0, due=due)
            told += [(record.step, record.accuracy) for record in part.told_by_workers]
            state = part.figures.state_dict()
        return told, part.figures.train_accuracy

    undisturbed, accuracy = run([])
    assert undisturbed == [(6, [3.5]), (9, [8.0]), (12, [11.0]), (15, [14.0])]
    assert run([7]) == run([8]) == run([2, 11]) == (undisturbed, accuracy)
    stopped = run([3])  # on a boundary, where the run that stops tells too
    assert stopped == ([(3, [2.0]), *undisturbed], accuracy)


def test_steps_count_alike_however_many_micro_batches_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member's number of micro-batches changes at boundaries."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    run = Stub(0, [0.0])
    run.figures.add(torch.tensor(1.0), torch.tensor(10.0), last=False)
    run.figures.add(torch.tensor(3.0), torch.tensor(30.0))
    record = run.log(2)  # after a step with a loss of 1 and 50 % in one micro-batch
    assert (record.loss, record.train_accuracy) == (1.5, 35.0)


def test_a_mixed_picture_counts_by_the_share_of_the_class_that_is_answered() -> None:
    """As the authors count: lambda and 1 - lambda for the classes of the two pictures that were mixed."""
    torch.manual_seed(0)
    labels, scores = torch.tensor([0, 1, 2, 2, 4, 0]), torch.randn(6, 5)
    answers = scores.argmax(1)
    assert accuracy_of(scores, labels).item() == pytest.approx(100 * (answers == labels).sum().item() / 6)
    _, shares = MixUp(0.5, 5)(torch.zeros(6, 3, 2, 2), labels)
    other = labels.roll(1, 0)
    share = next(row[label].item() for row, label, o in zip(shares, labels, other, strict=True) if label != o)
    right = share * (answers == labels).sum() + (1 - share) * (answers == other).sum()
    assert right > 0
    assert accuracy_of((scores, None), shares).item() == pytest.approx(100 * right.item() / 6)
