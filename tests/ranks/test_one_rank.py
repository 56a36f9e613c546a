"""One worker: what a run of it says, and leaving out DeepSpeed's reduction over one rank (which changes no bit)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import training
from tests.support.launch import qsr_job
from tests.support.pool import Processes
from tests.support.training import QSR

STAGE_1: dict[str, Any] = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
BF16: dict[str, Any] = {**STAGE_1, "bf16": {"enabled": True}}
REDUCING = "reduce_independent_p_g_buckets_and_remove_grads"


def train_job(config: dict[str, Any], reduce: bool) -> tuple[int, list[torch.Tensor]]:
    """How often DeepSpeed reduced a gradient, and the masters after 12 steps."""
    import torch.distributed as dist

    import qsr_engine

    bf16 = config.get("bf16", {}).get("enabled", False)
    engine: Any = qsr_engine.initialize(
        model=training.make_model(torch.float32),
        optimizer=partial(training.make_optimizer, "adamw"),
        config={
            "train_micro_batch_size_per_gpu": training.BATCH,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.1,
            "qsr": QSR,
            **config,
        },
    )[0]
    if reduce:
        engine.enable_backward_allreduce = True
        engine.optimizer.__dict__.pop("reduce_ready_partitions_and_remove_grads", None)
    calls = 0
    for owner, name in ((engine, "buffered_allreduce_fallback"), (engine.optimizer, REDUCING)):
        inner = getattr(owner, name, None)

        def counting(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return _inner(*args, **kwargs)

        setattr(owner, name, counting)
    micro_step = 0
    while not engine.local_steps.finished:
        inputs, targets = training.batch(dist.get_rank(), micro_step, dtype=torch.bfloat16 if bf16 else torch.float32)
        engine.backward(training.loss(engine(inputs), targets))
        engine.step()
        micro_step += 1
    return calls, [p.detach().clone() for group in engine.optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("config", [{}, STAGE_1, BF16], ids=["stage0-fp32", "stage1-fp32", "stage1-bf16"])
def test_no_gradient_is_reduced_over_one_rank_and_no_bit_changes(processes: Processes, config: dict[str, Any]) -> None:
    left_out = processes.run(train_job, config=config, reduce=False)
    reduced = processes.run(train_job, config=config, reduce=True)
    for (no_calls, masters), (calls, expected) in zip(left_out, reduced, strict=True):
        assert no_calls == 0
        assert calls > 0, "the count can fail"
        assert all(torch.equal(a, b) for a, b in zip(masters, expected, strict=True))


@pytest.mark.parametrize(
    "more", [{"communication_data_type": "fp32"}, {"zero_optimization": {"stage": 1, "overlap_comm": True}}], ids=str
)
def test_a_reduction_that_does_more_than_reduce_stays(processes: Processes, more: dict[str, Any]) -> None:
    for calls, _ in processes.run(train_job, config={**BF16, **more}, reduce=False):
        assert calls > 0


def test_ranks_of_one_worker_still_reduce(processes: Processes) -> None:
    for config in ({}, STAGE_1):
        for calls, _ in processes.run(train_job, config={**config, "qsr": {**QSR, "worker_size": 2}}, reduce=False):
            assert calls > 0


@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (2, 2), (2, 1)])
def test_a_run_of_one_worker_says_that_it_averages_nothing(
    processes: Processes, recipe: Path, ranks: int, size: int
) -> None:
    sets = ["qsr.total_steps=2", f"qsr.worker_size={size}", "logging.name=run", "logging.eval_every=null"]
    words = [word for override in sets for word in ("--set", override)]
    found = processes.run(qsr_job, ranks=ranks, argv=["train", str(recipe), "--engine", "fsdp", *words])
    assert [code for code, _, _ in found] == [0] * ranks
    said = "".join(err for _, _, err in found).count("one worker trains, so that nothing is averaged")
    assert said == (ranks == size), "once, or not at all"
