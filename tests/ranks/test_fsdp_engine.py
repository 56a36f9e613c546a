"""The FSDP engine: the same parameters as the reference and as the DeepSpeed engine, and silence between boundaries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.ranks.test_deepspeed_engine import collectives_across_workers
from tests.support import reference, training
from tests.support.pool import JobError, Processes
from tests.support.training import QSR

LR = QSR["lr"]
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
Batches = Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]]  # rank, step, micro-batch


# ------------------------------------------------------------------------------------------- models to train


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return training.make_model(dtype)


def vit() -> nn.Module:
    """Three blocks of a real vision transformer, with sizes that two ranks do not divide evenly."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 18, "depth": 3, "num_heads": 3}
    model: nn.Module = VisionTransformer(**sizes, mlp_ratio=1.5, num_classes=training.OUTPUTS)
    return model


def resnet() -> nn.Module:
    """A real ResNet with batch norm, narrow."""
    torch.manual_seed(7)
    layers, channels = (2, 2, 1, 1), (4, 6, 8, 8)
    model: nn.Module = ResNet(BasicBlock, layers, num_classes=training.OUTPUTS, channels=channels, stem_width=4)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "vit": vit, "resnet": resnet}


def image_batch(rank: int, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1_000_000 * rank + 1_000 * step + micro)
    images = torch.randn(training.BATCH, 3, 8, 8, generator=generator)
    return images, images.mean((2, 3)).sin()


def batch_of(model: str, rank: int, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    if model == "mlp":
        return training.batch(rank, step, micro, dtype=torch.float32)
    return image_batch(rank, step, micro)


def config_of(qsr: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": training.BATCH, "gradient_clipping": 0.0, "qsr": qsr, **more}


def start(
    qsr: dict[str, Any], model: nn.Module | None = None, optimizer: str = "adamw", given: Any = None, **config: Any
) -> Any:
    import qsr_engine

    return qsr_engine.initialize_fsdp(
        model=mlp() if model is None else model,
        optimizer=partial(training.make_optimizer, optimizer),
        config=config_of(qsr, **config),
        **(given or {}),
    )


def start_deepspeed(qsr: dict[str, Any], model: nn.Module, optimizer: str, stage: int) -> Any:
    import qsr_engine

    return qsr_engine.initialize(
        model=model,
        optimizer=partial(training.make_optimizer, optimizer),
        config=config_of(qsr, zero_optimization={"stage": stage}, zero_allow_untested_optimizer=True),
    )[0]


def take_step(engine: Any, model: str = "mlp") -> bool:
    import torch.distributed as dist

    boundary = False
    for micro in range(engine.gradient_accumulation_steps()):
        inputs, targets = batch_of(model, dist.get_rank(), engine.local_steps.step, micro)
        engine.backward(training.loss(engine(inputs).float(), targets))
        boundary = engine.step()
    return bool(boundary)


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """The averaged model, on rank 0, with the layers of DeepSpeed's and FSDP's engine alike."""
    state: dict[str, torch.Tensor] = engine.averaged_state_dict()
    return state


def fingerprint(engine: Any) -> float:
    """Of what this rank holds; ranks with the same place in their worker must have the same."""
    return float(engine.local_steps.averager.sum_of_squares())


def train_job(
    qsr: dict[str, Any],
    model: str = "mlp",
    optimizer: str = "adamw",
    stage: int | None = None,
    given: Any = None,
    **config: Any,
) -> dict[str, Any]:
    """Train to the end, with DeepSpeed where a stage is given; count the collectives across workers in every step."""
    made = MODELS[model]()
    if stage is None:
        engine = start(qsr, made, optimizer, given, **config)
    else:
        engine = start_deepspeed(qsr, made, optimizer, stage)
    worker_size = qsr.get("worker_size", 1)
    counts, ends = [], []
    while not engine.local_steps.finished:
        before = collectives_across_workers(worker_size)
        boundary = take_step(engine, model)
        counts.append((boundary, collectives_across_workers(worker_size) - before))
        if boundary:
            ends.append(engine.local_steps.step)
    return {
        "state": state_of(engine),
        "fingerprint": fingerprint(engine),
        "counts": counts,
        "ends": ends,
        "masters": type(engine._driver.replica).__name__,
        "way": engine.local_steps.averager.way,
    }


def expected(
    qsr: dict[str, Any], workers: int, model: str = "mlp", optimizer: str = "adamw", accumulation: int = 1, **more: Any
) -> dict[str, torch.Tensor]:
    """The model after training, from the reference."""
    compute = more.get("compute_dtype") or torch.float32

    def micro_batch(rank: int, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = batch_of(model, rank, step, micro)
        return inputs.to(compute), targets

    models, _ = reference.simulate(
        MODELS[model],
        partial(training.make_optimizer, optimizer),
        lambda rank, step: [micro_batch(rank, step, micro) for micro in range(accumulation)],
        qsr,
        workers,
        worker_size=qsr.get("worker_size", 1),
        loss=lambda outputs, targets: training.loss(outputs.float(), targets),
        average_buffers=True,
        **more,
    )
    return {name: tensor.detach() for name, tensor in models[0].state_dict().items()}


def furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models, in all parameters and buffers."""
    assert set(found) == set(wanted)
    return max(float((found[name].double() - value.double()).abs().max()) for name, value in wanted.items())


def assert_silent(results: list[dict[str, Any]], worker_size: int) -> None:
    """No collective crosses workers between boundaries, and after one all workers hold the same."""
    for rank, result in enumerate(results):
        assert all(count == 0 for boundary, count in result["counts"] if not boundary)
        assert all(count > 0 for boundary, count in result["counts"] if boundary)
        assert result["fingerprint"] == results[rank % worker_size]["fingerprint"]


# -------------------------------------------------------------------------------------- equality with others

SWITCHING = {"h_base": 3, "switch_step": 5, "total_steps": 12, "lr": LR}
STRATEGIES: dict[str, dict[str, Any]] = {
    "qsr": QSR,
    "constant": {"strategy": "constant", "h_base": 3, "total_steps": 12, "lr": LR},
    "parallel": {"strategy": "parallel", "total_steps": 12, "lr": LR},
    "post_local": {"strategy": "post_local", **SWITCHING},
    "swap": {"strategy": "swap", **SWITCHING},
}
ENDS = {
    "qsr": [2, 4, 6, 8, 12],
    "constant": [3, 6, 9, 12],
    "parallel": [*range(1, 13)],
    "post_local": [1, 2, 3, 4, 5, 8, 11, 12],
    "swap": [3, 5, 12],
}


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


@pytest.mark.parametrize("worker_size", [1, 2])
def test_parallel_is_torchs_own(processes: Processes, worker_size: int) -> None:
    """The same bits as a loop that calls fully_shard itself."""
    ranks, qsr = 2 * worker_size, {**STRATEGIES["parallel"], "worker_size": worker_size}
    ours = processes.run(train_job, ranks=ranks, qsr=qsr, model="vit")[0]["state"]
    assert furthest(ours, processes.run(torchs_own_job, ranks=ranks, worker_size=worker_size)[0]) == 0


@pytest.mark.parametrize(("ranks", "worker_size"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("model", ["vit", "resnet"])
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


@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize("strategy", ["qsr", "post_local", "parallel"])
def test_gradient_accumulation(processes: Processes, strategy: str, worker_size: int) -> None:
    """Micro-batches of a step count as one batch. Their gradients are added up in another order than the reference's,
    which averages those of two ranks at the end: 2^-24 relative of each of 12 steps of at most 0.05."""
    qsr = {**STRATEGIES[strategy], "worker_size": worker_size}
    results = processes.run(train_job, ranks=2 * worker_size, qsr=qsr, gradient_accumulation_steps=2)
    assert results[0]["ends"] == ENDS[strategy]
    assert furthest(results[0]["state"], expected(qsr, 2, accumulation=2)) <= (0 if worker_size == 1 else 1e-6)
    if strategy == "parallel":
        assert [count for _, count in results[0]["counts"]] == [1] * 12, "the workers meet once a step"


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


@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize(
    ("optimizer", "state"), [("adamw", ["exp_avg"]), ("adamw", ["exp_avg", "exp_avg_sq"]), ("sgd", ["momentum_buffer"])]
)
def test_averaged_optimizer_state(processes: Processes, optimizer: str, state: list[str], worker_size: int) -> None:
    qsr = {**QSR, "worker_size": worker_size}
    averaged = {**qsr, "averaging": {"state": state}}
    results = processes.run(train_job, ranks=2 * worker_size, qsr=averaged, optimizer=optimizer)
    oracle = expected(qsr, 2, optimizer=optimizer, state=tuple(state))
    assert furthest(results[0]["state"], oracle) == 0
    assert furthest(oracle, expected(qsr, 2, optimizer=optimizer)) > 0
    assert_silent(results, worker_size)


@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_bf16_computes_in_bf16_and_reduces_in_fp32(processes: Processes, optimizer: str, worker_size: int) -> None:
    """Bit for bit: gradients in bf16, their mean over a worker and the masters in fp32."""
    qsr = {**QSR, "worker_size": worker_size}
    results = processes.run(train_job, ranks=2 * worker_size, qsr=qsr, optimizer=optimizer, **BF16)
    assert results[0]["masters"] == ("Whole" if worker_size == 1 else "Shards")
    oracle = expected(qsr, 2, optimizer=optimizer, compute_dtype=torch.bfloat16, gradient_dtype=torch.float32)
    assert furthest(results[0]["state"], oracle) == 0
    assert_silent(results, worker_size)


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


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_fewer_bits_on_the_wire(processes: Processes, wire: str) -> None:
    """Rounded relative to the differences of the workers, which are at most 0.05 a step: near the reference, and the
    same on all workers."""
    qsr = {**QSR, "worker_size": 2, "averaging": {"wire_dtype": wire}}
    results = processes.run(train_job, ranks=4, qsr=qsr, optimizer="sgd")
    assert 0 < furthest(results[0]["state"], expected({**QSR, "worker_size": 2}, 2, optimizer="sgd")) < 2e-3
    assert_silent(results, 2)


def scheduled(step: int) -> float:
    """A schedule of the caller's own."""
    return 0.04 - 0.003 * step


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
    before = held()
    while not engine.local_steps.finished:
        engine.backward(engine(inputs).square().mean())
        with torch.profiler.profile(profile_memory=True) as profiler:
            boundary = engine.step()
        peaks[boundary] = max(most_memory(profiler), peaks.get(boundary, 0))
    return {"moved": held() != before, "extra": peaks[True] - peaks[False], "model": size}


def most_memory(profiler: Any) -> int:
    """The most bytes that torch held at a time, beyond what it held at the beginning."""
    events = profiler.profiler.kineto_results.events()
    most = kept = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        kept += change
        most = max(most, kept)
    return most


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
