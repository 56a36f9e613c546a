"""The FSDP engine: the same parameters as the reference and as the DeepSpeed engine, and silence between boundaries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.support import reference, training
from tests.support.fsdp_engine import (
    BF16,
    ENDS,
    LR,
    STRATEGIES,
    assert_silent,
    batch_of,
    config_of,
    expected,
    furthest,
    mlp,
    scheduled,
    start,
    start_deepspeed,
    take_step,
    train_job,
    vit,
)
from tests.support.pool import JobError, Processes
from tests.support.training import QSR, memory_of

Batches = Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]]  # rank, step, micro-batch


# -------------------------------------------------------------------------------------- equality with others


@pytest.mark.fast_cells(5)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_workers_of_one_rank_equal_the_reference(processes: Processes, strategy: str, optimizer: str) -> None:
    """Bit for bit, under every strategy; `parallel` is torch's HSDP with shards of one rank."""
    qsr = STRATEGIES[strategy]
    results = processes.run(train_job, qsr=qsr, optimizer=optimizer)
    assert results[0]["ends"] == ENDS[strategy]
    assert results[0]["masters"] == ("Shards" if strategy == "parallel" else "Parameters")
    assert furthest(results[0]["state"], expected(qsr, 2, optimizer=optimizer)) == 0
    if strategy not in ("parallel", "post_local"):
        assert_silent(results, 1)


@pytest.mark.fast_cells(3, of=6)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_workers_of_two_ranks_equal_the_reference(processes: Processes, strategy: str, optimizer: str) -> None:
    """Bit for bit but for `parallel`: HSDP sums four gradients as two sums of two, and divides at the end, where the
    reference takes means of means: 2^-24 relative of each of 12 gradients, and a step of Adam's at most doubles it."""
    qsr = {**STRATEGIES[strategy], "worker_size": 2}
    results = processes.run(train_job, ranks=4, qsr=qsr, optimizer=optimizer)
    assert results[0]["masters"] == "Shards"
    assert results[0]["ends"] == ENDS[strategy]
    difference = furthest(results[0]["state"], expected(qsr, 2, optimizer=optimizer))
    assert difference <= (1e-6 if strategy == "parallel" else 0)
    if strategy not in ("parallel", "post_local"):
        assert_silent(results, 2)


def test_one_worker_of_two_ranks_is_plain_fsdp(processes: Processes) -> None:
    qsr = {**STRATEGIES["parallel"], "worker_size": 2}
    results = processes.run(train_job, qsr=qsr)
    assert [count for _, count in results[0]["counts"]] == [0] * 12, "there is no other worker"
    assert furthest(results[0]["state"], expected(qsr, 1)) == 0


def torchs_own_job(worker_size: int) -> dict[str, torch.Tensor]:
    """FSDP2 as its users write it: HSDP over (2, worker_size) ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from qsr_engine.config.qsr import LearningRateConfig
    from qsr_engine.schedule import learning_rate

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, worker_size), mesh_dim_names=("replicate", "shard"))
    model: Any = vit()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = training.make_optimizer("adamw", model.parameters())
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(LearningRateConfig.model_validate(LR), step, 12)
        inputs, targets = batch_of("vit", dist.get_rank(), step)
        training.loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    for part in (*model.blocks, model):
        part.reshard()
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


@pytest.mark.fast_cells(0, of=2)
@pytest.mark.parametrize("worker_size", [1, 2])
def test_parallel_is_torchs_own(processes: Processes, worker_size: int) -> None:
    """The same bits as a loop that calls fully_shard itself."""
    ranks, qsr = 2 * worker_size, {**STRATEGIES["parallel"], "worker_size": worker_size}
    ours = processes.run(train_job, ranks=ranks, qsr=qsr, model="vit")[0]["state"]
    assert furthest(ours, processes.run(torchs_own_job, ranks=ranks, worker_size=worker_size)[0]) == 0


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    ("model", "optimizer", "ranks", "worker_size"),
    [("vit", "adamw", 2, 1), ("resnet", "sgd", 2, 1)],
)
def test_both_engines_equal_the_reference(
    processes: Processes, model: str, optimizer: str, ranks: int, worker_size: int
) -> None:
    """FSDP, DeepSpeed at stage 0 and at stage 3 give the same parameters and batch-norm statistics after rounds of
    unequal length.

    Bit for bit against the reference with two workers of one rank. With four summands, gloo, the shared memory and the
    reference add in different orders: 2^-24 relative of parameters of size 1 at each of the boundaries, and where that
    changes the sign of a gradient near 0, Adam's first steps are off by up to their size for that one parameter.
    """
    qsr = {**QSR, "worker_size": worker_size}
    wanted = expected(qsr, ranks // worker_size, model, optimizer)
    found = {
        str(stage): processes.run(train_job, ranks=ranks, qsr=qsr, model=model, optimizer=optimizer, stage=stage)
        for stage in (None, 0, 3)
    }
    assert_silent(found["None"], worker_size)
    differences = {name: furthest(results[0]["state"], wanted) for name, results in found.items()}
    assert differences["None"] <= (0 if (ranks, worker_size) == (2, 1) else 1e-5), differences
    assert max(differences.values()) <= 1e-4, differences


# ------------------------------------------------------------------------------ what the DeepSpeed engine has too


@pytest.mark.fast_cells(1, of=3)
@pytest.mark.parametrize(
    ("strategy", "worker_size"), [("qsr", 1), ("qsr", 2), ("post_local", 1), ("post_local", 2), ("parallel", 2)]
)
def test_gradient_accumulation(processes: Processes, strategy: str, worker_size: int) -> None:
    """Micro-batches of a step count as one batch. Their gradients are added up in another order than the reference's,
    which averages those of two ranks at the end: 2^-24 relative of each of 12 steps of at most 0.05."""
    qsr = {**STRATEGIES[strategy], "worker_size": worker_size}
    results = processes.run(train_job, ranks=2 * worker_size, qsr=qsr, gradient_accumulation_steps=2)
    assert results[0]["ends"] == ENDS[strategy]
    assert furthest(results[0]["state"], expected(qsr, 2, accumulation=2)) <= (0 if worker_size == 1 else 1e-6)
    if strategy == "parallel":
        assert [count for _, count in results[0]["counts"]] == [1] * 12, "the workers meet once a step"


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize("strategy", ["qsr", "parallel"])
def test_clipping_is_per_worker_and_silent(processes: Processes, strategy: str, worker_size: int) -> None:
    """Bit for bit in a whole worker. In shards, squares are added up in another order: 2^-22 relative of each step."""
    qsr = {**STRATEGIES[strategy], "worker_size": worker_size}
    results = processes.run(train_job, ranks=2 * worker_size, qsr=qsr, optimizer="sgd", gradient_clipping=0.1)
    oracle, unclipped = (expected(qsr, 2, optimizer="sgd", clip=clip) for clip in (0.1, 0.0))
    exact = worker_size == 1 and strategy == "qsr"
    assert furthest(results[0]["state"], oracle) <= (0 if exact else 1e-6)
    assert furthest(oracle, unclipped) > 1e-3, "the clipping was meant to matter"
    if strategy == "qsr":
        assert_silent(results, worker_size)


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    ("optimizer", "state", "worker_size"),
    [("adamw", {"exp_avg": 2, "exp_avg_sq": 3}, 2), ("adamw", ["exp_avg"], 1), ("sgd", ["momentum_buffer"], 1)],
)
def test_averaged_optimizer_state(
    processes: Processes, optimizer: str, state: list[str] | dict[str, int], worker_size: int
) -> None:
    qsr = {**QSR, "worker_size": worker_size}
    averaged = {**qsr, "averaging": {"state": state}}
    results = processes.run(train_job, ranks=2 * worker_size, qsr=averaged, optimizer=optimizer)
    oracle = expected(qsr, 2, optimizer=optimizer, state=state if isinstance(state, dict) else tuple(state))
    assert furthest(results[0]["state"], oracle) == 0
    assert furthest(oracle, expected(qsr, 2, optimizer=optimizer)) > 0
    assert_silent(results, worker_size)


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_bf16_computes_in_bf16_and_reduces_in_fp32(processes: Processes, optimizer: str, worker_size: int) -> None:
    """Bit for bit: gradients in bf16, their mean over a worker and the masters in fp32."""
    qsr = {**QSR, "worker_size": worker_size}
    results = processes.run(train_job, ranks=2 * worker_size, qsr=qsr, optimizer=optimizer, **BF16)
    assert results[0]["masters"] == ("ComputedInCopies" if worker_size == 1 else "Shards")
    oracle = expected(qsr, 2, optimizer=optimizer, compute_dtype=torch.bfloat16, gradient_dtype=torch.float32)
    assert furthest(results[0]["state"], oracle) == 0
    assert_silent(results, worker_size)


@pytest.mark.fast_cells(2, of=5)
@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize(
    ("averaging", "delay"),
    [
        ({"overlap": "delayed", "delay_steps": 1}, 1),
        ({"overlap": "next_forward"}, 0),
        ({"shared_memory": False}, 0),
        ({"shared_memory": False, "bucket_mb": 0.001}, 0),
    ],
    ids=["delayed", "next_forward", "gloo", "small buckets"],
)
def test_ways_of_averaging(processes: Processes, averaging: dict[str, Any], delay: int, worker_size: int) -> None:
    qsr = {**QSR, "worker_size": worker_size, "averaging": averaging}
    ranks = 2 * worker_size
    if averaging.get("overlap") == "next_forward" and worker_size == 2:
        with pytest.raises(JobError, match="FSDP gathers a parameter by a collective"):
            processes.run(train_job, ranks=ranks, qsr=qsr)
        return
    results = processes.run(train_job, ranks=ranks, qsr=qsr)
    assert furthest(results[0]["state"], expected({**qsr, "averaging": {}}, 2, delay=delay)) == 0
    assert results[0]["way"] == ("AllReduce" if "shared_memory" in averaging else "SharedMemory")
    if "overlap" not in averaging:  # which averages while the next round goes on
        assert_silent(results, worker_size)


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_fewer_bits_on_the_wire(processes: Processes, wire: str) -> None:
    """Rounded relative to the differences of the workers, which are at most 0.05 a step: near the reference, and the
    same on all workers."""
    qsr = {**QSR, "worker_size": 2, "averaging": {"wire_dtype": wire}}
    results = processes.run(train_job, ranks=4, qsr=qsr, optimizer="sgd")
    assert 0 < furthest(results[0]["state"], expected({**QSR, "worker_size": 2}, 2, optimizer="sgd")) < 2e-3
    assert_silent(results, 2)


EMPTY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the block "qsr", and what the reference is told of it
    "delayed": ({"averaging": {"overlap": "delayed", "delay_steps": 1}}, {"delay": 1}),
    "outer": ({"averaging": {"state": ["exp_avg"]}, "outer": {"lr": 0.7}}, {"state": ("exp_avg",)}),
    "int8": ({"averaging": {"wire_dtype": "int8"}}, {}),
}


def empty_shards_job() -> dict[str, Any]:
    return {name: train_job({**QSR, **block, "worker_size": 2}, "one row") for name, (block, _) in EMPTY.items()}


def test_every_option_on_a_rank_whose_shards_are_empty(processes: Processes) -> None:
    """A model of one row, of which two of four ranks hold nothing. int8 rounds to 1/127 of a step of at most 0.05."""
    found = processes.run(empty_shards_job, ranks=4)[0]
    for name, (block, told) in EMPTY.items():
        wanted = expected({**QSR, "worker_size": 2}, 2, "one row", outer=block.get("outer"), **told)
        assert furthest(found[name]["state"], wanted) <= (12 * 0.05 / 127 if name == "int8" else 1e-6), name


def monitor_job(folder: str, scheduler: bool) -> list[float]:
    """Learning rates of a run that TensorBoard sees; from a scheduler, or from qsr.lr."""
    import qsr_engine

    without = {"warmup_steps": 3, **{key: value for key, value in QSR.items() if key != "lr"}}
    tensorboard = {"enabled": True, "output_path": folder, "job_name": f"scheduler-{scheduler}"}
    engine = qsr_engine.initialize_fsdp(
        model=mlp(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        config=config_of(without if scheduler else QSR, tensorboard=tensorboard),
        lr_scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=scheduled) if scheduler else None,
    )
    rates = []
    while not engine.local_steps.finished:
        rates += engine.get_lr()
        take_step(engine)
    engine.destroy()
    return rates


@pytest.mark.parametrize("scheduler", [False, True])
def test_schedules_and_the_monitor(processes: Processes, tmp_path: Path, scheduler: bool) -> None:
    """The engine sets the learning rate, or steps the scheduler that it was given; TensorBoard's files read back."""
    rates = processes.run(monitor_job, folder=str(tmp_path), scheduler=scheduler)[0]
    assert rates == pytest.approx(
        [scheduled(s) if scheduler else reference.learning_rate(LR, s, 12) for s in range(12)]
    )
    events = EventAccumulator(str(tmp_path / f"scheduler-{scheduler}")).Reload()
    averagings = events.Scalars("Train/LocalSteps/averagings")
    assert averagings[-1].value == len(averagings) >= 4
    assert averagings[-1].step == 12 * 2 * training.BATCH, "samples over all workers"
    assert {"Train/Samples/lr", "Train/Samples/train_loss", "Train/LocalSteps/period"} <= set(events.Tags()["scalars"])


def monitored_job(folder: str) -> None:
    """Saved at step 4 and gone on to 6, then loaded and gone on to 8, with both engines."""
    qsr = {"strategy": "constant", "h_base": 2, "total_steps": 8, "lr": {"schedule": "constant", "peak": 0.01}}
    for kind in ("fsdp", "deepspeed"):
        tensorboard = {"enabled": True, "output_path": folder, "job_name": kind}
        for load, end in ((False, 6), (True, 8)):
            if kind == "fsdp":
                engine = start(qsr, tensorboard=tensorboard)
            else:
                engine = start_deepspeed(qsr, mlp(), "sgd", 1, tensorboard=tensorboard)
            if load:
                engine.load_checkpoint(f"{folder}/{kind}-checkpoints")
            while engine.local_steps.step < end:
                if take_step(engine) and engine.local_steps.step == 4:
                    engine.save_checkpoint(f"{folder}/{kind}-checkpoints")
            engine.destroy()


def test_tensorboard_has_each_step_of_a_resumed_run_once(processes: Processes, tmp_path: Path) -> None:
    processes.run(monitored_job, ranks=1, folder=str(tmp_path))
    for kind in ("fsdp", "deepspeed"):
        events = EventAccumulator(str(tmp_path / kind)).Reload()
        found = [event.step for event in events.Scalars("Train/LocalSteps/averagings")]
        assert found == [steps * training.BATCH for steps in (2, 4, 6, 8)], kind


# ------------------------------------------------------------------------------------------ memory and pointers


def boundary_job(worker_size: int, shared: bool, hidden: int) -> dict[str, Any]:
    """Memory that a boundary takes on top of what a step takes, in bytes, and whether anything of FSDP's moved."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule

    model = nn.Sequential(*(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(6)))
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    averaging = {"bucket_mb": 1, "shared_memory": shared}
    qsr = {"strategy": "constant", "h_base": 2, "total_steps": 6, "worker_size": worker_size, "averaging": averaging}
    engine = start({**qsr, "lr": {"schedule": "constant", "peak": 0.01}}, model, "sgd")
    inputs = torch.randn(4, hidden, generator=torch.Generator().manual_seed(dist.get_rank()))

    def held() -> list[int]:
        parts = [part for part in engine.module.modules() if isinstance(part, FSDPModule)]
        of_fsdp = [p for part in parts for g in part._get_fsdp_state()._fsdp_param_groups for p in g.fsdp_params]
        pointers = [parameter._sharded_param_data.data_ptr() for parameter in of_fsdp]
        return [*pointers, *(shard.data_ptr() for shard in engine._driver.replica.masters())]

    peaks: dict[bool, int] = {}
    ended: list[bool] = []
    before = held()
    while not engine.local_steps.finished:
        engine.backward(engine(inputs).square().mean())
        _, most = memory_of(lambda: ended.append(engine.step()))
        peaks[ended[-1]] = max(most, peaks.get(ended[-1], 0))
    return {"moved": held() != before, "extra": peaks[True] - peaks[False], "model": size}


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(("worker_size", "shared"), [(1, True), (1, False), (2, True), (2, False)])
def test_a_boundary_makes_no_copy_of_the_model_and_moves_nothing(
    processes: Processes, worker_size: int, shared: bool
) -> None:
    """At most two staging buckets (of 1 MB) above what a step takes by itself, for a model of 9.4 MB; and where FSDP
    and the optimizer found their parameters, they still are. A sum of squares converts 512 kB at a time to fp64."""
    job: dict[str, Any] = {"worker_size": worker_size, "shared": shared, "hidden": 625}
    for result in processes.run(boundary_job, ranks=2 * worker_size, **job):
        assert result["model"] > 9_000_000
        assert not result["moved"]
        assert result["extra"] <= 2 * 1_000_000 + 2 * 65536 * 8
