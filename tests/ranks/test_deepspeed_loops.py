"""The ways in which loops drive a DeepSpeed engine: where they call backward() and step(), and what they compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import training
from tests.support.deepspeed_engine import STAGE_1, start
from tests.support.pool import Processes
from tests.support.training import QSR

ACCUMULATION = 4
WAYS = ("step after each", "step once", "loss.backward")  # DeepSpeed's own, Accelerate's, and PyTorch's


def take_steps(engine: Any, way: str, until: int, folder: str = "") -> list[str]:
    """Train up to a step; in the middle of each, and before its step(), try to save. What was said then."""
    import torch.distributed as dist

    said = []
    for step in range(engine.local_steps.step, until):
        for micro in range(ACCUMULATION):
            last = micro == ACCUMULATION - 1
            if way == "step once":
                engine.set_gradient_accumulation_boundary(last)
            batch = training.batch(dist.get_rank(), step, micro, dtype=torch.bfloat16)
            loss: Any = training.loss(engine(batch[0]), batch[1])
            loss.backward() if way == "loss.backward" else engine.backward(loss)
            if folder and step == 2 and (micro == 1 or (last and way != "loss.backward")):
                with pytest.raises(RuntimeError) as caught:
                    engine.save_checkpoint(folder, tag="torn")
                said.append(str(caught.value))
            if last or way != "step once":
                engine.step()
    return said


def ways_job(folder: str) -> list[dict[str, Any]]:
    found = []
    for number, way in enumerate(WAYS):
        own = f"{folder}/{number}"
        engines = [start(QSR, gradient_accumulation_steps=ACCUMULATION, **STAGE_1) for _ in range(2)]
        take_steps(engines[0], way, 2)
        engines[0].save_checkpoint(own)
        said = take_steps(engines[0], way, 4, own)
        engines[1].load_checkpoint(own)
        take_steps(engines[1], way, 4)
        counts = [(engine.micro_steps, engine.global_samples, engine.global_steps) for engine in engines]
        ends = [training.flat(engine.module.parameters()) for engine in engines]
        found.append({"said": said, "counts": counts, "ends": ends})
    return found


def test_micro_batches_are_counted_in_every_way_of_looping(processes: Processes, tmp_path: Path) -> None:
    """A save amid accumulation is refused, since no checkpoint has gradients; one between two steps goes on."""
    for results in processes.run(ways_job, folder=str(tmp_path)):
        for way, found in zip(WAYS, results, strict=True):
            seen = [2] if way == "loss.backward" else [2, 4]
            for number, said in zip(seen, found["said"], strict=True):
                assert f"{number} of the 4 micro-batches of step 2" in said
            assert found["counts"] == [(16, 4 * 4 * 2 * training.BATCH, 4)] * 2
            for end in found["ends"]:
                assert torch.equal(end, results[0]["ends"][0])


def compiled_job(folder: str, how: str) -> list[torch.Tensor]:
    """Save from a compiled model, load into the plain one, and the other way; both go on alike."""
    import torch.distributed as dist

    model = training.make_model(torch.float32)
    given: Any = torch.compile(model, backend="eager") if how == "before" else model
    engine = start(QSR, given)
    plain = start(QSR)
    if how == "after":
        engine.compile(backend="eager")
    for step in range(2):
        inputs, targets = training.batch(dist.get_rank(), step, dtype=torch.float32)
        engine.backward(training.loss(engine(inputs), targets))
        engine.step()
    engine.save_checkpoint(folder)
    names = list(engine.averaged_state_dict())
    plain.load_checkpoint(folder)
    plain.save_checkpoint(folder, tag="plain")
    engine.load_checkpoint(folder, tag="plain")
    assert dist.get_rank() != 0 or names == list(model.state_dict())
    return [training.flat(each.module.parameters()) for each in (engine, plain)]


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_compiled_model_is_saved_as_the_plain_one(processes: Processes, tmp_path: Path, how: str) -> None:
    """Given to initialize() compiled, or compiled by the engine."""
    for engine, plain in processes.run(compiled_job, folder=str(tmp_path), how=how):
        assert torch.equal(engine, plain)
