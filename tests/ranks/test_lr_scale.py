"""Parameter groups with an lr_scale, as layer-wise decay makes them, in both engines: rates, H, monitors, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import reference, training
from tests.support.deepspeed_engine import step
from tests.support.pool import Processes
from tests.support.training import QSR

KINDS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "deepspeed": {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
}


def start(kind: str, scales: list[float], folder: str) -> Any:
    import qsr_engine

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        given = list(parameters)
        shares = [{"params": given[2 * n : 2 * n + 2], "lr_scale": scale} for n, scale in enumerate(scales)]
        return torch.optim.SGD(shares, lr=0.1, momentum=0.9)

    config = {
        "train_micro_batch_size_per_gpu": training.BATCH,
        "gradient_clipping": 0.0,
        "qsr": QSR,
        "tensorboard": {"enabled": bool(folder), "output_path": folder, "job_name": kind},
        **KINDS[kind],
    }
    model = training.make_model(torch.float32)
    if kind == "fsdp":
        return qsr_engine.initialize_fsdp(model=model, optimizer=optimizer, config=config)
    return qsr_engine.initialize(model=model, optimizer=optimizer, config=config)[0]


def job(folder: str) -> dict[str, Any]:
    """Five steps, of which the last is inside a round, a checkpoint, and the rest by an engine with other scales."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        rates, periods = [], []
        for scales, end in (([0.25, 0.5, 1.0], 5), ([0.2, 1.0, 1.0], 12)):
            engine = start(kind, scales, folder)
            if end == 12:
                engine.load_checkpoint(f"{folder}/{kind}-checkpoints")
            while engine.local_steps.step < end:
                rates.append(engine.get_lr())
                periods.append(engine.local_steps.period)
                step(engine)
            if end == 5:
                engine.save_checkpoint(f"{folder}/{kind}-checkpoints")
            engine.destroy()
        found[kind] = rates, periods
    return found


def test_groups_with_a_scale(processes: Processes, tmp_path: Path) -> None:
    found = processes.run(job, folder=str(tmp_path))[0]
    schedule = [reference.learning_rate(QSR["lr"], number, 12) for number in range(13)]
    for kind, (rates, periods) in found.items():
        scales = [[0.25, 0.5, 1.0]] * 5 + [[0.2, 1.0, 1.0]] * 7
        expected = [[scale * rate for scale in row] for row, rate in zip(scales, schedule, strict=False)]
        assert [pytest.approx(row) for row in expected] == rates, kind
        assert periods == [2] * 8 + [4] * 4, "as without scales"
        shown = EventAccumulator(str(tmp_path / kind)).Reload().Scalars("Train/Samples/lr")
        ends = {round(event.step / (2 * training.BATCH)): event.value for event in shown}
        assert {2, 4, 6, 8, 12} <= set(ends)
        late = 0 if kind == "fsdp" else 1  # DeepSpeed shows the rate of the step, FSDP's monitor that of the next
        assert ends == {at: pytest.approx(schedule[at - late], rel=1e-5) for at in ends}, kind


def other_on_rank_1_job(scales: list[list[float]]) -> None:
    import os

    from qsr_engine.membership.facts import AgreementError

    for kind in KINDS:
        with pytest.raises(AgreementError, match=r"options.group 0.lr_scale: 0.25 on rank 0; -1.0 on rank 1"):
            start(kind, scales[int(os.environ["RANK"])], "")


def test_a_scale_that_is_another_on_one_rank_is_told_to_all(processes: Processes) -> None:
    """Also one that is no factor there: the others do not wait for a rank that has refused it."""
    processes.run(other_on_rank_1_job, seconds=40, scales=[[0.25, 0.5, 1.0], [-1.0, 0.5, 1.0]])
