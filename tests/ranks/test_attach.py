"""Local steps in loops that others own: the real Accelerate and the real Lightning drive the engine.

Both ask for a GPU before they start DeepSpeed on several ranks. `accelerate_without_gpu` and `LightningWithoutGPU`
stand in for that question alone; everything after it is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support import training
from tests.support.attached import (
    BF16_STAGE_1,
    OWN_SCHEDULE,
    Recorder,
    accelerate_without_gpu,
    check,
    dataset,
    plain_loop,
    warm_up_and_decay,
)
from tests.support.pool import JobError, Processes
from tests.support.training import QSR

# --------------------------------------------------------------------------------------------------- Accelerate


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


def accelerate_loop(
    recorder: Recorder,
    accelerator: Any,
    model: Any,
    optimizer: Any,
    loader: Any,
    own: Any,
    after: Callable[[int], None] = lambda step: None,
) -> None:
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
        after(model.local_steps.step)
        recorder.counted()


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


def any_step_job(folder: str) -> dict[str, Any]:
    """A loop that is left alone; one that saves, evaluates and asks for the model inside rounds; one that resumes."""
    found: dict[str, Any] = {}
    batch, _ = training.batch(7, 7, dtype=torch.float32)

    def run(after: Callable[[Any, Any, int], None] = lambda accelerator, model, step: None, begin: int = 0) -> Any:
        recorder = Recorder()
        with accelerate_without_gpu():
            accelerator, model, optimizer, loader, own = prepare(QSR)
            if begin:
                accelerator.load_state(f"{folder}/{begin}")
                loader = accelerator.skip_first_batches(loader, begin)
            noted = partial(after, accelerator, model)
            accelerate_loop(recorder, accelerator, model, optimizer, loader, own, noted)
        return recorder.steps

    def look(accelerator: Any, model: Any, step: int) -> None:
        if step == 3:
            accelerator.save_state(f"{folder}/3")
        if step == 5:
            found["own"] = [parameter.detach().clone() for parameter in model.module.parameters()]
            model.eval()
            with torch.no_grad():
                found["seen"] = model(batch)
            found["evaluated"] = list(accelerator.get_state_dict(model).values())
            accelerator.save_state(f"{folder}/5")
            model.train()
            found["state"] = list(accelerator.get_state_dict(model).values())
            with model.averaged():
                model.eval()
            model.train()

    traces = [run(), run(look), run(begin=3), run(begin=5)]
    with pytest.raises(RuntimeError, match=r"backward\(\) inside .* in an evaluation, after train\(\) of the model"):
        run(lambda accelerator, model, step: model.train(step < 6), begin=5)
    return {**found, "traces": traces}


def test_accelerate_saves_and_evaluates_inside_rounds(processes: Processes, tmp_path: Path) -> None:
    results = processes.run(any_step_job, folder=str(tmp_path))
    average = [torch.stack(values).mean(0) for values in zip(*(result["own"] for result in results), strict=True)]
    model = training.make_model(torch.float32)
    for parameter, value in zip(model.parameters(), average, strict=True):
        parameter.data = value
    for result in results:
        alone, *others = [{entry["step"]: entry["parameters"] for entry in trace} for trace in result["traces"]]
        assert [list(other) for other in others] == [list(range(begin, 13)) for begin in (1, 4, 6)]
        for other in others:
            for step, parameters in other.items():
                assert torch.equal(parameters, alone[step])
        torch.testing.assert_close(result["seen"], model(training.batch(7, 7, dtype=torch.float32)[0]).detach())
        assert torch.equal(result["seen"], results[0]["seen"]), "one model on all ranks"
        for state in (result["evaluated"], result["state"]):
            assert all(torch.equal(found, value) for found, value in zip(state, average, strict=True))


# -------------------------------------------------------------------------------------------- the call itself


def call_job(block: Any, config: Any, call: bool, trains: bool = True) -> str:
    """deepspeed.initialize as a loop would call it; afterwards it must be DeepSpeed's own again."""
    import deepspeed

    import qsr_engine

    original = deepspeed.initialize
    try:
        with qsr_engine.attach(**({} if block is None else {"qsr": block})):
            assert deepspeed.initialize is not original
            if call:
                model = training.make_model(torch.float32)
                sgd = partial(training.make_optimizer, "sgd") if trains else None
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


def test_an_engine_that_only_evaluates_is_deepspeeds_own(processes: Processes) -> None:
    """Lightning makes one for validate() and test(), and leaves the block "qsr" out of its configuration."""
    found = processes.run(call_job, block=None, config={"train_batch_size": 8}, call=True, trains=False)
    assert found == ["DeepSpeedEngine"] * 2


def destroyed_job() -> None:
    import deepspeed

    import qsr_engine

    with qsr_engine.attach(QSR):
        model = training.make_model(torch.float32)
        sgd = partial(training.make_optimizer, "sgd")
        engine = deepspeed.initialize(model=model, optimizer=sgd, config={"train_batch_size": 16})[0]
        inputs, targets = training.batch(0, 0, dtype=torch.float32)
        engine.backward(training.loss(engine(inputs), targets))
        engine.step()
        engine.destroy()


def test_a_round_that_cannot_be_ended_is_an_error(processes: Processes) -> None:
    with pytest.raises(JobError, match=r"after step 1, inside a round of 2 steps, .* call engine.end_round.. before"):
        processes.run(destroyed_job)


def zero_init_job() -> tuple[str, bool, bool]:
    """As transformers' from_pretrained and Lightning's configure_model partition a model, before it is known."""
    import deepspeed

    import qsr_engine

    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "zero_allow_untested_optimizer": True,
    }
    original = deepspeed.zero.Init
    with qsr_engine.attach(QSR):
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = training.make_model(torch.float32)
        filled = {**config, "train_batch_size": 16, "zero_optimization": {"stage": 3}}
        sgd = partial(training.make_optimizer, "sgd")
        engine = deepspeed.initialize(model=model, optimizer=sgd, config=filled)[0]
        inputs, _ = training.batch(0, 0, dtype=torch.float32)
        engine.eval()
        same = torch.equal(engine(inputs), training.make_model(torch.float32)(inputs))
    return type(engine).__name__, same, deepspeed.zero.Init is original


def test_a_model_that_a_library_partitions_is_partitioned_over_a_worker(processes: Processes) -> None:
    assert processes.run(zero_init_job) == [("LocalStepEngine", True, True)] * 2
