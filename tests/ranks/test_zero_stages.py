"""What else every ZeRO stage must do: strategies, overflow, averaged state, clipping, workers of several ranks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import training
from tests.support.combinations import (
    DTYPES,
    Combination,
    assert_like_reference,
    expected,
    pretend_fp16,
    start,
    take_step,
    train_job,
    whole_masters,
    whole_parameters,
)
from tests.support.counting import collectives_across_workers
from tests.support.pool import JobError, Processes
from tests.support.training import QSR

LR = QSR["lr"]
STAGE_0 = Combination(0, "bf16", "AdamW")
STAGES = [STAGE_0, *(Combination(stage, precision, "AdamW") for stage in (1, 2, 3) for precision in ("bf16", "fp16"))]


# ------------------------------------------------------------------------------------------------ strategies


@pytest.mark.parametrize("worker_size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "combination",
    [
        Combination(0, "fp32", "AdamW"),
        *STAGES,
        Combination(1, "bf16, fp32 accumulation", "AdamW"),
        *(Combination(stage, precision, "offloaded SGD") for stage in (1, 2, 3) for precision in ("fp32", "fp16")),
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


@pytest.mark.parametrize("combination", [*STAGES[1:], Combination(2, "fp32", "offloaded SGD")], ids=str)
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


# ---------------------------------------------------------------------------------------- overflow and clipping


def overflow_job(
    combination: Combination, qsr: dict[str, Any], at: list[int], config: dict[str, Any]
) -> dict[str, Any]:
    """The gradients of the first worker overflow at the given steps."""
    import torch.distributed as dist

    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler()
    logging.getLogger("qsr_engine").addHandler(handler)
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
    logging.getLogger("qsr_engine").removeHandler(handler)
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
    qsr = {**qsr, "strategy": "constant", "alpha": None, "warmup_steps": 4, "worker_size": 1}
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


# ------------------------------------------------------------------------------------------- averaged state


@pytest.mark.parametrize("overlap", ["none", "next_forward"])
@pytest.mark.parametrize(
    ("optimizer", "state"), [("AdamW", ["exp_avg"]), ("AdamW", ["exp_avg", "exp_avg_sq"]), ("SGD", ["momentum_buffer"])]
)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp16"), (3, "bf16")])
def test_averaged_optimizer_state(
    processes: Processes, stage: int, precision: str, optimizer: str, state: list[str], overlap: str
) -> None:
    """Bit for bit as the reference, which without the averaged state gives something else."""
    if overlap == "next_forward" and stage == 3:
        pytest.skip("refused by name: see test_what_an_engine_refuses")
    combination = Combination(stage, precision, optimizer)
    qsr = {**QSR, "averaging": {"state": state, "overlap": overlap}}
    results = processes.run(train_job, combination=combination, qsr=qsr, config={})
    oracle = expected(combination, QSR, workers=2, state=tuple(state))
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


@pytest.mark.parametrize("stage", [2, 3])
def test_a_worker_of_two_ranks_is_a_worker_with_twice_the_batch(processes: Processes, stage: int) -> None:
    """ZeRO-2 and 3 with worker_size 2 against worker_size 1 on the batches of both ranks together.

    The mean over 16 samples is rounded in another order than the mean of two means over 8: 2^-24 relative of each of 12
    steps, where later gradients differ as much; ten times 12 x 0.05 x 2^-24 is 4e-7.
    """
    combination = Combination(stage, "fp32", "SGD")
    two = processes.run(train_job, ranks=4, combination=combination, qsr={**QSR, "worker_size": 2}, config={})
    one = processes.run(twice_job, ranks=2, combination=combination)
    torch.testing.assert_close(two[0]["masters"], one[0], rtol=0, atol=4e-7)


def twice_job(combination: Combination) -> torch.Tensor:
    import torch.distributed as dist

    config = {"train_micro_batch_size_per_gpu": 2 * training.BATCH}
    engine = start(combination, {**QSR, "worker_size": 1}, **config)
    while not engine.local_steps.finished:
        ranks = (2 * dist.get_rank(), 2 * dist.get_rank() + 1)
        batches = [training.batch(rank, engine.local_steps.step, dtype=torch.float32) for rank in ranks]
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        engine.backward(training.loss(engine(inputs), targets))
        engine.step()
    return whole_masters(engine)


# By function of torch.distributed, in the fifth step of the small model, with clipping: of this worker's two ranks.
INSIDE = {
    0: {"all_reduce": 1},  # gradients
    1: {"all_reduce": 3, "all_gather_into_tensor": 1},  # gradients, overflow flag, norm; parameters
    2: {"all_reduce": 3, "all_gather_into_tensor": 1},  # the same: DeepSpeed reduces small buckets on gloo
    3: {"reduce_scatter_tensor": 1, "all_reduce": 2, "all_gather_into_tensor": 6},  # gradients; flag, norm; parameters
}


def inside_job(combination: Combination) -> dict[str, int]:
    """Collectives of the fifth step, inside a round, by function; only those over more than one rank."""
    import inspect

    import torch.distributed as dist

    counts: dict[str, int] = {}

    def counting(function: Any) -> Any:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            if dist.get_world_size(signature.bind(*args, **kwargs).arguments.get("group")) > 1:
                counts[function.__name__] = counts.get(function.__name__, 0) + 1
            return function(*args, **kwargs)

        return call

    qsr = {"strategy": "constant", "h_base": 6, "total_steps": 12, "lr": LR, "worker_size": 2}
    kinds = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter")
    originals = {
        kind: getattr(dist, kind) for kind in (*kinds, "reduce_scatter_tensor", "all_to_all_single", "barrier")
    }
    for kind, original in originals.items():
        setattr(dist, kind, counting(original))
    try:  # DeepSpeed keeps some of them when it starts
        engine = start(combination, qsr, gradient_clipping=1.0)
        for _ in range(5):
            counts.clear()
            take_step(engine, combination)
    finally:
        for kind, original in originals.items():
            setattr(dist, kind, original)
    return counts


@pytest.mark.parametrize("combination", STAGES[:1] + STAGES[2::2], ids=str)
def test_what_remains_inside_a_worker(processes: Processes, combination: Combination) -> None:
    """README lists it."""
    for counts in processes.run(inside_job, ranks=4, combination=combination):
        assert counts == INSIDE[combination.stage]


@pytest.mark.parametrize("combination", [Combination(0, "fp32", "SGD"), *STAGES], ids=str)
def test_four_workers(processes: Processes, combination: Combination) -> None:
    """With four summands the all-reduce may add in another order than the reference: 2^-24 relative at each of five
    averagings in fp32 masters. In low precision such a difference may round a parameter the other way: see
    assert_like_reference."""
    results = processes.run(train_job, ranks=4, combination=combination, qsr=QSR, config={})
    for result in results:
        assert torch.equal(result["masters"], results[0]["masters"])
        assert torch.equal(result["parameters"], results[0]["parameters"])
    bits = {None: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[DTYPES[combination.precision]]
    oracle = expected(combination, QSR, workers=4)
    torch.testing.assert_close(results[0]["masters"], oracle, rtol=0, atol=12 * 0.05 * bits)


@pytest.mark.parametrize(
    ("zero", "ranks", "worker_size"),
    [
        ({"stage": 3, "zero_hpz_partition_size": 2}, 4, 2),
        ({"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}, 4, 2),
        ({"stage": 3, "stage3_param_persistence_threshold": 20}, 4, 2),
        ({"stage": 3, "sub_group_size": 60}, 4, 2),
        ({"stage": 2, "overlap_comm": True}, 4, 2),
        ({"stage": 2, "contiguous_gradients": False, "reduce_scatter": False}, 4, 2),
        ({"stage": 1, "overlap_comm": True, "reduce_bucket_size": 50}, 2, 1),
    ],
    ids=["hpz", "offload_param", "persistent", "sub_groups", "overlap_comm-2", "not contiguous", "overlap_comm-1"],
)
@pytest.mark.parametrize("strategy", ["qsr", "post_local"])
def test_other_options_of_zero(
    processes: Processes, zero: dict[str, Any], ranks: int, worker_size: int, strategy: str
) -> None:
    """Secondary copies, offloaded parameters, gathered ones and sub-groups are all brought up to date; in fp32, bit for
    bit."""
    combination = Combination(zero["stage"], "fp32", "SGD")
    switch = {"strategy": "post_local", "switch_step": 4, "alpha": None} if strategy == "post_local" else {}
    qsr = {**QSR, **switch, "worker_size": worker_size}
    config = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    results = processes.run(train_job, ranks=ranks, combination=combination, qsr=qsr, config=config)
    assert_like_reference(combination, results, expected(combination, qsr, workers=2))
    local = results[0]["counts"][4:]
    assert [count for boundary, count in local if not boundary] == [0] * sum(not boundary for boundary, _ in local)


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


# ------------------------------------------------------------------------------------------------- zero.Init


def zero_init_job(worker_size: int, seeds: list[int], plain: bool) -> dict[str, Any]:
    """Build the model partitioned, every rank from another seed; train; and what rank 0's seed would have given."""
    import deepspeed
    import torch.distributed as dist

    import qsr_engine

    combination = Combination(3, "bf16", "AdamW")
    config = {**combination.config(), "qsr": {**QSR, "worker_size": worker_size}}
    with qsr_engine.zero_init(config):
        torch.manual_seed(seeds[dist.get_rank()])
        model = nn.Sequential(nn.Linear(training.FEATURES, 17), nn.Tanh(), nn.Linear(17, training.OUTPUTS))
    if plain:
        with deepspeed.zero.Init(config_dict_or_path={k: v for k, v in config.items() if k != "qsr"}):
            model = nn.Sequential(nn.Linear(training.FEATURES, 17), nn.Linear(17, training.OUTPUTS))
    engine = qsr_engine.initialize(model=model, optimizer=combination.make_optimizer, config=config)[0]
    began = whole_masters(engine)
    while not engine.local_steps.finished:
        take_step(engine, combination)
    return {"began": began, "masters": whole_masters(engine), "parameters": whole_parameters(engine)}


@pytest.mark.parametrize("worker_size", [1, 2])
def test_a_model_built_under_zero_init(processes: Processes, worker_size: int) -> None:
    ranks = 2 * worker_size
    results = processes.run(zero_init_job, ranks=ranks, worker_size=worker_size, seeds=list(range(ranks)), plain=False)
    for result in results:
        assert torch.equal(result["began"], results[0]["began"]), "rank 0's values, on every worker"
        assert torch.equal(result["masters"], results[0]["masters"])
        assert torch.equal(result["parameters"], result["masters"].bfloat16())
    assert not torch.equal(results[0]["began"], results[0]["masters"])


def test_a_model_partitioned_over_all_ranks_is_refused(processes: Processes) -> None:
    with pytest.raises(JobError, match=r"partitioned by deepspeed.zero.Init over the ranks \[0, 1\], and a worker is"):
        processes.run(zero_init_job, worker_size=1, seeds=[0, 0], plain=True)


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
