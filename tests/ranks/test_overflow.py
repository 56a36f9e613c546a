"""fp16 that overflows on some workers, and clipping of each worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import training
from tests.support.combinations import (
    Combination,
    assert_like_reference,
    expected,
    start,
    train_job,
    whole_masters,
    whole_parameters,
)
from tests.support.counting import collectives_across_workers
from tests.support.heard import messages_of_this_job
from tests.support.pool import Processes
from tests.support.training import QSR


def overflow_job(
    combination: Combination, qsr: dict[str, Any], at: list[int], config: dict[str, Any]
) -> dict[str, Any]:
    """The gradients of the first worker overflow at the given steps."""
    import torch.distributed as dist

    said = messages_of_this_job()
    engine = start(combination, qsr, **config)
    seen, counts = [], []
    while not engine.local_steps.finished:
        step = engine.local_steps.step
        before = collectives_across_workers(qsr["worker_size"])
        seen.append((engine.local_steps.period, engine.get_lr()[0]))
        inputs, targets = training.batch(dist.get_rank(), step, dtype=torch.float16)
        loss = training.loss(engine(inputs), targets)
        if step in at and dist.get_rank() == 0:
            loss = loss * float("inf")
        engine.backward(loss)
        boundary = engine.step()
        counts.append((boundary, collectives_across_workers(qsr["worker_size"]) - before))
    state = engine.local_steps
    return {
        "parameters": whole_parameters(engine),
        "masters": whole_masters(engine),
        "seen": seen,
        "counts": counts,
        "said": said,
        "skipped": (state.costs.skipped_steps, state.costs.skipped_steps_of_all_workers, engine.skipped_steps),
        "global_steps": engine.global_steps,
    }


@pytest.mark.fast_cells(3, of=4)
@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_on_one_worker(processes: Processes, stage: int, worker_size: int) -> None:
    """That worker skips its update, and nothing else: bit for bit as the reference, with clipping off, and with no
    collective across workers; the steps count, the learning rate and the period stay agreed, the skip is logged."""
    combination = Combination(stage, "fp16", "AdamW")
    qsr = {**QSR, "worker_size": worker_size}
    at = [3, 8, 9]
    results = processes.run(overflow_job, ranks=2 * worker_size, combination=combination, qsr=qsr, at=at, config={})
    oracle = expected(combination, qsr, workers=2, skipped=lambda worker, step: worker == 0 and step in at)
    assert_like_reference(combination, results, oracle)
    for rank, result in enumerate(results):
        assert result["seen"] == results[0]["seen"]
        assert result["global_steps"] == 12
        assert [count for boundary, count in result["counts"] if not boundary] == [0] * 7
        mine = 3 if rank < worker_size else 0
        assert result["skipped"] == (mine, 3, mine)
        assert len(result["said"]) == (3 if rank == 0 else 0), "the first rank of the worker says it"
    assert "step 3: the gradients of worker 0 overflowed, so it skipped the update" in results[0]["said"][0]


def test_an_overflow_does_not_stop_the_scheduler(processes: Processes) -> None:
    """DeepSpeed leaves its scheduler's step out as well; then the workers' learning rates would part."""
    qsr = {key: value for key, value in QSR.items() if key != "lr"}
    qsr = {**qsr, "strategy": "constant", "alpha": None, "worker_size": 1}
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.04, "warmup_num_steps": 9, "warmup_type": "linear"}
    results = processes.run(
        overflow_job,
        combination=Combination(2, "fp16", "SGD"),
        qsr=qsr,
        at=[2, 5],
        config={"scheduler": {"type": "WarmupLR", "params": params}, "gradient_clipping": 0.1},
    )
    assert results[0]["seen"] == results[1]["seen"]
    assert len({lr for _, lr in results[0]["seen"]}) > 8
    assert torch.equal(results[0]["parameters"], results[1]["parameters"])


def dynamic_job(combination: Combination) -> list[float]:
    """The loss scale of this worker after an overflow on worker 0."""
    import torch.distributed as dist

    config = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}}
    engine = start(combination, {**QSR, "worker_size": 1}, **config)
    scales = []
    while not engine.local_steps.finished:
        inputs, targets = training.batch(dist.get_rank(), engine.local_steps.step, dtype=torch.float16)
        loss = training.loss(engine(inputs), targets)
        engine.backward(loss * float("inf") if engine.local_steps.step == 4 and dist.get_rank() == 0 else loss)
        engine.step()
        scales.append(float(engine.optimizer.loss_scale))
    return scales


def test_every_worker_has_a_dynamic_loss_scale_of_its_own(processes: Processes) -> None:
    first, second = processes.run(dynamic_job, combination=Combination(2, "fp16", "SGD"))
    assert first == [16.0] * 4 + [8.0] * 8
    assert second == [16.0] * 12


@pytest.mark.fast_cells(3)
@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize(
    "combination",
    [*(Combination(stage, "fp32", "SGD") for stage in (1, 2, 3)), Combination(2, "fp32", "offloaded SGD")],
    ids=str,
)
def test_clipping_is_per_worker_and_silent(processes: Processes, combination: Combination, worker_size: int) -> None:
    """DeepSpeed adds 1e-6 to the norm as torch does, but divides in another order: 1e-6 relative of each of 12 steps of
    at most 0.05 times the norm of 0.1."""
    qsr = {**QSR, "worker_size": worker_size}
    job: dict[str, Any] = {"combination": combination, "qsr": qsr, "config": {"gradient_clipping": 0.1}}
    results = processes.run(train_job, ranks=2 * worker_size, **job)
    oracle, unclipped = (expected(combination, qsr, workers=2, clip=clip) for clip in (0.1, 0.0))
    torch.testing.assert_close(results[0]["masters"], oracle, rtol=0, atol=1e-6)
    assert (oracle - unclipped).abs().max() > 1e-3, "the clipping was meant to matter"
    for result in results:
        assert torch.equal(result["masters"], results[0]["masters"])
        assert [count for boundary, count in result["counts"] if not boundary] == [0] * 7
