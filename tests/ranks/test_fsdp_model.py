"""Models under the FSDP engine: blocks, shared and frozen weights, the meta device, recomputation, errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import reference, training
from tests.support.counting import collectives_across_workers
from tests.support.fsdp_engine import (
    expected,
    furthest,
    image_batch,
    start,
    state_of,
    take_step,
    vit,
)
from tests.support.pool import JobError, Processes
from tests.support.training import QSR, memory_of

SHARDS = {**QSR, "worker_size": 2}


# ------------------------------------------------------------------------------------------- difficult models


class Odd(nn.Module):
    """Shared weights across blocks, a frozen layer, parameters that do not divide, one of a single element."""

    def __init__(self) -> None:
        super().__init__()
        width = training.FEATURES
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.blocks[2][0].weight = self.blocks[0][0].weight  # type: ignore[index]
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(width, training.OUTPUTS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        scores: torch.Tensor = self.head(self.frozen(inputs) * self.scale)
        return scores


def odd() -> nn.Module:
    torch.manual_seed(3)
    return Odd()


def odd_job(worker_size: int) -> dict[str, Any]:
    engine = start({**QSR, "worker_size": worker_size}, odd())
    while not engine.local_steps.finished:
        take_step(engine)
    return state_of(engine)


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("worker_size", [1, 2])
def test_shared_frozen_and_tiny_weights(processes: Processes, worker_size: int) -> None:
    """Bit for bit as the reference: shared weights stay shared, frozen ones stay as they are."""
    found = processes.run(odd_job, ranks=2 * worker_size, worker_size=worker_size)[0]
    models, _ = reference.simulate(
        odd,
        partial(training.make_optimizer, "adamw"),
        lambda rank, step: [training.batch(rank, step, dtype=torch.float32)],
        {**QSR, "worker_size": worker_size},
        2,
        worker_size=worker_size,
    )
    assert furthest(found, {name: value.detach() for name, value in models[0].state_dict().items()}) == 0
    assert torch.equal(found["blocks.0.0.weight"], found["blocks.2.0.weight"])
    assert torch.equal(found["frozen.weight"], odd().state_dict()["frozen.weight"])


def unused_job(worker_size: int) -> list[tuple[bool, int]]:
    """The second worker does not use one layer; its ranks agree in that."""
    import torch.distributed as dist

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(training.FEATURES, training.FEATURES) for _ in range(2))
            self.head = nn.Linear(training.FEATURES, training.OUTPUTS)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs = self.layers[0](inputs)
            if dist.get_rank() < worker_size:
                outputs = self.layers[1](outputs)
            scores: torch.Tensor = self.head(outputs)
            return scores

    torch.manual_seed(0)
    engine = start({**QSR, "worker_size": worker_size, "averaging": {"state": ["exp_avg"]}}, Half())
    counts = []
    while not engine.local_steps.finished:
        before = collectives_across_workers(worker_size)
        boundary = take_step(engine)
        counts.append((boundary, collectives_across_workers(worker_size) - before))
    return counts


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("worker_size", [1, 2])
def test_a_layer_that_one_worker_does_not_use(processes: Processes, worker_size: int) -> None:
    for counts in processes.run(unused_job, ranks=2 * worker_size, worker_size=worker_size):
        assert [count for boundary, count in counts if not boundary] == [0] * 7


def evaluation_job(worker_size: int) -> dict[str, Any]:
    """Evaluate between the backward and the step, and after every boundary: forwards that no backward follows."""
    import torch.distributed as dist

    engine = start({**QSR, "worker_size": worker_size}, vit())
    images = torch.ones(2, 3, 8, 8)
    scores = []
    while not engine.local_steps.finished:
        inputs, targets = image_batch(dist.get_rank(), engine.local_steps.step)
        engine.backward(training.loss(engine(inputs), targets))
        with torch.no_grad():
            engine.module(images)  # leaves the parameters of before the step gathered
        if engine.step():
            with torch.no_grad():
                scores.append(engine.module(images))
    return {"state": state_of(engine), "scores": scores}


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("worker_size", [1, 2])
def test_evaluations_see_and_leave_the_present_parameters(processes: Processes, worker_size: int) -> None:
    """The same bits as a run without them, and after a boundary the same scores on every rank."""
    results = processes.run(evaluation_job, ranks=2 * worker_size, worker_size=worker_size)
    assert furthest(results[0]["state"], expected({**QSR, "worker_size": worker_size}, 2, "vit")) == 0
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result["scores"], results[0]["scores"], strict=True))


# ------------------------------------------------------------------------------------- blocks and how they are made


def blocks_job(wrap: str) -> list[str]:
    """Names of the modules that FSDP manages, the root's is empty."""
    from timm.models.vision_transformer import Attention
    from torch.distributed.fsdp import FSDPModule

    choices: dict[str, Any] = {"found": None, "classes": Attention, "function": lambda m: isinstance(m, nn.LayerNorm)}
    engine = start(SHARDS, vit(), given={"wrap": choices[wrap]})
    take_step(engine, "vit")
    return [name for name, module in engine.module.named_modules() if isinstance(module, FSDPModule)]


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        ("found", ["", "blocks.0", "blocks.1", "blocks.2"]),
        ("classes", ["", *(f"blocks.{number}.attn" for number in range(3))]),
        ("function", ["", *(f"blocks.{n}.norm{k}" for n in range(3) for k in (1, 2)), "norm"]),
    ],
)
def test_blocks_are_found_or_chosen(processes: Processes, wrap: str, names: list[str]) -> None:
    assert processes.run(blocks_job, ranks=4, wrap=wrap)[0] == names


def meta_job(worker_size: int, init: bool, depth: int) -> dict[str, Any]:
    """A model made on the meta device; its parameters, and the most memory that a rank took for it."""
    torch.manual_seed(int(os.environ["RANK"]))
    with torch.device("meta"):
        width = 256
        body = [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(depth)]
        model = nn.Sequential(nn.Linear(training.FEATURES, width), *body, nn.Linear(width, training.OUTPUTS))
    if init:

        def fill(module: nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.fill_(0.5)

    # Mapping the other workers' shared memory would count as taking it.
    qsr = {**QSR, "worker_size": worker_size, "averaging": {"shared_memory": False}}
    started: list[Any] = []
    _, most = memory_of(lambda: started.append(start(qsr, model, given={"init": fill} if init else None)))
    (engine,) = started
    state = state_of(engine)
    take_step(engine)
    return {"state": state, "most": most, "whole": sum(p.numel() * 4 for p in model.parameters())}


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(("worker_size", "init"), [(2, False), (1, True)])
def test_a_model_on_the_meta_device_is_made_block_by_block(processes: Processes, worker_size: int, init: bool) -> None:
    """Rank 0's values on every worker. A rank of two takes its half of 3.2 MB and a block at a time."""
    results = processes.run(meta_job, ranks=2 * worker_size, worker_size=worker_size, init=init, depth=12)
    state = results[0]["state"]
    assert all(bool(value.isfinite().all()) for value in state.values())
    if init:
        assert all(bool((value == 0.5).all()) for value in state.values())
    else:
        assert bool((state["1.1.weight"] == 1).all())
        assert float(state["1.0.weight"].std()) == pytest.approx(1 / (3 * 256) ** 0.5, rel=0.05)
    if worker_size == 2:
        assert all(result["most"] < 0.75 * result["whole"] for result in results)


def trained_job(qsr: dict[str, Any], **fsdp: Any) -> dict[str, Any]:
    engine = start(qsr, vit(), fsdp=fsdp)
    while not engine.local_steps.finished:
        take_step(engine, "vit")
    return state_of(engine)


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize("option", ["activation_checkpointing", "reshard_after_forward"])
def test_options_that_change_memory_and_no_bits(processes: Processes, option: str, worker_size: int) -> None:
    qsr = {**QSR, "worker_size": worker_size}
    plain, other = (
        processes.run(trained_job, ranks=2 * worker_size, qsr=qsr, **{option: value})[0] for value in (False, True)
    )
    assert furthest(plain, other) == 0


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes C++ here, and there is no compiler")
@pytest.mark.parametrize("worker_size", [1, 2])
def test_compiled_blocks(processes: Processes, worker_size: int) -> None:
    """Compiled code fuses and orders sums otherwise: 2^-20 relative of gradients, and Adam's first steps are of the
    size of the learning rate whatever the gradient, so a sign near 0 moves single parameters by some steps of 0.05."""
    qsr = {"strategy": "constant", "h_base": 2, "total_steps": 4, "worker_size": worker_size}
    qsr["lr"] = {"schedule": "constant", "peak": 1e-3}
    found = processes.run(trained_job, ranks=2 * worker_size, seconds=400, qsr=qsr, compile=True)[0]
    plain = processes.run(trained_job, ranks=2 * worker_size, qsr=qsr)[0]
    assert furthest(found, plain) <= 4 * 1e-3
    differences = torch.cat([(found[name] - plain[name]).flatten().abs() for name in plain])
    assert float(differences.median()) <= 1e-7


class Parts(nn.Module):
    """A module that stands in three blocks, and a buffer that is made anew in every forward."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(training.FEATURES, training.FEATURES)
        width = training.FEATURES
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh(), shared) for _ in range(3))
        self.head = nn.Linear(width, training.OUTPUTS)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(training.FEATURES))
        self.register_buffer("expanded", torch.ones(1, 4).expand(3, 4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        self.mean = 0.5 * self.mean + 0.5 * inputs.detach().mean(0)
        outputs: torch.Tensor = self.head(inputs)
        return outputs


def parts_job(worker_size: int) -> tuple[dict[str, Any], torch.Tensor]:
    torch.manual_seed(2)
    engine = start({**QSR, "worker_size": worker_size}, Parts())
    while not engine.local_steps.finished:
        take_step(engine)
    return state_of(engine), engine.module.mean


@pytest.mark.parametrize("worker_size", [1, 2])
def test_a_module_in_several_blocks_and_a_buffer_made_anew(processes: Processes, worker_size: int) -> None:
    results = processes.run(parts_job, ranks=2 * worker_size, worker_size=worker_size)
    state = results[0][0]
    assert torch.equal(state["blocks.0.2.weight"], state["blocks.2.2.weight"])
    assert all(torch.equal(mean, results[0][1]) for _, mean in results), "the buffer that is there now is averaged"
    assert torch.equal(state["expanded"], torch.ones(3, 4))


def state_dict_job() -> list[str]:
    """A whole worker in bf16: what a caller reads and writes are the fp32 parameters, also after a forward."""
    engine = start(QSR, vit(), bf16={"enabled": True})
    take_step(engine, "vit")
    images = torch.ones(2, 3, 8, 8)
    with torch.no_grad():
        engine.module(images)
        before = engine.module(images).clone()
        state = {name: 2 * value for name, value in engine.module.state_dict().items()}
        engine.module.load_state_dict(state)
        after = engine.module(images)
    assert not torch.equal(before, after)
    assert all(torch.equal(value, state[name]) for name, value in engine.module.state_dict().items())
    return sorted({str(value.dtype) for value in state.values()})


def test_a_callers_state_dict_is_in_fp32(processes: Processes) -> None:
    assert processes.run(state_dict_job)[0] == ["torch.float32"]


def last_micro_batch_job() -> None:
    """A block that only the first of two micro-batches uses, under `parallel`."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = training.FEATURES
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Sequential()) for _ in range(2))
            self.head = nn.Linear(width, training.OUTPUTS)
            self.skip = False

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            inputs = self.blocks[0](inputs)
            outputs: torch.Tensor = self.head(inputs if self.skip else self.blocks[1](inputs))
            return outputs

    model = Skips()
    qsr = {"strategy": "parallel", "total_steps": 2, "lr": {"schedule": "constant", "peak": 0.1}}
    engine = start(qsr, model, gradient_accumulation_steps=2)
    for micro in range(2):
        model.skip = micro == 1
        inputs, targets = training.batch(0, 0, dtype=torch.float32)
        engine.backward(training.loss(engine(inputs), targets))
        engine.step()


def test_a_block_that_the_last_micro_batch_skips_is_an_error(processes: Processes) -> None:
    """torch's HSDP would keep its gradient back, for ever."""
    with pytest.raises(JobError, match=r"the block 'blocks.1' was used in an earlier micro-batch of step 0"):
        processes.run(last_micro_batch_job)


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.slow
def test_it_needs_no_deepspeed() -> None:
    """Training in a process where deepspeed cannot be imported."""
    code = """
import sys
sys.modules["deepspeed"] = None
import torch, qsr_engine
config = {"train_batch_size": 2, "qsr": {"strategy": "constant", "h_base": 2, "total_steps": 3,
          "lr": {"schedule": "constant", "peak": 0.1}}}
engine = qsr_engine.initialize_fsdp(
    model=torch.nn.Linear(3, 1), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), config=config
)
while not engine.local_steps.finished:
    engine.backward(engine(torch.ones(2, 3)).mean())
    engine.step()
print("averagings", engine.local_steps.averagings)
"""
    from tests.support.pool import free_port, rank_environment

    environment = {**os.environ, **rank_environment(0, 1, free_port()), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "averagings 2" in done.stdout, done.stderr
