"""Averaging behind the next forward, with a model that reads its parameters in every way there is."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging import Averager
from qsr_engine.config.averaging import AveragingConfig
from tests.support import training
from tests.support.deepspeed_engine import start, step
from tests.support.odd_model import make
from tests.support.pool import Processes
from tests.support.training import QSR


def be_slow() -> None:
    """Let every piece of an averaging take 10 ms more, so that a read that does not wait reads the wrong value."""
    from qsr_engine.averaging import allreduce, compressed, shared_memory

    for way, method in (
        (allreduce.AllReduce, "_finish"),
        (shared_memory.SharedMemory, "_average_part"),
        (compressed.Compressed, "_apply"),
    ):
        fast = getattr(way, method)
        if not hasattr(fast, "fast"):

            def slow(*args: Any, fast: Any = fast) -> Any:
                time.sleep(0.01)
                return fast(*args)

            slow.fast = fast  # type: ignore[attr-defined]
            setattr(way, method, slow)


def be_fast() -> None:
    from qsr_engine.averaging import allreduce, compressed, shared_memory

    for way, method in (
        (allreduce.AllReduce, "_finish"),
        (shared_memory.SharedMemory, "_average_part"),
        (compressed.Compressed, "_apply"),
    ):
        setattr(way, method, getattr(getattr(way, method), "fast", getattr(way, method)))


def odd_job(averaging: dict[str, Any], disturb: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train 12 steps; give back the parameters after each, and what a disturbance at every boundary saw."""
    be_slow()
    try:
        engine = make(averaging, **config)
        average = copy.deepcopy(engine.module)  # made before the first forward
        if disturb == "compiled":
            engine.module.compile(backend="eager")
        assert len(engine.local_steps.averager.pieces) > 5
        seen: list[Tensor] = []
        overlapped = 0
        while not engine.local_steps.finished:
            number = engine.local_steps.step
            if step(engine):
                overlapped += engine.local_steps.averager.in_background
                if disturb == "evaluate":
                    engine.eval()
                if disturb in ("evaluate", "evaluate without saying so"):
                    dtype = next(engine.module.parameters()).dtype
                    with torch.no_grad():
                        seen.append(engine.module(training.batch(9, number, dtype=dtype)[0]))
                    engine.train()
                if disturb == "copies":
                    with torch.no_grad():
                        average(training.batch(9, number, dtype=torch.float32)[0])
                        seen.append(copy.deepcopy(engine.module)(training.batch(9, number, dtype=torch.float32)[0]))
                if disturb == "state_dict":
                    seen += [value.clone() for value in engine.module.state_dict().values()]
                if disturb == "exception":
                    engine.module.fail = True
                    with contextlib.suppress(KeyError):
                        step(engine)
                    engine.module.fail = False
        return {"parameters": training.flat(engine.module.parameters()), "seen": seen, "overlapped": overlapped}
    finally:
        be_fast()


STAGE_1: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


@pytest.mark.fast_cells(1, of=6)
@pytest.mark.parametrize(
    ("way", "disturb", "config"),
    [
        ({"shared_memory": False}, "nothing", {}),
        ({"shared_memory": False}, "nothing", STAGE_1),
        ({}, "nothing", {}),
        ({"wire_dtype": "bf16"}, "nothing", {}),
        ({"shared_memory": False, "fragments": 3, "mixing": 0.25}, "nothing", STAGE_1),
        ({"shared_memory": False}, "evaluate without saying so", {}),
        ({"shared_memory": False}, "evaluate without saying so", STAGE_1),
        ({"shared_memory": False}, "state_dict", {}),
        ({"shared_memory": False}, "exception", {}),
        ({"shared_memory": False}, "copies", {}),
        ({"shared_memory": False}, "compiled", {}),
    ],
)
def test_behind_the_forward_every_bit_is_the_same(
    processes: Processes, way: dict[str, Any], disturb: str, config: dict[str, Any]
) -> None:
    blocking = processes.run(odd_job, averaging=way, disturb=disturb, config=config)
    behind = processes.run(odd_job, averaging={**way, "overlap": "next_forward"}, disturb=disturb, config=config)
    for one, other in zip(blocking, behind, strict=True):
        assert one["overlapped"] == 0
        assert other["overlapped"] == 4, "every averaging but the last is still under way when step() returns"
        assert torch.equal(one["parameters"], other["parameters"])
        assert len(one["seen"]) == len(other["seen"])
        for a, b in zip(one["seen"], other["seen"], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(behind[0]["parameters"], behind[1]["parameters"])


def saved_job(folder: str, averaging: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Save at the first boundary from step 4 on, right after it; or go on from there."""
    be_slow()
    try:
        engine = make(averaging)
        if resume:
            engine.load_checkpoint(folder)
        while not engine.local_steps.finished:
            if step(engine) and engine.local_steps.step == 4 and not resume:
                with torch.no_grad():
                    engine(training.batch(9, 0, dtype=torch.float32)[0])  # in training mode: a snapshot is taken
                engine.save_checkpoint(folder, tag="boundary")
                at_save = training.flat(engine.module.parameters()).clone()
        return {"end": training.flat(engine.module.parameters()), "saved": None if resume else at_save}
    finally:
        be_fast()


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    "averaging",
    [
        {"overlap": "next_forward", "shared_memory": False},
        {"overlap": "delayed", "delay_steps": 1},
        {"wire_dtype": "int8"},
        {"wire_dtype": "bf16", "overlap": "next_forward"},
    ],
    ids=["next_forward", "delayed", "int8", "bf16-next_forward"],
)
def test_a_checkpoint_right_after_a_boundary_resumes_to_the_same_bits(
    processes: Processes, tmp_path: Path, averaging: dict[str, Any]
) -> None:
    whole = processes.run(saved_job, folder=str(tmp_path), averaging=averaging, resume=False)
    delayed = averaging.get("overlap") == "delayed"
    assert torch.equal(whole[0]["saved"], whole[1]["saved"]) != delayed, "the average takes effect later"
    resumed = processes.run(saved_job, folder=str(tmp_path), averaging=averaging, resume=True)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one["end"], other["end"])


def reloaded_job(folder: str) -> tuple[Tensor, Tensor, str]:
    """Load a checkpoint while a delayed averaging is under way; the same checkpoint in a new engine."""
    ends, refused = [], ""
    for fresh in (False, True):
        engine = make({"overlap": "delayed", "delay_steps": 3})
        if not fresh:
            while engine.local_steps.step < 9:
                if step(engine) and engine.local_steps.step == 4:
                    engine.save_checkpoint(folder)
            try:
                engine.local_steps.wait()
            except RuntimeError as error:
                refused = str(error)
        engine.load_checkpoint(folder)
        while not engine.local_steps.finished:
            step(engine)
        ends.append(training.flat(engine.module.parameters()))
    return ends[0], ends[1], refused


def test_a_loaded_checkpoint_ends_what_was_under_way(processes: Processes, tmp_path: Path) -> None:
    for reloaded, fresh, refused in processes.run(reloaded_job, folder=str(tmp_path)):
        assert torch.equal(reloaded, fresh)
        assert refused.startswith("step 9 is inside a round")


def nothing_job() -> tuple[float, float]:
    """ZeRO leaves a rank without a part of a model that is small: nothing to average, behind steps and a forward."""
    dist.init_process_group("gloo")
    delayed = Averager([], None, AveragingConfig(overlap="delayed", delay_steps=1))
    delayed.snapshot()
    delayed.apply()
    behind, model = Averager([], None, AveragingConfig(overlap="next_forward")), nn.Identity()
    behind.overlap_with(model, [], lambda part: None)
    model(torch.ones(1))
    assert behind.start()
    behind.finish()
    first, second = (averager.relative_distance(0.0, 2) for averager in (delayed, behind))
    assert first is not None
    assert second is not None
    return first.item(), second.item()


def test_a_rank_with_nothing_to_average_takes_part(processes: Processes) -> None:
    assert processes.run(nothing_job) == [(0.0, 0.0)] * 2


def threads_job() -> list[int]:
    """Threads of averagings, after each of three of them and after close()."""
    from qsr_engine.averaging.background import THREAD

    def count() -> int:
        return sum(thread.name.startswith(THREAD) for thread in threading.enumerate())

    dist.init_process_group("gloo")
    before, model = count(), nn.Linear(30, 30)
    options = AveragingConfig(overlap="next_forward")
    averager = Averager([model.weight.data.view(-1)], None, options)
    averager.overlap_with(model, [(model.weight, 0, 0, 900)], lambda part: None)
    found = []
    for _ in range(3):
        model(torch.ones(1, 30))
        assert averager.start()
        averager.finish()
        found.append(count() - before)
    averager.close()
    return [*found, count() - before]


def test_an_averager_has_one_thread_until_it_closes(processes: Processes) -> None:
    assert processes.run(threads_job) == [[1, 1, 1, 0]] * 2


LEAVES_EARLY = """
import torch, torch.distributed as dist
from torch import nn
from qsr_engine.averaging import Averager, flat_buckets
from qsr_engine.config.averaging import AveragingConfig
dist.init_process_group("gloo")
model = nn.Linear(2000, 2000, bias=False)
options = AveragingConfig(overlap="next_forward", shared_memory=False, bucket_mb=0.1)
averager = Averager(flat_buckets(model.parameters(), 10**9), None, options)
averager.overlap_with(model, [(model.weight, 0, 0, 4_000_000)], lambda part: None)
model(torch.ones(1, 2000))
assert averager.start()
print("left")
"""


@pytest.mark.slow
def test_a_script_that_ends_during_an_averaging_ends_cleanly() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", LEAVES_EARLY], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left") == 2


def evaluated_alone_job(alone: bool) -> Tensor:
    engine = make({"overlap": "delayed", "delay_steps": 1})
    while not engine.local_steps.finished:
        if step(engine) and dist.get_rank() == 0 and alone:
            engine.eval()
            with torch.no_grad():
                engine(training.batch(9, 0, dtype=torch.float32)[0])
            engine.train()
    return training.flat(engine.module.parameters())


def test_one_rank_may_evaluate_under_a_delayed_averaging(processes: Processes) -> None:
    """Nobody waits for the others, and nothing changes."""
    quiet = processes.run(evaluated_alone_job, seconds=60, alone=False)
    alone = processes.run(evaluated_alone_job, seconds=60, alone=True)
    assert all(torch.equal(a, b) for a, b in zip(quiet, alone, strict=True))


def masters_of_two_job() -> str:
    import qsr_engine

    try:
        averaging = {"overlap": "next_forward"}
        start({**QSR, "worker_size": 2, "averaging": averaging}, **STAGE_1)
    except qsr_engine.ConfigError as error:
        return str(error)
    return "nothing was refused"


def test_what_cannot_overlap_is_refused(processes: Processes) -> None:
    for message in processes.run(masters_of_two_job, ranks=4):
        assert "overlap is 'next_forward', and qsr.worker_size is 2 under ZeRO" in message
        assert "write overlap 'none' or 'delayed', or a worker_size of 1 with ZeRO stage 0, 1 or 2" in message


def graph_job() -> str:
    import qsr_engine

    try:
        start({**QSR, "averaging": {"cuda_graph": True}})
    except qsr_engine.ConfigError as error:
        return str(error)
    return "nothing was refused"


def test_a_cuda_graph_is_refused_on_a_cpu(processes: Processes) -> None:
    for message in processes.run(graph_job):
        assert "cuda_graph is true, and the parameters are on cpu with the backend gloo" in message
