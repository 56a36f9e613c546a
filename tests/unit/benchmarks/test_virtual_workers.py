"""K workers on one device are the reference's K workers, and a run in pieces is the same run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import virtual_workers
from benchmarks.virtual_workers import OutOfTimeError, Plan, VirtualWorkers, accuracy, augmented
from qsr_engine.config.qsr import QSRConfig
from tests.support import reference, training

DILOCO = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
CASES: dict[str, dict[str, Any]] = {
    "qsr": {},
    "outer": {"outer": {**DILOCO, "unit_steps": 3}},
    "parallel": {"strategy": "parallel", "alpha": None, "h_base": 1},
    "post_local": {"strategy": "post_local", "alpha": None, "switch_step": 5},
}


def workers_of(qsr: dict[str, Any]) -> VirtualWorkers:
    return VirtualWorkers(
        lambda: training.make_model(torch.float64),
        lambda parameters: training.make_optimizer("adamw", parameters),
        QSRConfig(**qsr),
        2,
        lambda model, batch: training.loss(model(batch[0]), batch[1]),
    )


def take_steps(workers: VirtualWorkers, steps: int) -> None:
    for _ in range(steps):
        workers.step([training.batch(worker, workers.rounds.step) for worker in range(2)])


@pytest.mark.parametrize("name", CASES)
def test_they_are_the_references_also_from_any_step_on(name: str) -> None:
    """In fp64: an outer step writes its formula in another order, and its factors have 9 digits."""
    qsr = {**training.QSR, **CASES[name]}
    told = {"outer": DILOCO, "outer_unit": 3} if name == "outer" else {}
    oracle, _ = reference.simulate(
        training.make_model,
        lambda parameters: training.make_optimizer("adamw", parameters),
        lambda rank, step: [training.batch(rank, step)],
        qsr,
        2,
        **told,  # type: ignore[arg-type]
    )
    whole = workers_of(qsr)
    take_steps(whole, 12)
    found = training.flat(whole.models[-1].parameters())
    tolerance = 1e-8 if name == "outer" else 1e-14
    torch.testing.assert_close(found, training.flat(oracle[0].parameters()), rtol=tolerance, atol=tolerance)
    for step in range(1, 12):
        first, second = workers_of(qsr), workers_of(qsr)
        take_steps(first, step)
        second.load_state_dict(first.state_dict())
        take_steps(second, 12 - step)
        assert torch.equal(training.flat(second.models[-1].parameters()), found), step


def make_pictures(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(12):
                pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.jpg")


def test_a_run_in_pieces_of_a_step_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path)
    ends: list[torch.Tensor] = []
    train = virtual_workers._train

    def noted(plan: Plan, workers: VirtualWorkers, *rest: Any) -> None:
        train(plan, workers, *rest)
        ends.append(training.flat(workers.models[1].parameters()))

    monkeypatch.setattr(virtual_workers, "_train", noted)
    pieces = 1
    for name, until in (("whole", time.monotonic() + 100), ("pieces", 0.0)):
        plan = Plan("resnet", tmp_path, tmp_path / name, torch.device("cpu"), 2, 2, 2, 12, True, until)
        while True:
            try:
                result = accuracy(plan, "qsr", 1.0, 0, "test")
                break
            except OutOfTimeError:
                pieces += 1
        assert accuracy(plan, "qsr", 1.0, 0, "test") == result, "what has ended is kept"
    assert pieces == 6, "a step each"
    assert torch.equal(*ends)


def test_pictures_move_by_at_most_four_pixels() -> None:
    pixels = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
    pixels[:, :, 10, 20] = 255
    places = augmented(pixels, torch.Generator().manual_seed(0))[:, 0].flatten(1).argmax(1)
    rows, columns = places // 32, places % 32
    assert rows.min() == 6
    assert rows.max() == 14
    assert {int(column) for column in columns} == {*range(16, 25), *range(7, 16)}


def main_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> None:
    words = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", ["virtual_workers", *words])
    virtual_workers.main()


def test_pictures_that_fill_no_step_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main_with(monkeypatch, tmp_path, "--samples", "512")
    assert "--samples 512 fill no step of 8 workers with a batch of 128; write at least 1024" in capsys.readouterr().err


def test_runs_of_another_length_are_not_taken_for_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_workers, "tuned", lambda plan, strategy: {1.0: 50.0})
    monkeypatch.setattr(virtual_workers, "accuracy", lambda *_: {"accuracy": 50.0, "averagings_percent": 25.0})
    main_with(monkeypatch, tmp_path, "--epochs", "1")
    main_with(monkeypatch, tmp_path, "--epochs", "1", "--model", "vit", "--seconds", "5")
    with pytest.raises(SystemExit, match=r"runs in which epochs was 1 and is 200; write the same, or another --runs"):
        main_with(monkeypatch, tmp_path)
