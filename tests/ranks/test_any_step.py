"""Saved, evaluated and stopped at any step, inside a round too: training goes on as if nothing had been."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import training
from tests.support.own_parameters import own_parameters
from tests.support.pool import Processes
from tests.support.training import QSR

SIZES: dict[str, Any] = {"train_micro_batch_size_per_gpu": training.BATCH, "gradient_clipping": 1.0}
BF16_STAGE_1: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}
DELAYED = {"overlap": "delayed", "delay_steps": 3}
# 12 steps in rounds that end after steps 2, 4, 6, 8 and 12.
SETTINGS: dict[str, dict[str, Any]] = {
    "deepspeed": {},
    "deepspeed, next_forward": {"qsr": {"averaging": {"overlap": "next_forward"}}},
    "deepspeed, delayed": {"qsr": {"averaging": DELAYED}},
    "deepspeed, stage 1, bf16, int8": {"config": BF16_STAGE_1, "qsr": {"averaging": {"wire_dtype": "int8"}}},
    "deepspeed, stage 3, outer": {
        "config": {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True},
        "qsr": {"outer": {"lr": 0.7, "momentum": 0.9, "nesterov": True}, "worker_size": 2},
    },
    "fsdp, shards, delayed": {"fsdp": True, "qsr": {"worker_size": 2, "averaging": DELAYED}},
    "fsdp, bf16, outer": {"fsdp": True, "config": {"bf16": {"enabled": True}}, "qsr": {"outer": {"momentum": 0.5}}},
}


class Centred(nn.Module):
    """Takes off a running mean, as batch norm does, in any type; counts as batch norm does."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(10))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0).to(self.mean.dtype), 0.1)
                self.count += 1
        return x - self.mean.to(x.dtype)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        first, last = nn.Linear(training.FEATURES, 10), nn.Linear(10, training.OUTPUTS)
    return nn.Sequential(first, Centred(), nn.Dropout(0.2), last)


def start(setting: str, **more: Any) -> Any:
    import qsr_engine

    given = SETTINGS[setting]
    config = {**SIZES, **given.get("config", {}), "qsr": {**QSR, **given.get("qsr", {}), **more}}
    optimizer = partial(training.make_optimizer, "adamw")
    torch.manual_seed(int(os.environ["RANK"]))
    if given.get("fsdp"):
        return qsr_engine.initialize_fsdp(model=model(), optimizer=optimizer, config=config)
    return qsr_engine.initialize(model=model(), optimizer=optimizer, config=config)[0]


def inputs_of(engine: Any, step: int) -> tuple[Tensor, Tensor]:
    inputs, targets = training.batch(torch.distributed.get_rank(), step, dtype=torch.float32)
    return inputs.to(dtype_of(engine)), targets


def dtype_of(engine: Any) -> torch.dtype:
    """In which DeepSpeed's model wants its inputs."""
    dtype: torch.dtype = next(engine.module.parameters()).dtype
    return dtype


def take_step(engine: Any) -> bool:
    inputs, targets = inputs_of(engine, engine.local_steps.step)
    engine.backward(training.loss(engine(inputs).float(), targets))
    return bool(engine.step())


def held(engine: Any) -> list[Tensor]:
    """Masters, optimizer state and buffers of this rank, and what its next forward computes."""
    engine.local_steps.finish()
    replica = engine._driver.replica
    state = [value for _, _, value in replica.state_tensors()]
    buffers = list(engine.module.buffers())
    engine.module.eval()
    with torch.no_grad():
        seen = engine(inputs_of(engine, 77)[0]).float()
    engine.module.train()
    return [value.detach().clone() for value in (*replica.masters(), *state, *buffers, seen)]


def any_step_job(setting: str, folder: str, saved_at: list[int]) -> dict[str, Any]:
    """A run that is left alone; one that is evaluated and saved again and again; and runs that go on from there."""
    alone = start(setting)
    traces: dict[int, list[Tensor]] = {}
    while not alone.local_steps.finished:
        take_step(alone)
        traces[alone.local_steps.step] = held(alone)
    counts = alone.local_steps.state_dict()

    engine = start(setting)
    own, averages, seen, bits = {}, {}, {}, []
    while not engine.local_steps.finished:
        step = engine.local_steps.step
        if step in saved_at:
            own[step] = own_parameters(engine)
            with engine.averaged():
                averages[step] = own_parameters(engine)
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    engine.module.eval()
                    seen[step] = engine.module(training.batch(9, 9, dtype=torch.float32)[0].to(dtype_of(engine)))
                    engine.module.train()
                    engine.module(inputs_of(engine, 5)[0])  # the running mean moves
            engine.save_checkpoint(folder, tag=f"at-{step}")
        take_step(engine)
        bits.append(all(map(torch.equal, held(engine), traces[engine.local_steps.step])))
    resumed = {}
    for step in saved_at:
        other = start(setting)
        other.load_checkpoint(folder, tag=f"at-{step}")
        assert other.local_steps.step == step
        went_on = []
        while not other.local_steps.finished:
            take_step(other)
            went_on.append(all(map(torch.equal, held(other), traces[other.local_steps.step])))
        resumed[step] = all(went_on) and costs_of(other.local_steps.state_dict()) == costs_of(counts)
    return {"bits": bits, "resumed": resumed, "own": own, "averages": averages, "seen": seen}


def costs_of(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "seconds_averaging"}


@pytest.mark.fast_cells(2, of=5)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_goes_on_as_if_nothing_had_been(processes: Processes, tmp_path: Path, setting: str) -> None:
    """Evaluated and saved inside rounds and on boundaries; and every checkpoint gives the run that was left alone."""
    saved_at = [1, 4, 5, 9]
    worker_size = SETTINGS[setting].get("qsr", {}).get("worker_size", 1)
    results = processes.run(
        any_step_job, ranks=2 * worker_size, setting=setting, folder=str(tmp_path), saved_at=saved_at, seconds=400
    )
    for result in results:
        assert all(result["bits"])
        assert result["resumed"] == dict.fromkeys(saved_at, True)
    for step in saved_at:
        first, second = results[0]["own"][step], results[worker_size]["own"][step]
        inside = step != 4 or "delayed" in setting
        assert any(not torch.equal(first[name], second[name]) for name in first) == inside
        file = load_file(tmp_path / f"at-{step}" / "model.safetensors")
        for name, value in first.items():
            of_all = torch.stack([result["own"][step][name] for result in results]).mean(0)  # in fp64
            for result in results:
                torch.testing.assert_close(result["averages"][step][name], of_all, rtol=1e-6, atol=1e-7)  # of fp32
                assert torch.equal(result["averages"][step][name], results[0]["averages"][step][name])
                assert torch.equal(result["seen"][step], results[0]["seen"][step]), "one model on all ranks"
            assert torch.equal(file[name].double(), results[0]["averages"][step][name]), value.shape
        manifest = json.loads((tmp_path / f"at-{step}" / "manifest.json").read_text())
        assert manifest["inside_round"] == inside


def end_job(setting: str) -> dict[str, Any]:
    """Three steps of rounds of 2, the round ended by hand, and on to the end."""
    engine = start(setting)
    for _ in range(3):
        take_step(engine)
    before = own_parameters(engine)
    ended, again = engine.end_round(), engine.end_round()
    state = engine.local_steps
    after, position = own_parameters(engine), (state.step, state.round, state.period, state.averagings)
    ends = []
    while not state.finished:
        if take_step(engine):
            ends.append(state.step)
    return {"said": (ended, again), "before": before, "after": after, "position": position, "ends": ends}


@pytest.mark.parametrize("setting", ["deepspeed", "deepspeed, delayed", "fsdp, bf16, outer"])
def test_a_round_is_ended_by_hand(processes: Processes, setting: str) -> None:
    first, second = processes.run(end_job, setting=setting)
    if setting == "deepspeed":  # the others' end of a round is not the plain mean of what is there
        for name, value in first["after"].items():
            assert not torch.equal(first["before"][name], second["before"][name])
            mean = (first["before"][name] + second["before"][name]) / 2
            torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-7)  # fp32
    assert first["said"] == (True, False), "on a boundary there is none to end"
    assert first["position"] == (3, 2, 2, 2), "step, round, period and averagings"
    assert first["ends"] == [5, 7, 9, 12]
    for name, value in first["after"].items():
        assert torch.equal(value, second["after"][name])


def inside_job(folder: str) -> list[str]:
    """What would save the average as a worker's own, or be undone when the average is left."""
    engine, said = start("deepspeed"), []
    take_step(engine)
    own = own_parameters(engine)
    with engine.averaged():
        save, load = (partial(call, folder) for call in (engine.save_checkpoint, engine.load_checkpoint))
        for wrong in (engine.end_round, save, load):
            with pytest.raises(RuntimeError) as caught:
                wrong()
            said.append(str(caught.value))
        average = own_parameters(engine)
        with engine.averaged():
            assert all(torch.equal(value, average[name]) for name, value in own_parameters(engine).items())
        of_all = engine.averaged_state_dict()
        assert all(torch.equal(value.double(), average[name]) for name, value in of_all.items() if name in average)
        with pytest.raises(RuntimeError, match=r"backward\(\) inside `with engine.averaged"):
            take_step(engine)
        with pytest.raises(RuntimeError, match="would lose an update"):
            engine.step()
    assert all(torch.equal(value, own[name]) for name, value in own_parameters(engine).items() if "mean" not in name)
    return said


def test_what_the_average_would_undo_is_refused_inside_of_it(processes: Processes, tmp_path: Path) -> None:
    for said in processes.run(inside_job, folder=str(tmp_path)):
        whats = ("end_round()", "save_checkpoint()", "load_checkpoint()")
        assert [text.partition(" inside `with engine.averaged():`")[0] for text in said] == list(whats)
    assert not any(tmp_path.iterdir())


def apart_job(folder: str) -> str:
    """Rank 0 evaluates, or saves, where rank 1 goes on to a boundary."""
    engine = start("deepspeed")
    take_step(engine)
    try:
        if os.environ["RANK"] == "0" and folder:
            engine.save_checkpoint(folder)
        elif os.environ["RANK"] == "0":
            with engine.averaged():
                return "it entered"
        take_step(engine)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "it went on"


@pytest.mark.parametrize("saves", [False, True])
def test_a_rank_that_does_not_enter_is_named(processes: Processes, tmp_path: Path, saves: bool) -> None:
    for said in processes.run(apart_job, folder=str(tmp_path) if saves else ""):
        assert said.startswith("BoundaryError")
        assert "in engine.averaged() or save_checkpoint() on rank 0; at the end of a round on rank 1" in said
