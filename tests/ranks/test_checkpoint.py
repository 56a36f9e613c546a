"""Checkpoints of the engine: exact resume, whole or not there, other numbers of workers, the exported model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import training
from tests.support.checkpointed import PLAIN, RESUMED, same, train_job
from tests.support.combinations import NO_COMPILER, Combination, start, take_step, whole_parameters
from tests.support.heard import messages_of_this_job
from tests.support.pool import JobError, Processes
from tests.support.training import QSR

# ------------------------------------------------------------------------------------------- exact resume

COMPILED = [pytest.mark.slow, pytest.mark.compiled]


def resume_of(combination: Combination) -> Any:
    """One worker size of each: two ranks a worker in fp32, in fp16 and at stage 3, one rank in bf16 below it."""
    marks = COMPILED if combination.compiled else []
    worker_size = 2 if combination.precision.startswith("fp") or combination.stage == 3 else 1
    return pytest.param(combination, worker_size, marks=marks, id=f"{combination}-{worker_size}")


@pytest.mark.fast_cells(3, of=6)
@pytest.mark.parametrize(("combination", "worker_size"), [resume_of(combination) for combination in RESUMED])
def test_a_resumed_run_gives_the_same_bits(
    processes: Processes, tmp_path: Path, combination: Combination, worker_size: int
) -> None:
    if combination.compiled and NO_COMPILER:
        pytest.skip("DeepSpeed compiles this optimizer, and there is no C++ compiler here")
    common: dict[str, Any] = {
        "combination": combination,
        "folder": str(tmp_path),
        "qsr": {**QSR, "worker_size": worker_size},
        "ranks": 2 * worker_size,
        "seconds": 400,
    }
    whole = processes.run(train_job, save_at=[4, 9], **common)  # on a boundary, and inside the last round
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step4", "global_step9", "latest"]
    resumed = processes.run(train_job, save_at=[], load=True, **common)
    assert resumed[0]["counts"]["averagings"] == 5
    assert same(whole, resumed)


@pytest.mark.fast_cells(2, of=4)
@pytest.mark.parametrize("strategy", ["post_local", "parallel"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_other_strategies_resume_too(processes: Processes, tmp_path: Path, strategy: str, stage: int) -> None:
    """post_local is saved in its parallel phase and changes to local steps after the resume."""
    switch = {"switch_step": 6} if strategy == "post_local" else {}
    qsr = {"strategy": strategy, "h_base": 3, "total_steps": 12, "lr": QSR["lr"], "worker_size": 2, **switch}
    common: dict[str, Any] = {"combination": Combination(stage, "fp32", "AdamW"), "folder": str(tmp_path), "qsr": qsr}
    whole = processes.run(train_job, ranks=4, save_at=[4], **common)
    assert same(whole, processes.run(train_job, ranks=4, save_at=[], load=True, **common))


def test_storage_of_its_own_on_every_host(processes: Processes, tmp_path: Path) -> None:
    """DeepSpeed would have the first rank of the host write for all workers there, and the others miss their files."""
    job: dict[str, Any] = {"combination": Combination(1, "fp32", "AdamW"), "folder": str(tmp_path), "qsr": QSR}
    job["checkpoint"] = {"use_node_local_storage": True, "tag_validation": "Fail"}
    whole = processes.run(train_job, save_at=[4], **job)
    assert same(whole, processes.run(train_job, save_at=[], load=True, **job))


def random_job(folder: str, load: bool) -> list[Any]:
    """What the generators give after a checkpoint, and what the caller gave to it."""
    import torch.distributed as dist

    engine = start(PLAIN, QSR)
    if load:
        _, client = engine.load_checkpoint(folder)
    else:
        for generator in (torch.manual_seed, random.seed, np.random.seed):
            generator(dist.get_rank() + 5)
        take_step(engine, PLAIN)
        take_step(engine, PLAIN)
        client = {"position": [3, 10 + dist.get_rank()], "loader": {"seen": torch.arange(2)}}
        engine.save_checkpoint(folder, client_state=client)
    client["loader"]["seen"] = client["loader"]["seen"].tolist()
    return [client, torch.rand(3).tolist(), random.random(), np.random.rand()]


def test_random_states_and_the_position_in_the_data_come_back(processes: Processes, tmp_path: Path) -> None:
    saved = processes.run(random_job, folder=str(tmp_path), load=False)
    assert saved[0] != saved[1], "every rank has its own"
    assert processes.run(random_job, folder=str(tmp_path), load=True) == saved


def scheduler_job(folder: str, load: bool) -> list[float]:
    """Without an lr block, DeepSpeed's own scheduler goes on where it was."""
    qsr = {**{key: value for key, value in QSR.items() if key != "lr"}, "warmup_steps": 4, "alpha": 0.12}
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.04, "warmup_num_steps": 9, "warmup_type": "linear"}
    engine = start(PLAIN, qsr, scheduler={"type": "WarmupLR", "params": params})
    if load:
        engine.load_checkpoint(folder)
    seen: list[float] = []
    while not engine.local_steps.finished:
        if take_step(engine, PLAIN) and not load and engine.local_steps.step == 4:
            for group in engine.optimizer.param_groups:  # as a factor that numpy has computed makes it
                group["lr"] = np.float64(group["lr"])
            engine.save_checkpoint(folder)
            seen.clear()
        seen.append(engine.get_lr()[0])
    return seen[1:] if not load else seen


def test_a_scheduler_goes_on_where_it_was(processes: Processes, tmp_path: Path) -> None:
    saved = processes.run(scheduler_job, folder=str(tmp_path), load=False)
    assert processes.run(scheduler_job, folder=str(tmp_path), load=True) == saved


def shorter_job(folder: str) -> tuple[list[int], torch.Tensor]:
    """Go on from step 4 of 12 in a run of 9 steps with longer rounds."""
    engine = start(PLAIN, {**QSR, "strategy": "constant", "h_base": 4, "alpha": None, "total_steps": 9})
    engine.load_checkpoint(folder)
    ends = []
    while not engine.local_steps.finished:
        if take_step(engine, PLAIN):
            ends.append(engine.local_steps.step)
    return ends, whole_parameters(engine)


def test_a_shorter_run_that_goes_on_still_ends_on_a_boundary(processes: Processes, tmp_path: Path) -> None:
    processes.run(train_job, combination=PLAIN, folder=str(tmp_path), qsr=QSR, save_at=[4])
    (ends, first), (_, second) = processes.run(shorter_job, folder=str(tmp_path))
    assert ends == [8, 9]
    assert torch.equal(first, second)


# -------------------------------------------------------------------------------------- another configuration


def other_job(
    folder: str,
    qsr: dict[str, Any],
    stage: int = 0,
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    load: dict[str, Any] | None = None,
    stop_at: int = 10**9,
    accumulation: int = 1,
) -> dict[str, Any]:
    """Train with the parameters in an order of the optimizer, saving at the end; or load, and train on."""
    import qsr_engine

    said = messages_of_this_job()
    model = training.make_model(torch.float32)
    parameters = list(model.parameters())
    engine = qsr_engine.initialize(
        model=model,
        optimizer=lambda _: training.make_optimizer("adamw", [parameters[number] for number in order]),
        config={
            **Combination(stage, "fp32", "AdamW").config(),
            "qsr": qsr,
            "gradient_accumulation_steps": accumulation,
        },
    )[0]
    if load is not None:
        engine.load_checkpoint(folder, **load)
    found = {
        "state": len(engine.optimizer.state) if stage == 0 else -1,
        "loaded": engine.averaged_state_dict(),
        "began": engine.local_steps.step,
        "micro_steps": engine.micro_steps,
    }
    ends = []
    while not engine.local_steps.finished and engine.local_steps.step < stop_at:
        if take_step(engine, PLAIN):
            ends.append(engine.local_steps.step)
    if load is None:
        engine.save_checkpoint(folder)
    moments = [state["exp_avg"].clone() for state in engine.optimizer.state.values()] if stage == 0 else []
    return {**found, "ends": ends, "said": said, "parameters": whole_parameters(engine), "moments": moments}


def test_a_finished_run_goes_on_where_this_one_is_longer(processes: Processes, tmp_path: Path) -> None:
    """It used to stay in the round that had ended, never to average again."""
    qsr = {"strategy": "constant", "h_base": 4, "total_steps": 8, "lr": {"schedule": "constant", "peak": 0.01}}
    processes.run(other_job, folder=str(tmp_path), qsr=qsr)
    results = processes.run(other_job, folder=str(tmp_path), qsr={**qsr, "total_steps": 15}, load={})
    assert results[0]["ends"] == [12, 15]
    assert torch.equal(results[0]["parameters"], results[1]["parameters"])
    assert any("another configuration: qsr.total_steps was 8 and is 15" in said for said in results[0]["said"])
    assert not any("another configuration" in said for said in results[1]["said"]), "rank 0 says it"


@pytest.mark.fast_cells(2, of=3)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_in_another_order_are_refused(processes: Processes, tmp_path: Path, stage: int) -> None:
    """DeepSpeed would give them one another's values; by name they are right, with a fresh optimizer."""
    job: dict[str, Any] = {"folder": str(tmp_path), "stage": stage, "stop_at": 4}
    order = (2, 3, 0, 1, 4, 5)
    processes.run(other_job, qsr=QSR, **job)
    with pytest.raises(JobError, match=r"order was .* and is .*on_other_workers 'fresh'"):
        processes.run(other_job, qsr=QSR, order=order, load={}, **job)
    fresh = processes.run(other_job, qsr={**QSR, "on_other_workers": "fresh"}, order=order, load={}, **job)
    saved = load_file(tmp_path / "global_step4" / "model.safetensors")
    assert all(torch.equal(fresh[0]["loaded"][name], value) for name, value in saved.items())


def test_without_the_optimizer_states_or_with_one_for_all(processes: Processes, tmp_path: Path) -> None:
    saved = [rank["moments"] for rank in processes.run(other_job, folder=str(tmp_path), qsr=QSR, stop_at=4)]
    assert not torch.equal(saved[0][0], saved[1][0])
    load = {"mean_of_optimizer_states": True}
    for rank in processes.run(other_job, folder=str(tmp_path), qsr=QSR, stop_at=4, load=load):
        for value, *each in zip(rank["moments"], *saved, strict=True):
            assert torch.equal(value, torch.stack(each).double().mean(0).float())
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": QSR, "stop_at": 4, "ranks": 1}
    with_state = processes.run(other_job, load={}, **job)[0]
    without = processes.run(other_job, load={"load_optimizer_states": False}, **job)[0]
    assert (with_state["state"], without["state"]) == (6, 0)
    assert without["began"] == 4


def test_another_accumulation_starts_with_a_whole_step(processes: Processes, tmp_path: Path) -> None:
    """DeepSpeed goes on counting the micro-batches of the other one, and the first step would be cut short."""
    processes.run(other_job, folder=str(tmp_path), qsr={**QSR, "total_steps": 5})
    qsr = {**QSR, "total_steps": 8}
    result = processes.run(other_job, folder=str(tmp_path), qsr=qsr, load={}, accumulation=2, stop_at=5)[0]
    assert (result["began"], result["micro_steps"]) == (5, 10)
