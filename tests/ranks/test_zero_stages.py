"""What else every ZeRO stage must do: strategies, overflow, averaged state, clipping, workers of several ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import training
from tests.support.combinations import (
    DTYPES,
    LOW_PRECISION,
    Combination,
    assert_like_reference,
    expected,
    pretend_fp16,
    start,
    train_job,
    whole_masters,
    whole_parameters,
)
from tests.support.pool import JobError, Processes
from tests.support.training import QSR

LR = QSR["lr"]


# ------------------------------------------------------------------------------------------------ strategies


@pytest.mark.fast_cells(3, of=8)
@pytest.mark.parametrize(
    ("combination", "worker_size"),
    [
        *itertools.product(
            [Combination(0, "fp32", "AdamW"), *LOW_PRECISION, Combination(1, "bf16, fp32 accumulation", "AdamW")],
            [1, 2],
        ),
        *((Combination(stage, "fp32", "offloaded SGD"), 2) for stage in (1, 2, 3)),
        *((Combination(stage, "fp16", "offloaded SGD"), 1) for stage in (1, 2, 3)),
    ],
    ids=str,
)
def test_post_local_changes_to_local_steps_and_keeps_the_state(
    processes: Processes, combination: Combination, worker_size: int
) -> None:
    """Bit for bit: five steps average gradients over all ranks, then three rounds of local steps follow with the
    optimizer's state as it is.

    But for workers of two ranks in low precision, where gradients are averaged in two stages, and each rounds: by 2^-8
    (bf16) or 2^-11 (fp16) of a gradient at each of five steps of at most 0.05, Adam's first steps being of that size
    whatever the gradient.
    """
    qsr = {"strategy": "post_local", "h_base": 3, "switch_step": 5, "total_steps": 12, "lr": LR}
    qsr["worker_size"] = worker_size
    results = processes.run(train_job, ranks=2 * worker_size, combination=combination, qsr=qsr, config={})
    assert results[0]["ends"] == [1, 2, 3, 4, 5, 8, 11, 12]
    # Offloaded gradients of stages 1 and 2 are in fp32 when the workers average them.
    in_fp32 = combination.optimizer == "offloaded SGD" and combination.stage < 3 and worker_size == 1
    oracle = expected(combination, qsr, workers=2, **({"reduce_dtype": torch.float32} if in_fp32 else {}))
    if worker_size == 1 or combination.precision == "fp32":
        assert_like_reference(combination, results, oracle)
        return
    bits = 2.0**-8 if DTYPES[combination.precision] == torch.bfloat16 else 2.0**-11
    for result in results:
        assert torch.equal(result["masters"], results[0]["masters"])
    torch.testing.assert_close(results[0]["masters"], oracle, rtol=0, atol=12 * 0.05 * bits)


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    ("combination", "worker_size", "config"),
    [
        (Combination(1, "bf16", "AdamW"), 1, {"zero_optimization": {"stage": 1, "parameter_alignment": True}}),
        (Combination(2, "bf16", "AdamW"), 2, {"zero_optimization": {"stage": 2, "parameter_alignment": True}}),
        (Combination(3, "bf16", "AdamW"), 2, {"zero_optimization": {"stage": 3, "stage3_allgather_sequential": True}}),
        (Combination(0, "fp32", "AdamW"), 2, {"prescale_gradients": True, "gradient_predivide_factor": 2.0}),
        (
            Combination(1, "bf16, fp32 accumulation", "AdamW"),
            2,
            {"bf16": {"enabled": True, "immediate_grad_update": True}},
        ),
    ],
    ids=str,
)
def test_keys_that_move_masters_or_gradients_change_no_bit(
    processes: Processes, combination: Combination, worker_size: int, config: dict[str, Any]
) -> None:
    qsr = {**QSR, "worker_size": worker_size}
    results = processes.run(train_job, ranks=2 * worker_size, combination=combination, qsr=qsr, config=config)
    assert_like_reference(combination, results, expected(combination, qsr, workers=2))


@pytest.mark.fast_cells(2, of=5)
@pytest.mark.parametrize("combination", [*LOW_PRECISION[1:], Combination(2, "fp32", "offloaded SGD")], ids=str)
def test_parallel_is_deepspeeds_own(processes: Processes, combination: Combination) -> None:
    """The same bits as a plain engine of deepspeed.initialize."""
    qsr = {"strategy": "parallel", "total_steps": 6, "lr": {"schedule": "constant", "peak": 0.02}}
    ours = processes.run(train_job, combination=combination, qsr=qsr, config={})
    assert all(count > 0 for _, count in ours[0]["counts"])
    plain = processes.run(plain_job, combination=combination)
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one["parameters"], other)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_memory_held_before_does_not_matter(processes: Processes, stage: int) -> None:
    """DeepSpeed pads parts with what the memory held, and here that is NaN."""
    combination, qsr = Combination(stage, "fp32", "AdamW"), {**QSR, "worker_size": 2}
    results = processes.run(nan_memory_job, ranks=4, combination=combination, qsr=qsr)
    assert_like_reference(combination, results, expected(combination, qsr, workers=2))


def nan_memory_job(combination: Combination, qsr: dict[str, Any]) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills what torch.empty() gives with NaN
    try:
        small = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000}  # else gigabytes are filled
        return train_job(combination, qsr, {"zero_optimization": {"stage": combination.stage, **small}})
    finally:
        torch.use_deterministic_algorithms(False)


def plain_job(combination: Combination) -> torch.Tensor:
    import deepspeed
    import torch.distributed as dist

    pretend_fp16()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = training.make_model(torch.float32)
    engine, *_ = deepspeed.initialize(model=model, optimizer=combination.make_optimizer, config=combination.config())
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.02
    for number in range(6):
        inputs, targets = training.batch(dist.get_rank(), number, dtype=DTYPES[combination.precision] or torch.float32)
        engine.backward(training.loss(engine(inputs), targets))
        engine.step()
    return whole_parameters(engine)


# ------------------------------------------------------------------------------------------- averaged state


@pytest.mark.fast_cells(3, of=10)
@pytest.mark.parametrize(
    ("optimizer", "state", "overlap"),
    [
        ("AdamW", ["exp_avg"], "none"),
        ("AdamW", {"exp_avg": 2, "exp_avg_sq": 3}, "next_forward"),
        ("SGD", ["momentum_buffer"], "none"),
    ],
)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp16"), (3, "bf16")])
def test_averaged_optimizer_state(
    processes: Processes, stage: int, precision: str, optimizer: str, state: list[str] | dict[str, int], overlap: str
) -> None:
    """Bit for bit as the reference, which without the averaged state gives something else. Numbers: every so many
    rounds."""
    overlap = "none" if stage == 3 else overlap  # which stage 3 refuses by name
    combination = Combination(stage, precision, optimizer)
    qsr = {**QSR, "averaging": {"state": state, "overlap": overlap}}
    results = processes.run(train_job, combination=combination, qsr=qsr, config={})
    told = state if isinstance(state, dict) else tuple(state)
    oracle = expected(combination, QSR, workers=2, state=told)
    assert_like_reference(combination, results, oracle)
    assert not torch.equal(oracle, expected(combination, QSR, workers=2))


def test_averaged_state_in_workers_of_two_ranks(processes: Processes) -> None:
    combination = Combination(2, "fp32", "AdamW")
    qsr = {**QSR, "worker_size": 2, "averaging": {"state": ["exp_avg", "exp_avg_sq"]}}
    results = processes.run(train_job, ranks=4, combination=combination, qsr=qsr, config={})
    assert_like_reference(combination, results, expected(combination, qsr, 2, state=("exp_avg", "exp_avg_sq")))


def unused_job() -> list[torch.Tensor]:
    """A layer that one worker uses and the other does not: Adam has state for it on the first alone."""
    import torch.distributed as dist

    import qsr_engine

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.layers[0](inputs)
            return self.layers[1](outputs) if dist.get_rank() == 0 else outputs

    torch.manual_seed(0)
    model = Net()
    qsr = {"strategy": "constant", "h_base": 2, "total_steps": 4, "lr": LR, "averaging": {"state": ["exp_avg"]}}
    config = {"train_batch_size": 4, "qsr": qsr}
    engine = qsr_engine.initialize(
        model=model, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1), config=config
    )[0]
    while not engine.local_steps.finished:
        engine.backward(engine(torch.ones(2, 3)).square().sum())
        engine.step()
    return [engine.optimizer.state[p]["exp_avg"] for p in model.parameters() if p in engine.optimizer.state]


def test_state_that_one_worker_does_not_have(processes: Processes) -> None:
    first, second = processes.run(unused_job)
    assert (len(first), len(second)) == (4, 2)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second, strict=True))


# ------------------------------------------------------------------------------------- workers of several ranks


def accumulate_job(combination: Combination, qsr: dict[str, Any]) -> torch.Tensor:
    """Two micro-batches a step."""
    import torch.distributed as dist

    engine = start(combination, qsr, gradient_accumulation_steps=2)
    dtype = DTYPES[combination.precision] or torch.float32
    while not engine.local_steps.finished:
        step = engine.local_steps.step
        for micro in range(2):
            inputs, targets = training.batch(dist.get_rank(), step, micro, dtype=dtype)
            engine.backward(training.loss(engine(inputs), targets))
            engine.step()
    return whole_masters(engine)


@pytest.mark.fast_cells(3, of=7)
@pytest.mark.parametrize("optimizer", ["SGD", "offloaded SGD"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["qsr", "post_local"])
def test_gradient_accumulation(processes: Processes, stage: int, optimizer: str, strategy: str) -> None:
    """In fp32 with workers of one rank: two halves of a loss are added in the same order everywhere."""
    from tests.support import reference

    combination = Combination(stage, "fp32", optimizer)
    switch = {"strategy": "post_local", "switch_step": 4, "alpha": None} if strategy == "post_local" else {}
    qsr = {**QSR, **switch, "worker_size": 1}
    first, second = processes.run(accumulate_job, combination=combination, qsr=qsr)
    models, _ = reference.simulate(
        lambda: training.make_model(torch.float32),
        lambda parameters: training.make_optimizer("sgd", parameters),
        lambda rank, step: [training.batch(rank, step, micro, dtype=torch.float32) for micro in range(2)],
        qsr,
        2,
    )
    assert torch.equal(first, second)
    assert torch.equal(first, training.flat(models[0].parameters()))


# ---------------------------------------------------------------------------------------------------- refused


def refused_job(config: dict[str, Any], qsr: dict[str, Any]) -> None:
    optimizer = Combination(config["zero_optimization"]["stage"], "fp32", "AdamW")
    start(optimizer, {**QSR, **qsr}, **config)


@pytest.mark.parametrize(
    ("zero", "qsr", "words"),
    [
        ({"stage": 3}, {"averaging": {"overlap": "next_forward"}}, "stage 3 gathers a parameter by a collective"),
        ({"stage": 2}, {"averaging": {"overlap": "next_forward"}, "worker_size": 2}, "worker_size is 2 under ZeRO"),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            {"averaging": {"overlap": "next_forward"}},
            "the masters are on the CPU",
        ),
        (
            {"stage": 1},
            {"averaging": {"state": ["momentum_buffer"]}},
            "AdamW as configured keeps ['exp_avg', 'exp_avg_sq']",
        ),
    ],
)
def test_what_an_engine_refuses(processes: Processes, zero: dict[str, Any], qsr: dict[str, Any], words: str) -> None:
    config = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    with pytest.raises(JobError) as caught:
        processes.run(refused_job, config=config, qsr=qsr)
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "ConfigError"
        assert words in error[1]
