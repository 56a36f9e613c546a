"""Checkpoints of models with frozen parameters and batch norm, for other workers, and as a model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import training
from tests.support.checkpointed import RESUMED, finish, train_job
from tests.support.combinations import Combination, start, take_step, whole_masters
from tests.support.heard import messages_of_this_job
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


class Mixed(nn.Module):
    """Tied weights, a frozen parameter, one that is not used, one that the optimizer does not have, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(training.FEATURES, training.OUTPUTS)
        self.decoder = nn.Linear(training.FEATURES, training.OUTPUTS)
        self.decoder.weight = self.encoder.weight
        self.norm = nn.BatchNorm1d(training.OUTPUTS)
        self.frozen = nn.Parameter(torch.full((training.OUTPUTS,), 0.1), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))
        self.left_out = nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.norm(self.encoder(inputs)) + self.decoder(inputs)
        return outputs * self.frozen


def mixed_job(
    folder: str, qsr: dict[str, Any], stage: int, load: dict[str, Any] | None, frozen: bool
) -> dict[str, Any]:
    import torch.distributed as dist

    import qsr_engine

    torch.manual_seed(5 if load is None else 6)
    model = Mixed()
    if load is not None and frozen:
        model.frozen.data.zero_()  # what is not in the checkpoint must be in the model
    parameters = [p for name, p in model.named_parameters() if name != "left_out"]
    config = {**Combination(stage, "fp32", "SGD").config(), "qsr": qsr}
    optimizer = training.make_optimizer("sgd", parameters)
    engine = qsr_engine.initialize(model=model, optimizer=optimizer, config=config)[0]
    if load is not None:
        engine.load_checkpoint(folder, **load)
        loaded = engine.averaged_state_dict()
    while not engine.local_steps.finished:
        take_step(engine, Combination(stage, "fp32", "SGD"))
        if load is None and engine.local_steps.step == 5:  # inside a round
            engine.save_checkpoint(folder, exclude_frozen_parameters=not frozen)
            loaded = engine.averaged_state_dict()
    own = [buffer.clone() for buffer in engine.module.buffers()]
    gathered = [torch.zeros_like(own[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own[0])
    return {
        "loaded": loaded,
        "end": engine.averaged_state_dict(),
        "buffers": own,
        "mean": torch.stack(gathered).mean(0),
    }


@pytest.mark.fast_cells(3, of=5)
@pytest.mark.parametrize("frozen", [True, False], ids=["", "without frozen"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_tied_unused_parameters_and_batch_norm(
    processes: Processes, tmp_path: Path, stage: int, frozen: bool
) -> None:
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": QSR, "stage": stage, "frozen": frozen}
    whole = processes.run(mixed_job, load=None, **job)
    exported = load_file(tmp_path / "global_step5" / "model.safetensors")
    assert set(exported) == set(Mixed().state_dict()) - (set() if frozen else {"frozen"})
    assert all(torch.equal(whole[0]["loaded"][name], value) for name, value in exported.items())
    resumed = processes.run(mixed_job, load={}, **job)
    for one, other in zip(whole, resumed, strict=True):
        for part in ("loaded", "end"):
            assert one[part].keys() == other[part].keys()
            assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
        assert all(torch.equal(a, b) for a, b in zip(one["buffers"], other["buffers"], strict=True))


@pytest.mark.fast_cells(2, of=5)
@pytest.mark.parametrize(
    "load", [{"load_optimizer_states": False}, {"load_module_only": True}], ids=lambda x: next(iter(x))
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_alone(processes: Processes, tmp_path: Path, stage: int, load: dict[str, Any]) -> None:
    """The masters are those of the checkpoint, whatever the stage, with frozen parameters and all."""
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": QSR, "frozen": True}
    saved = processes.run(mixed_job, load=None, stage=1, **job)[0]["loaded"]
    with_fresh = {**job, "qsr": {**QSR, "on_other_workers": "fresh"}}
    loaded = processes.run(mixed_job, load=load, stage=stage, **with_fresh)[0]["loaded"]
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())


@pytest.mark.parametrize("strategy", ["parallel", "post_local"])
def test_batch_norm_in_parallel_phases(processes: Processes, tmp_path: Path, strategy: str) -> None:
    """Every rank has statistics of its own there: they come back, and the saved model has their mean."""
    switch = {"switch_step": 12} if strategy == "post_local" else {}
    qsr = {"strategy": strategy, "total_steps": 12, "lr": QSR["lr"], **switch}
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": qsr, "stage": 0, "frozen": True}
    whole = processes.run(mixed_job, load=None, **job)
    resumed = processes.run(mixed_job, load={}, **job)
    assert not torch.equal(whole[0]["buffers"][0], whole[1]["buffers"][0])
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["buffers"], other["buffers"], strict=True))
    torch.testing.assert_close(whole[0]["end"]["norm.running_mean"], whole[0]["mean"])


def states_job(combination: Combination, folder: str, qsr: dict[str, Any], load: bool, step: int = 4) -> dict[str, Any]:
    """Parameters and optimizer state after so many steps, saved there, or as they are loaded."""
    said = messages_of_this_job()
    engine = start(combination, qsr)
    if load:
        engine.load_checkpoint(folder)
    else:
        while engine.local_steps.step < step:
            take_step(engine, combination)
        engine.save_checkpoint(folder)
    masters = engine._driver.replica
    state = {name: [t.clone() for t in masters.state(name) if t is not None] for name in ("exp_avg", "exp_avg_sq")}
    found = {"masters": whole_masters(engine), "state": state, "position": engine.local_steps.state_dict()}
    found["said"] = list(said)
    return {**found, "end": finish(engine, combination)["masters"] if load else None}


@pytest.mark.fast_cells(3)
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_number_of_workers_starts_from_the_mean_of_the_states(
    processes: Processes, tmp_path: Path, stage: int, before: int, after: int
) -> None:
    """Saved inside a round, where the parameters differ too: the run goes on from their mean, and says so."""
    combination = Combination(stage, "bf16" if stage else "fp32", "AdamW")
    job: dict[str, Any] = {"combination": combination, "folder": str(tmp_path), "qsr": QSR}
    then = processes.run(states_job, ranks=before, load=False, step=5, **job)
    mean = torch.stack([rank["masters"].double() for rank in then]).mean(0)
    assert not torch.equal(then[0]["masters"], then[1]["masters"])
    now = processes.run(states_job, ranks=after, load=True, **job)
    for name in ("exp_avg", "exp_avg_sq"):
        for place, loaded in enumerate(now[0]["state"][name]):
            values = torch.stack([rank["state"][name][place].double() for rank in then])
            assert (values[0] - values[1]).abs().max() > 0, "the workers' states were meant to differ"
            for rank in now:
                assert torch.equal(rank["state"][name][place], loaded)
            assert torch.equal(loaded, values.sum(0).div(before).float())
    for rank in now:
        position = rank["position"]
        assert (position["step"], position["round_start"], position["period"]) == (5, 5, 2), "it begins a round"
        torch.testing.assert_close(rank["masters"].double(), mean, rtol=1e-6, atol=1e-7)  # a sum in fp32
        assert torch.equal(rank["masters"], now[0]["masters"])
        assert torch.equal(rank["end"], now[0]["end"])
        assert not torch.equal(rank["end"], rank["masters"])
    assert any("from inside a round" in text and "from their average at step 5" in text for text in now[0]["said"])


@pytest.mark.fast_cells(1, of=3)
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp16"), (3, "bf16")])
def test_parameters_alone_go_to_workers_of_another_size_and_stage(
    processes: Processes, tmp_path: Path, stage: int, precision: str
) -> None:
    """From two workers of one rank at stage 1 to two workers of two at another stage."""
    job: dict[str, Any] = {"folder": str(tmp_path), "load": False, "qsr": QSR}
    then = processes.run(states_job, combination=Combination(1, "fp32", "AdamW"), **job)
    qsr = {**QSR, "worker_size": 2}
    job = {"combination": Combination(stage, precision, "AdamW"), "folder": str(tmp_path), "load": True}
    with pytest.raises(JobError, match=r"write qsr\.on_other_workers 'fresh'"):
        processes.run(states_job, ranks=4, qsr=qsr, **job)
    now = processes.run(states_job, ranks=4, qsr={**qsr, "on_other_workers": "fresh"}, **job)
    for rank in now:
        assert rank["position"]["step"] == 4
        assert torch.equal(rank["masters"], then[0]["masters"])
        assert all(not state.any() for name in rank["state"] for state in rank["state"][name])
        assert torch.equal(rank["end"], now[0]["end"])


@pytest.mark.fast_cells(4)
@pytest.mark.parametrize("combination", RESUMED[1:4] + RESUMED[7:9], ids=lambda c: f"{c.stage}-{c.precision}")
def test_the_averaged_model_is_exported(processes: Processes, tmp_path: Path, combination: Combination) -> None:
    from qsr_engine.checkpoint.model_file import export

    qsr = {**QSR, "worker_size": 2}
    results = processes.run(train_job, ranks=4, combination=combination, folder=str(tmp_path), qsr=qsr, save_at=[12])
    out = tmp_path / "out.safetensors"
    assert export(tmp_path, out).step == 12
    exported = load_file(out)
    model = training.make_model(torch.float32)
    model.load_state_dict(exported)
    assert torch.equal(training.flat(model.parameters()), results[0]["masters"])
