"""A whole run of the DeepSpeed engine in rounds of unequal length, and what the reference gives for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.support import reference, training

LR = {
    "sgd": {"schedule": "cosine", "peak": 0.05, "min": 1e-3, "warmup_steps": 3},
    "adamw": {"schedule": "cosine", "peak": 0.02, "min": 1e-4, "warmup_steps": 3},
}


# Rounds of unequal length: h_base first, longer ones as lr falls, and a last one that is cut.
STRATEGIES: dict[str, dict[str, Any]] = {
    "constant": {"strategy": "constant", "h_base": 4},
    "qsr": {"strategy": "qsr", "h_base": 2, "alpha": 0.045},
    "parallel": {"strategy": "parallel"},
    "post_local": {"strategy": "post_local", "h_base": 3, "switch_step": 7},
    "swap": {"strategy": "swap", "h_base": 3, "switch_step": 8},
}


STEPS = 22


def block(strategy: str, optimizer: str, **more: Any) -> dict[str, Any]:
    return {**STRATEGIES[strategy], "total_steps": STEPS, "lr": LR[optimizer], **more}


def train(
    qsr: dict[str, Any],
    optimizer: str,
    accumulation: int = 1,
    dtype: torch.dtype = torch.float64,
    compute_dtype: torch.dtype | None = None,
    ds_config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A job: train on this rank's batches; give back the parameters and what local_steps saw."""
    import torch.distributed as dist

    import qsr_engine

    model = training.make_model(dtype)
    engine, *_ = qsr_engine.initialize(
        model=model,
        optimizer=partial(training.make_optimizer, optimizer),
        config={
            "train_micro_batch_size_per_gpu": training.BATCH,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,
            "qsr": qsr,
            **(ds_config or {}),
        },
    )
    rank, ends, distances = dist.get_rank(), [], []
    while not engine.local_steps.finished:
        step = engine.local_steps.step
        for micro in range(accumulation):
            inputs, targets = training.batch(rank, step, micro, compute_dtype or dtype)
            engine.backward(training.loss(engine(inputs), targets))
            boundary = engine.step()
            assert boundary is False or micro == accumulation - 1
        if boundary:
            ends.append(engine.local_steps.step)
            distances.append(engine.local_steps.relative_distance)
    parameters = training.flat(model.parameters())
    masters = (
        training.flat(engine.local_steps.averager.buckets)[: len(parameters)] if ends and qsr_is_local(qsr) else None
    )
    return {"parameters": parameters, "masters": masters, "ends": ends, "distances": distances}


def qsr_is_local(qsr: dict[str, Any]) -> bool:
    return bool(qsr["strategy"] != "parallel")


def expected(
    qsr: dict[str, Any],
    optimizer: str,
    workers: int,
    accumulation: int = 1,
    worker_size: int = 1,
    clip: float = 0.0,
    dtype: torch.dtype = torch.float64,
    compute_dtype: torch.dtype | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The same from the reference."""

    def batches(rank: int, step: int) -> list[reference.Batch]:
        return [training.batch(rank, step, micro, compute_dtype or dtype) for micro in range(accumulation)]

    optimizer_of = partial(training.make_optimizer, optimizer)
    models, distances = reference.simulate(
        partial(training.rounded_model, dtype, compute_dtype),
        optimizer_of,
        batches,
        qsr,
        workers,
        clip,
        compute_dtype,
        worker_size=worker_size,
        **more,
    )
    ends = [step for step, _ in reference.boundaries(qsr)]
    return {"parameters": training.flat(models[0].parameters()), "ends": ends, "distances": distances}


def averaging(qsr: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**qsr, "averaging": options}


def assert_all_equal(results: list[dict[str, Any]]) -> None:
    """Invariants 2 and 3: after the last boundary, every rank has the same bits and saw the same rounds."""
    for result in results[1:]:
        assert torch.equal(result["parameters"], results[0]["parameters"])
        assert result["ends"] == results[0]["ends"]
