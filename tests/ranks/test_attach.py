"""Local steps in loops that others own: the real Accelerate and the real Lightning drive the engine.

Both ask for a GPU before they start DeepSpeed on several ranks. `accelerate_without_gpu` and `LightningWithoutGPU`
stand in for that question alone; everything after it is theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support import training
from tests.support.attached import BF16_STAGE_1, OWN_SCHEDULE, Recorder, check, dataset, plain_loop, warm_up_and_decay
from tests.support.pool import Processes
from tests.support.training import QSR

# --------------------------------------------------------------------------------------------------- Accelerate


@contextlib.contextmanager
def accelerate_without_gpu() -> Iterator[None]:
    """Accelerate as on a host with GPUs, whose backend would be gloo; all that it sets in the process is undone.

    Without the stand-in it takes a DeepSpeed run on CPUs for one of a single process (`num_processes` is 1).
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    def gloo(*args: Any, **kwargs: Any) -> tuple[str, Any]:
        return "gloo", DistributedType.MULTI_CPU

    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"), mock.patch.object(PartialState, "_prepare_backend", gloo):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def prepare(
    qsr: dict[str, Any],
    accumulation: int = 1,
    block_in: str = "config",
    scheduler: Any = None,
    **config: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    """(accelerator, model, optimizer, loader, scheduler) as a user of Accelerate prepares them."""
    from accelerate import Accelerator, DeepSpeedPlugin

    import qsr_engine

    if block_in == "attach":  # and no configuration: Accelerate writes one
        plugin = DeepSpeedPlugin(zero_stage=config["zero_optimization"]["stage"], gradient_clipping=0.5)
        precision = "bf16" if "bf16" in config else "no"
    else:
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        filled = {
            **dict.fromkeys(sizes, "auto"),
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": 0},
            "qsr": qsr,
        }
        plugin, precision = DeepSpeedPlugin(hf_ds_config={**filled, **config}), "no"
    model = training.make_model(torch.float32)
    optimizer = training.make_optimizer("sgd", model.parameters())
    loader = DataLoader(dataset(accumulation=accumulation), batch_size=training.BATCH)
    own = [scheduler(optimizer)] if scheduler else []
    with qsr_engine.attach(qsr=qsr if block_in == "attach" else None):
        accelerator = Accelerator(
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=accumulation,
            mixed_precision=precision,
            step_scheduler_with_optimizer=False,  # otherwise it steps once for every rank
        )
        model, optimizer, loader, *own = accelerator.prepare(model, optimizer, loader, *own)
    return accelerator, model, optimizer, loader, own[0] if own else None


def accelerate_loop(recorder: Recorder, accelerator: Any, model: Any, optimizer: Any, loader: Any, own: Any) -> None:
    """The loop of Accelerate's documentation."""
    for inputs, targets in loader:
        recorder.begin(model, inputs, targets)
        dtype = next(model.parameters()).dtype
        with accelerator.accumulate(model):
            accelerator.backward(training.loss(model(inputs.to(dtype)), targets.to(dtype)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            if own is not None and accelerator.sync_gradients:
                own.step()
            optimizer.zero_grad()
        recorder.end(model)


def accelerate_job(
    accumulation: int, block_in: str, config: dict[str, Any], own: bool
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    recorder, scheduler = Recorder(), warm_up_and_decay if own else None
    qsr = OWN_SCHEDULE if own else QSR
    with accelerate_without_gpu():
        prepared = prepare(qsr, accumulation, block_in, scheduler, **config)
        assert prepared[1].train_batch_size() == 2 * training.BATCH * accumulation, "over all ranks"
        accelerate_loop(recorder, *prepared)
    assert not any(recorder.of_the_loop)
    return recorder.steps, plain_loop(recorder, qsr, accumulation, config, scheduler)


@pytest.mark.parametrize(
    ("accumulation", "block_in", "config"),
    [(1, "config", {}), (2, "config", {}), (1, "attach", BF16_STAGE_1)],
    ids=["stage0-fp32", "accumulation", "stage1-bf16-block-in-attach"],
)
def test_accelerates_loop(processes: Processes, accumulation: int, block_in: str, config: dict[str, Any]) -> None:
    check(processes.run(accelerate_job, accumulation=accumulation, block_in=block_in, config=config, own=False))


def test_accelerate_with_a_scheduler_of_its_own(processes: Processes) -> None:
    """It steps after the engine; H is set from the learning rate that the round's first step has."""
    results = processes.run(accelerate_job, accumulation=1, block_in="config", config={}, own=True)
    check(results, ends=[2, 4, 6, 11, 12])


def two_schedules_job() -> str:
    with accelerate_without_gpu():
        prepared = prepare(QSR, scheduler=warm_up_and_decay)
        try:
            accelerate_loop(Recorder(), *prepared)
        except RuntimeError as error:
            return str(error)
    return "it went on"


def test_a_scheduler_beside_an_lr_block_is_an_error_in_accelerate(processes: Processes) -> None:
    """Accelerate does not show it to DeepSpeed, so it comes to light at a step."""
    for said in processes.run(two_schedules_job):
        assert "and qsr.lr says" in said
        assert "a scheduler perhaps; leave that out, or qsr.lr" in said


def save_state_job(folder: str) -> dict[str, Any]:
    with accelerate_without_gpu():
        accelerator, model, optimizer, loader, _ = prepare(QSR)
        said, after_load, saved_at = "", None, None
        for inputs, targets in loader:
            accelerator.backward(training.loss(model(inputs), targets))
            optimizer.step()
            if not model.local_steps.on_boundary:
                try:
                    accelerator.save_state(f"{folder}/inside")
                except RuntimeError as error:
                    said = str(error)
            elif saved_at is None:
                saved_at = model.local_steps.step
                saved = training.flat(model.module.parameters()).clone()
                accelerator.save_state(f"{folder}/boundary")
        accelerator.load_state(f"{folder}/boundary")
        after_load = training.flat(model.module.parameters())
        return {"said": said, "same": torch.equal(saved, after_load), "steps": (saved_at, model.local_steps.step)}


def test_accelerates_save_state_works_on_boundaries_only(processes: Processes, tmp_path: Path) -> None:
    for result in processes.run(save_state_job, folder=str(tmp_path)):
        assert "is inside a round of" in result["said"]
        assert result["same"]
        assert result["steps"] == (2, 2)


# -------------------------------------------------------------------------------------------- the call itself


def call_job(block: Any, config: Any, call: bool) -> str:
    """deepspeed.initialize as a loop would call it; afterwards it must be DeepSpeed's own again."""
    import deepspeed

    import qsr_engine

    original = deepspeed.initialize
    try:
        with qsr_engine.attach(**({} if block is None else {"qsr": block})):
            assert deepspeed.initialize is not original
            if call:
                model = training.make_model(torch.float32)
                sgd = partial(training.make_optimizer, "sgd")
                engine = deepspeed.initialize(model=model, optimizer=sgd, config_params=config)[0]
                return type(engine).__name__
    except qsr_engine.ConfigError as error:
        return str(error)
    finally:
        assert deepspeed.initialize is original
    return "nothing was said"


BARE = {"train_batch_size": 8}


@pytest.mark.parametrize(
    ("block", "config", "call", "words"),
    [
        (None, {**BARE, "qsr": QSR}, True, "LocalStepEngine"),
        (QSR, BARE, True, "LocalStepEngine"),
        (None, BARE, True, 'the DeepSpeed configuration of this loop has no "qsr" block'),
        (QSR, {**BARE, "qsr": QSR}, True, "and one in attach(qsr=...); leave one"),
        ({**QSR, "h_bse": 4}, BARE, True, "qsr.h_bse"),
        (None, None, False, "nothing called deepspeed.initialize inside attach()"),
    ],
)
def test_attach_is_for_configurations_with_a_block(
    processes: Processes, block: Any, config: Any, call: bool, words: str
) -> None:
    for said in processes.run(call_job, block=block, config=config, call=call):
        assert words in said


def test_attach_reads_a_configuration_file(processes: Processes, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BARE))
    assert processes.run(call_job, block=QSR, config=str(path), call=True) == ["LocalStepEngine"] * 2
