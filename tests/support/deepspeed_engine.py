"""The DeepSpeed engine on the small regression task: to start it, to take a step, to count what crosses workers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.support import training
from tests.support.counting import collectives_across_workers

STAGE_1: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


def start(qsr: dict[str, Any], model: nn.Module | None = None, **config: Any) -> Any:
    import qsr_engine

    model = model or training.make_model(torch.float32)
    return qsr_engine.initialize(
        model=model,
        optimizer=partial(training.make_optimizer, "sgd"),
        config={"train_micro_batch_size_per_gpu": training.BATCH, "gradient_clipping": 1.0, "qsr": qsr, **config},
    )[0]


def step(engine: Any, number: int | None = None) -> bool:
    import torch.distributed as dist

    number = engine.local_steps.step if number is None else number
    dtype = next(engine.module.parameters()).dtype
    inputs, targets = training.batch(dist.get_rank(), number, dtype=dtype)
    engine.backward(training.loss(engine(inputs), targets))
    return bool(engine.step())


def count_job(qsr: dict[str, Any], config: dict[str, Any], clip: float) -> list[tuple[bool, int]]:
    engine = start(qsr, **{**config, "gradient_clipping": clip})
    counts = []
    while not engine.local_steps.finished:
        before = collectives_across_workers(qsr.get("worker_size", 1))
        boundary = step(engine)
        counts.append((boundary, collectives_across_workers(qsr.get("worker_size", 1)) - before))
    return counts
