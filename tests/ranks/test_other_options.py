"""A run that goes on with another clipping or other options of its optimizer: what the log says is what happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support import training
from tests.support.combinations import pretend_fp16
from tests.support.heard import messages_of_this_job
from tests.support.pool import Processes

QSR: dict[str, Any] = {
    "strategy": "constant",
    "h_base": 2,
    "total_steps": 6,
    "lr": {"schedule": "constant", "peak": 0.125},
}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 4}}
ENGINES: list[dict[str, Any]] = [{"stage": 0, **BF16}, {"stage": 1, **FP16}, {"stage": 3}, {}]  # {}: FSDP


def sgd(momentum: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.125, momentum=momentum)


def start(engine: dict[str, Any], clip: float, momentum: float) -> Any:
    import qsr_engine

    config = {"train_micro_batch_size_per_gpu": training.BATCH, "gradient_clipping": clip, "qsr": QSR}
    if not engine:
        model = training.make_model(torch.float32)
        return qsr_engine.initialize_fsdp(model=model, optimizer=sgd(momentum), config=config)
    zero = {"zero_optimization": {"stage": engine["stage"]}, "zero_allow_untested_optimizer": True}
    precision = {key: block for key, block in engine.items() if key != "stage"}
    if "fp16" in precision:  # the window and the smallest scale are options, the scale is the position
        precision = {"fp16": {**precision["fp16"], "loss_scale_window": int(1000 * clip)}}
    return qsr_engine.initialize(
        model=training.make_model(torch.float32), optimizer=sgd(momentum), config={**config, **zero, **precision}
    )[0]


def take_step(engine: Any) -> None:
    import torch.distributed as dist

    dtype = getattr(next(engine.module.parameters()), "dtype", torch.float32)
    inputs, targets = training.batch(dist.get_rank(), engine.local_steps.step, dtype=dtype)
    engine.backward(100 * training.loss(engine(inputs).float(), targets.float()))
    engine.step()


def masters(engine: Any) -> torch.Tensor:
    return torch.cat([master.detach().double().reshape(-1) for master in engine._driver.replica.masters()])


def options_job(folder: str) -> list[dict[str, Any]]:
    """Saved with clipping to 1 and a momentum of 0.9; resumed with 0.5 and none."""
    pretend_fp16()
    found = []
    for number, kind in enumerate(ENGINES):
        said = messages_of_this_job()
        saved = start(kind, 1.0, 0.9)
        for _ in range(2):
            take_step(saved)
        saved.save_checkpoint(f"{folder}/{number}")
        other = start(kind, 0.5, 0.0)
        other.load_checkpoint(f"{folder}/{number}")
        before = masters(other)
        take_step(other)
        scaler = getattr(other.optimizer, "loss_scaler", None)
        found.append(
            {
                "moved": float((masters(other) - before).norm()),
                "said": list(said),
                "scaler": [getattr(scaler, name, None) for name in ("scale_window", "cur_iter")],
            }
        )
    return found


def test_what_the_log_says_is_what_happens(processes: Processes, tmp_path: Path) -> None:
    """Without momentum a step moves the masters by the rate times the clipped norm, whatever was saved."""
    first, _ = processes.run(options_job, folder=str(tmp_path))
    for kind, found in zip(ENGINES, first, strict=True):
        assert abs(found["moved"] - 0.125 * 0.5) < 1e-4, kind
        said = "\n".join(found["said"])
        assert "gradient_clipping was 1.0 and is 0.5" in said
        assert "another configuration: parameter group 0: momentum was 0.9 and is 0.0" in said
    assert first[1]["scaler"] == [500, 3], "the window as configured, the position as saved"
