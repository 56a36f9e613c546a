"""Checkpoints of the FSDP engine: exact resume, other workers, the other engine, files that are not to be trusted."""

from __future__ import annotations

import os
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.engines.fsdp import files as fsdp_checkpoint
from tests.support import training
from tests.support.fsdp_engine import (
    BF16,
    MODELS,
    STRATEGIES,
    batch_of,
    expected,
    furthest,
    mlp,
    scheduled,
    start,
    start_deepspeed,
    state_of,
    take_step,
)
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


def optimizer_state(engine: Any) -> dict[str, torch.Tensor]:
    """This worker's optimizer state, whole, under name and key."""
    return {
        f"{name} {key}": engine._driver.replica.whole(value).clone()
        for name, parameter in engine._named.items()
        for key, value in engine.optimizer.state[parameter].items()
    }


def train_job(
    folder: str,
    qsr: dict[str, Any],
    save_at: tuple[int, ...] = (),
    load: bool = False,
    stop_at: int = 10**9,
    model: str = "mlp",
    optimizer: str = "adamw",
    scheduler: bool = False,
    **config: Any,
) -> dict[str, Any]:
    """Train to the end or a step, from a checkpoint perhaps; what this rank holds then."""
    given = {"lr_scheduler": make_scheduler} if scheduler else None
    engine = start(qsr, MODELS[model](), optimizer, given, **config)
    if load:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.load_checkpoint(folder)
    began = engine.local_steps.step
    loaded = optimizer_state(engine)
    while not engine.local_steps.finished and engine.local_steps.step < stop_at:
        take_step(engine, model)
        if engine.local_steps.step in save_at:
            engine.save_checkpoint(folder)
    counts = {key: value for key, value in engine.local_steps.state_dict().items() if key != "seconds_averaging"}
    return {
        "state": state_of(engine),
        "optimizer": optimizer_state(engine),
        "counts": [counts, engine.global_steps, engine.global_samples, engine.get_lr()],
        "began": began,
        "loaded": loaded,
    }


def make_scheduler(optimizer: torch.optim.Optimizer) -> Any:
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(scheduled(step)))


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """The averaged model is on rank 0, and empty elsewhere."""
    return all(
        a["counts"] == b["counts"]
        and furthest(a["optimizer"], b["optimizer"]) == 0
        and (not a["state"] or furthest(a["state"], b["state"]) == 0)
        for a, b in zip(one, other, strict=True)
    )


WITHOUT_LR = {"warmup_steps": 3, **{key: value for key, value in QSR.items() if key != "lr"}}
RESUMED: dict[str, dict[str, Any]] = {
    "whole, AdamW": {"qsr": QSR},
    "whole, SGD, batch norm": {"qsr": QSR, "model": "resnet", "optimizer": "sgd"},
    "whole, a scheduler": {"qsr": WITHOUT_LR, "scheduler": True},
    "whole, bf16": {"qsr": QSR, **BF16},
    "shards, AdamW": {"qsr": {**QSR, "worker_size": 2}},
    "shards, SGD, batch norm": {"qsr": {**QSR, "worker_size": 2}, "model": "resnet", "optimizer": "sgd"},
    "shards, bf16, accumulation": {"qsr": {**QSR, "worker_size": 2}, "gradient_accumulation_steps": 2, **BF16},
    "shards, averaged state": {"qsr": {**QSR, "worker_size": 2, "averaging": {"state": ["exp_avg"]}}},
    "shards, int8": {"qsr": {**QSR, "worker_size": 2, "averaging": {"wire_dtype": "int8"}}},
    "parallel": {"qsr": {**STRATEGIES["parallel"], "worker_size": 2}},
    "post_local": {"qsr": {**STRATEGIES["post_local"], "worker_size": 2, "switch_step": 6}},
}


@pytest.mark.fast_cells(2, of=7)
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_gives_the_same_bits(processes: Processes, tmp_path: Path, name: str) -> None:
    job: dict[str, Any] = {"folder": str(tmp_path), **RESUMED[name]}
    ranks = 2 * job["qsr"].get("worker_size", 1)
    whole = processes.run(train_job, ranks=ranks, save_at=(4, 9), **job)  # on a boundary, and inside the last round
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step4", "global_step9", "latest"]
    workers = 1 if name == "parallel" else 2
    assert len(list((tmp_path / "global_step9").glob("worker-*"))) == workers, "a folder for every worker"
    resumed = processes.run(train_job, ranks=ranks, load=True, **job)
    assert resumed[0]["began"] == 9
    assert same(whole, resumed)


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize(("ranks", "worker_size"), [(1, 1), (2, 2), (3, 1), (4, 2)])
def test_another_number_of_workers_takes_the_mean_of_the_states(
    processes: Processes, tmp_path: Path, ranks: int, worker_size: int
) -> None:
    """Also workers of another size, since every rank reads its own parts; two workers of two ranks saved it."""
    saved = processes.run(
        train_job, ranks=4, folder=str(tmp_path), qsr={**QSR, "worker_size": 2}, save_at=(6,), stop_at=6
    )
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": {**QSR, "worker_size": worker_size}, "load": True}
    results = processes.run(train_job, ranks=ranks, stop_at=6, **job)
    first, second = saved[0]["optimizer"], saved[2]["optimizer"]
    assert furthest(first, second) > 0, "the workers were meant to differ"
    exact = (ranks, worker_size) == (4, 2)
    for rank, result in enumerate(results):
        assert result["began"] == 6
        if exact:
            assert furthest(result["loaded"], saved[rank]["optimizer"]) == 0
        else:
            mean = {key: (first[key] + second[key]) / 2 for key in first}
            assert furthest(result["loaded"], mean) <= 1e-8
    assert furthest(results[0]["state"], saved[0]["state"]) == 0


def test_fresh_leaves_the_optimizer_as_it_is(processes: Processes, tmp_path: Path) -> None:
    saved = processes.run(train_job, folder=str(tmp_path), qsr=QSR, save_at=(6,), stop_at=6)
    qsr = {**QSR, "on_other_workers": "fresh"}
    result = processes.run(train_job, ranks=1, folder=str(tmp_path), qsr=qsr, load=True, stop_at=6)[0]
    assert result["began"] == 6
    assert result["loaded"] == {}
    assert furthest(result["state"], saved[0]["state"]) == 0


class Frozen(nn.Module):
    """Batch norm, a frozen layer, and a buffer that is not in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(training.FEATURES, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, training.OUTPUTS).requires_grad_(False)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += inputs.abs().mean()
        outputs: torch.Tensor = self.frozen(self.norm(self.first(inputs)))
        return outputs


def frozen_job(folder: str, worker_size: int, load: bool, without_frozen: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(5 if load and not without_frozen else 1)  # what is left out must be in the model
    engine = start({**QSR, "worker_size": worker_size}, Frozen())
    if load:
        engine.load_checkpoint(folder)
    else:
        while engine.local_steps.step < 4:
            take_step(engine)
        engine.save_checkpoint(folder, exclude_frozen_parameters=without_frozen)
    return {**state_of(engine), "seen": engine.module.seen}


@pytest.mark.fast_cells(2, of=4)
@pytest.mark.parametrize("without_frozen", [False, True])
@pytest.mark.parametrize(("before", "after"), [((4, 2), (4, 1)), ((4, 2), (2, 2)), ((2, 1), (1, 1))])
def test_other_workers_take_buffers_and_frozen_parameters(
    processes: Processes, tmp_path: Path, before: tuple[int, int], after: tuple[int, int], without_frozen: bool
) -> None:
    """Batch-norm statistics used to be left behind, at 0 and 1, and so were frozen parameters."""
    job: dict[str, Any] = {"folder": str(tmp_path), "without_frozen": without_frozen}
    saved = processes.run(frozen_job, ranks=before[0], worker_size=before[1], load=False, **job)[0]
    loaded = processes.run(frozen_job, ranks=after[0], worker_size=after[1], load=True, **job)[0]
    assert furthest(loaded, saved) == 0
    assert float(saved["norm.running_var"].sub(1).abs().max()) > 0.01


def adapter_job(folder: str, qsr: dict[str, Any], **config: Any) -> list[Any]:
    """Train an adapter and save it with its base and without; the models, and the base after both are loaded again."""
    engine = start(qsr, MODELS["adapted"](), **config)
    while engine.local_steps.step < 6:
        take_step(engine, "adapted")
    engine.save_checkpoint(folder, tag="whole")
    engine.save_checkpoint(folder, tag="adapter", exclude_frozen_parameters=True)
    found = [state_of(engine)]
    for tag in ("adapter", "whole"):
        other: Any = MODELS["adapted"]()
        other.base.bias.data.fill_(0.25)
        other.up.bias.data.fill_(0.5)
        engine = start(qsr, other, **config)
        engine.load_checkpoint(folder, tag=tag)
        found.append(state_of(engine))
    while not engine.local_steps.finished:
        take_step(engine, "adapted")
    return [*found, state_of(engine), {str(p.dtype) for p in engine.module.base.parameters()}]


@pytest.mark.parametrize(("worker_size", "config"), [(1, BF16), (2, {})], ids=["copies", "shards"])
def test_an_adapter_on_a_frozen_base(
    processes: Processes, tmp_path: Path, worker_size: int, config: dict[str, Any]
) -> None:
    """A base in bf16 used to be refused, and one in fp32 to be written though it was left out."""
    qsr = {**QSR, "worker_size": worker_size}
    found = processes.run(adapter_job, ranks=2 * worker_size, folder=str(tmp_path), qsr=qsr, **config)[0]
    saved, adapter, whole, end, in_memory = found
    assert in_memory == {"torch.bfloat16"}
    assert {str(saved[name].dtype) for name in ("base.weight", "base.bias")} == {"torch.bfloat16"}
    assert {str(saved[name].dtype) for name in ("up.weight", "up.bias", "down.weight")} == {"torch.float32"}
    assert furthest(whole, saved) == 0
    assert float(adapter["base.bias"][0]) == 0.25, "what is not in the checkpoint is as it was given"
    assert all(torch.equal(adapter[name], saved[name]) for name in ("base.weight", "up.bias", "down.weight"))
    low: dict[str, Any] = {"compute_dtype": torch.bfloat16, "gradient_dtype": torch.float32} if config else {}
    assert furthest(end, expected(qsr, 2, "adapted", **low)) == 0
    for tag, names in (("whole", set(saved)), ("adapter", {"up.weight", "up.bias", "down.weight"})):
        assert set(load_file(tmp_path / tag / "model.safetensors")) == names
        for folder in (tmp_path / tag).glob("worker-*/fsdp"):
            written = fsdp_checkpoint.names(folder)
            assert {key.removeprefix("parameters/") for key in written if key.startswith("parameters/")} == names
            kept = {str(entry.properties.dtype) for key, entry in written.items() if key.startswith("parameters/base")}
            assert kept == ({"torch.bfloat16"} if tag == "whole" else set())


def rates_job(folder: str, engine: str, worker_size: int, load: dict[str, Any] | None) -> list[float]:
    """The learning rates of three steps under a scheduler that goes on from the rate that it finds."""
    import qsr_engine

    qsr = {"strategy": "constant", "h_base": 2, "total_steps": 8, "warmup_steps": 0, "worker_size": worker_size}
    config = {"train_micro_batch_size_per_gpu": training.BATCH, "qsr": {**qsr, "on_other_workers": "fresh"}}
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    made: Any
    if engine == "fsdp":
        made = qsr_engine.initialize_fsdp(model=mlp(), optimizer=sgd, config=config, lr_scheduler=halve)
    else:
        made = qsr_engine.initialize(model=mlp(), optimizer=sgd, config=config, lr_scheduler=halve)[0]
    if load is None:
        while made.local_steps.step < 4:
            take_step(made)
        made.save_checkpoint(folder)
    else:
        made.load_checkpoint(folder, **load)
    rates = []
    for _ in range(3):
        rates.append(float(made.get_lr()[0]))
        take_step(made)
    return rates


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.4)


@pytest.mark.fast_cells(3)
@pytest.mark.parametrize(("before", "after"), [("fsdp", "fsdp"), ("fsdp", "deepspeed"), ("deepspeed", "fsdp")])
@pytest.mark.parametrize("load", [{}, {"load_optimizer_states": False}])
def test_a_scheduler_goes_on_from_the_rate_that_was_saved(
    processes: Processes, tmp_path: Path, before: str, after: str, load: dict[str, Any]
) -> None:
    """Its counter alone would leave it at the first rate, 16 times too high, for good."""
    other = {"worker_size": 2 if before == after else 1}
    wanted = processes.run(rates_job, folder=str(tmp_path), engine=before, worker_size=1, load=None)[0]
    found = processes.run(rates_job, folder=str(tmp_path), engine=after, load=load, **other)[0]
    assert wanted == found == [0.4 / 16, 0.4 / 32, 0.4 / 64]


def fp64_job(folder: str, load: bool) -> dict[str, torch.Tensor]:
    engine = start(QSR, training.make_model(torch.float64), "sgd")
    if load:
        engine.load_checkpoint(folder)
    while engine.local_steps.step < 6:
        inputs, targets = training.batch(int(os.environ["RANK"]), engine.local_steps.step)
        engine.backward(training.loss(engine(inputs), targets))
        engine.step()
    if not load:
        engine.save_checkpoint(folder)
    return optimizer_state(engine)


def test_the_mean_of_states_in_fp64(processes: Processes, tmp_path: Path) -> None:
    """The sums used to be the very tensors that the next worker's state was read into."""
    first, second = processes.run(fp64_job, folder=str(tmp_path), load=False)
    found = processes.run(fp64_job, ranks=1, folder=str(tmp_path), load=True)[0]
    mean = {key: (first[key] + second[key]) / 2 for key in first}
    assert furthest(found, mean) <= 1e-15
    assert furthest(first, second) > 0.01


# ----------------------------------------------------------------------------------------- the other engine


def move_job(folder: str, worker_size: int, to: str, stage: int, module_only: bool) -> dict[str, Any]:
    """Save with one engine, load with the other; both models, on rank 0."""
    qsr = {**QSR, "worker_size": worker_size}
    kinds = {"fsdp": lambda q: start(q, MODELS["resnet"](), "sgd")}
    kinds["deepspeed"] = lambda q: start_deepspeed(q, MODELS["resnet"](), "sgd", stage)
    engine = kinds["deepspeed" if to == "fsdp" else "fsdp"](qsr)
    while engine.local_steps.step < 4:
        take_step(engine, "resnet")
    engine.save_checkpoint(folder)
    saved = state_of(engine)
    engine.destroy()
    other = kinds[to]({**qsr, "on_other_workers": "fresh"})
    other.load_checkpoint(folder, load_module_only=module_only)
    step, loaded = other.local_steps.step, state_of(other)
    while not other.local_steps.finished:
        take_step(other, "resnet")
    return {"saved": saved, "loaded": loaded, "step": step, "global_steps": other.global_steps}


@pytest.mark.fast_cells(0, of=3)
@pytest.mark.parametrize(
    ("to", "worker_size", "stage", "module_only"),
    [("fsdp", 2, 3, True), ("deepspeed", 1, 0, True), ("deepspeed", 2, 3, False)],
)
def test_a_model_moves_between_the_engines(
    processes: Processes, tmp_path: Path, worker_size: int, stage: int, to: str, module_only: bool
) -> None:
    """The parameters and batch-norm statistics alone, or with the step; the optimizer starts anew."""
    job: dict[str, Any] = {"folder": str(tmp_path), "worker_size": worker_size, "to": to, "stage": stage}
    result = processes.run(move_job, ranks=2 * worker_size, module_only=module_only, **job)[0]
    assert furthest(result["loaded"], result["saved"]) == 0
    assert result["step"] == (0 if module_only else 4)
    assert result["global_steps"] == 12


def strange_job(folder: str) -> None:
    start(QSR).load_checkpoint(folder, custom_load_fn=print)


def test_arguments_that_mean_nothing_are_refused(processes: Processes, tmp_path: Path) -> None:
    processes.run(train_job, folder=str(tmp_path), qsr=QSR, save_at=(6,), stop_at=6)
    with pytest.raises(JobError, match=r"load_checkpoint\(custom_load_fn=...\) means nothing to the FSDP engine"):
        processes.run(strange_job, folder=str(tmp_path))


def test_the_other_engines_optimizer_is_refused(processes: Processes, tmp_path: Path) -> None:
    processes.run(train_job, folder=str(tmp_path), qsr=QSR, save_at=(6,), stop_at=6)
    with pytest.raises(JobError, match=r"engine was 'fsdp' and is 'deepspeed'.*on_other_workers 'fresh'"):
        processes.run(deepspeed_load_job, folder=str(tmp_path))


def deepspeed_load_job(folder: str) -> None:
    start_deepspeed(QSR, mlp(), "adamw", 0).load_checkpoint(folder)


# ------------------------------------------------------------------------- torn, altered, full, not to be trusted


def test_an_altered_checkpoint_is_passed_over(processes: Processes, tmp_path: Path) -> None:
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": {**QSR, "worker_size": 2}, "ranks": 4}
    whole = processes.run(train_job, save_at=(4, 6), **job)
    part = next((tmp_path / "global_step6" / "worker-00001" / "fsdp").glob("*.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    resumed = processes.run(train_job, load=True, **job)
    assert resumed[0]["began"] == 4
    assert same(whole, resumed)


def full_disk_job(folder: str) -> str:
    """The third rank cannot write its part; what every rank is told."""
    import torch.distributed as dist
    from torch.distributed.checkpoint import filesystem

    engine = start({**QSR, "worker_size": 2})
    while engine.local_steps.step < 4:
        take_step(engine)
    engine.save_checkpoint(folder)
    while engine.local_steps.step < 6:
        take_step(engine)
    write = filesystem._write_item

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 2:
        filesystem._write_item = fail
    try:
        engine.save_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    finally:
        filesystem._write_item = write
    return "saved"


def test_a_rank_that_cannot_write_is_an_error_on_every_rank(processes: Processes, tmp_path: Path) -> None:
    """And the checkpoint before is as it was; nothing of the new one is left."""
    for said in processes.run(full_disk_job, ranks=4, folder=str(tmp_path)):
        assert "No space left on device" in said
        assert "rank 2" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step4", "latest"]
    assert processes.run(train_job, ranks=4, folder=str(tmp_path), qsr={**QSR, "worker_size": 2}, load=True, stop_at=4)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), pickle.dumps({"a": 1}), b"", b"\x80", b"cos\nsystem\n."])
def test_the_list_of_tensors_runs_no_code(tmp_path: Path, content: bytes) -> None:
    """torch reads .metadata with pickle; here it makes torch's own classes only."""
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: "):
        fsdp_checkpoint.names(tmp_path)


def inside_job(folder: str, where: str) -> None:
    engine = start(QSR, gradient_accumulation_steps=2)
    while not engine.local_steps.finished:
        inputs, targets = batch_of("mlp", 0, 0)
        engine.backward(training.loss(engine(inputs), targets))
        if where == "backward" and engine.local_steps.step == 4:
            engine.save_checkpoint(folder)
        boundary = engine.step()
        if where == "accumulation" and engine.local_steps.step == 4 and not boundary:
            engine.save_checkpoint(folder)


@pytest.mark.parametrize("where", ["accumulation", "backward"])
def test_nothing_is_saved_inside_a_step(processes: Processes, tmp_path: Path, where: str) -> None:
    with pytest.raises(JobError, match="1 of the 2 micro-batches of step 4"):
        processes.run(inside_job, folder=str(tmp_path), where=where)
