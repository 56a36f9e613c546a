"""Local steps in loops that others own: the real Accelerate and the real Lightning drive the engine.

Both ask for a GPU before they start DeepSpeed on several ranks. `accelerate_without_gpu` and `LightningWithoutGPU`
stand in for that question alone; everything after it is theirs.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.support import training
from tests.support.counting import collectives_across_workers
from tests.support.pool import JobError, Processes
from tests.support.training import QSR

ENDS = [2, 4, 6, 8, 12]  # of the rounds of QSR
OWN_SCHEDULE = {**{key: value for key, value in QSR.items() if key != "lr"}, "warmup_steps": 2, "alpha": 0.06}
BF16_STAGE_1 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


class Recorder:
    """What a loop's engine saw and did, step by step: batches, collectives, parameters."""

    def __init__(self) -> None:
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.steps: list[dict[str, Any]] = []
        self.of_the_loop: list[int] = []  # collectives of the loop itself, before each of its batches but the first
        self._before = 0

    def begin(self, engine: Any, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        count = self.counted()
        if self.batches:  # around the first batch the loader's setting up meets the other ranks
            assert engine.local_steps.on_boundary or count == 0, "the loop itself, between boundaries"
            self.of_the_loop.append(count)
        self.batches.append((inputs.clone(), targets.clone()))

    def counted(self) -> int:
        """Collectives since the last call, of this rank with other workers."""
        now = collectives_across_workers(worker_size=1)
        before, self._before = self._before, now
        return now - before

    def end(self, engine: Any) -> None:
        """After a micro-batch, which may have ended a step."""
        collectives, state = self.counted(), engine.local_steps
        if (self.steps and self.steps[-1]["step"] == state.step) or state.step == 0:
            assert collectives == 0, "between two micro-batches"
            return
        self.steps.append(
            {
                "step": state.step,
                "boundary": state.on_boundary,
                "collectives": collectives,
                "parameters": training.flat(engine.module.parameters()).clone(),
            }
        )


def plain_loop(
    recorder: Recorder,
    qsr: dict[str, Any],
    accumulation: int,
    config: dict[str, Any],
    scheduler: Any = None,
    loss_scale: float = 1.0,
) -> list[torch.Tensor]:
    """Parameters after every step of a loop of one's own on the same batches."""
    import qsr_engine

    model = training.make_model(torch.float32)
    optimizer = training.make_optimizer("sgd", model.parameters())
    engine = qsr_engine.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler(optimizer) if scheduler else None,
        config={
            "train_micro_batch_size_per_gpu": training.BATCH,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.5,
            "qsr": qsr,
            **config,
        },
    )[0]
    history = []
    for inputs, targets in recorder.batches:
        dtype = next(engine.module.parameters()).dtype
        before = engine.local_steps.step
        engine.backward(training.loss(engine(inputs.to(dtype)), targets.to(dtype)) * loss_scale)
        engine.step()
        if engine.local_steps.step > before:
            history.append(training.flat(engine.module.parameters()).clone())
    return history


def dataset(steps: int = 12, ranks: int = 2, accumulation: int = 1) -> TensorDataset:
    batches = [training.batch(0, step, dtype=torch.float32) for step in range(steps * ranks * accumulation)]
    return TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def warm_up_and_decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A scheduler of one's own; the period would be another if it were read one step late."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.05
    rates = [0.2, 0.6, 1.0, 0.9, 0.8, 0.7, 0.5, 0.45, 0.4, 0.3, 0.2, 0.1, 0.05]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])


def check(results: list[tuple[list[dict[str, Any]], list[torch.Tensor]]], ends: list[int] | None = None) -> None:
    """Silent and apart between boundaries, equal on them, and everywhere what a loop of one's own gives."""
    (first, plain_first), (second, plain_second) = results
    assert [entry["step"] for entry in first] == list(range(1, 13))
    assert [entry["step"] for entry in first if entry["boundary"]] == (ends or ENDS)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["parameters"], other["parameters"]) == one["boundary"]
        assert one["collectives"] == other["collectives"] == (3 if one["boundary"] else 0), "header and two meetings"
    for steps, plain in ((first, plain_first), (second, plain_second)):
        for entry, expected in zip(steps, plain, strict=True):
            assert torch.equal(entry["parameters"], expected)


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


# ---------------------------------------------------------------------------------------------------- Lightning


def lightning_without_gpu(**options: Any) -> Any:
    """Lightning's strategy, which refuses every accelerator but CUDA in setup_environment()."""
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    class LightningWithoutGPU(DeepSpeedStrategy):  # type: ignore[misc]  # lightning's types are not read
        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

    return LightningWithoutGPU(**options, parallel_devices=[torch.device("cpu", rank) for rank in range(2)])


def lightning_module(recorder: Recorder, scheduler: Any = None, at_end: Callable[[Any], None] | None = None) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):  # type: ignore[misc]  # lightning's types are not read
        def __init__(self) -> None:
            super().__init__()
            self.net = training.make_model(torch.float32)

        def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
            recorder.begin(self.trainer.strategy.deepspeed_engine, *batch)
            loss = training.loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = training.make_optimizer("sgd", self.parameters())
            if scheduler is None:
                return optimizer
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": "step"},
            }

        def on_train_batch_end(self, outputs: Any, batch: list[torch.Tensor], number: int) -> None:
            recorder.end(self.trainer.strategy.deepspeed_engine)
            if at_end is not None:
                at_end(self.trainer)

    return Module()


def fit(
    module: Any,
    config: dict[str, Any] | None,
    accumulation: int = 1,
    qsr: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **trainer: Any,
) -> Any:
    """The trainer after trainer.fit() for 12 steps; without a configuration Lightning writes one for stage 1."""
    import lightning.pytorch as pl
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

    import qsr_engine

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_steps": 12, "enable_checkpointing": False, "accumulate_grad_batches": accumulation, **trainer}
    with mock.patch.dict(os.environ):
        strategy = lightning_without_gpu(**({"config": config} if config else {"stage": 1}))
        run = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            gradient_clip_val=0.5,
            **quiet,
            **options,
        )
        asks = _TrainingEpochLoop._broadcast_sigterm_tensor
        with qsr_engine.attach(qsr):
            assert _TrainingEpochLoop._broadcast_sigterm_tensor is not asks
            loader = DataLoader(dataset(accumulation=accumulation), batch_size=training.BATCH)
            run.fit(module, loader, ckpt_path=ckpt_path)
        assert _TrainingEpochLoop._broadcast_sigterm_tensor is asks
    return run


def lightning_job(
    accumulation: int, config: dict[str, Any], own: bool
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    recorder, scheduler = Recorder(), warm_up_and_decay if own else None
    qsr = OWN_SCHEDULE if own else QSR
    module = lightning_module(recorder, scheduler)
    if config:
        run = fit(module, None, accumulation, qsr, precision="bf16-mixed")
    else:
        run = fit(module, {"zero_optimization": {"stage": 0}, "qsr": qsr}, accumulation)
    assert run.strategy.deepspeed_engine.train_batch_size() == 2 * training.BATCH * accumulation, "over all ranks"
    assert run.global_step == 12
    # Before a batch Lightning asks whether rank 0 has received SIGTERM; attach() lets it do so on boundaries.
    assert sum(recorder.of_the_loop) == (4 if accumulation == 1 else 9)
    # Lightning divides the loss by the number of micro-batches, and so does DeepSpeed after it.
    return recorder.steps, plain_loop(recorder, qsr, accumulation, config, scheduler, loss_scale=1 / accumulation)


@pytest.mark.parametrize(
    ("accumulation", "config"),
    [(1, {}), (2, {}), (1, BF16_STAGE_1)],
    ids=["stage0-fp32", "accumulation", "stage1-bf16-block-in-attach"],
)
def test_lightnings_loop(processes: Processes, accumulation: int, config: dict[str, Any]) -> None:
    check(processes.run(lightning_job, accumulation=accumulation, config=config, own=False))


def test_lightning_with_a_scheduler_of_its_own(processes: Processes) -> None:
    """It takes the scheduler away from DeepSpeed and steps it after the engine."""
    check(processes.run(lightning_job, accumulation=1, config={}, own=True), ends=[2, 4, 6, 11, 12])


def lightning_saves_job(folder: str, way: str) -> str:
    """Lightning's own checkpoints inside a round, on boundaries, and a run that ends inside a round."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def save_on_boundary(trainer: Any) -> None:
        if trainer.strategy.deepspeed_engine.local_steps.on_boundary:
            trainer.save_checkpoint(f"{folder}/step-{trainer.global_step}")

    module = lightning_module(Recorder(), at_end=save_on_boundary if way == "boundary" else None)
    callback = ModelCheckpoint(dirpath=folder, every_n_train_steps=3)
    options: dict[str, dict[str, Any]] = {
        "inside": {"enable_checkpointing": True, "callbacks": [callback]},
        "early": {"max_steps": 9},
    }
    try:
        fit(module, {"zero_optimization": {"stage": 0}, "qsr": QSR}, **options.get(way, {}))
    except RuntimeError as error:
        return str(error)
    return "it went on"


def test_lightning_saves_on_boundaries_only(processes: Processes, tmp_path: Path) -> None:
    for said in processes.run(lightning_saves_job, folder=str(tmp_path / "inside"), way="inside"):
        assert "step 3 is inside a round of 2 steps" in said
    processes.run(lightning_saves_job, folder=str(tmp_path / "boundary"), way="boundary")
    assert sorted(path.name for path in (tmp_path / "boundary").iterdir()) == sorted(f"step-{end}" for end in ENDS)


def lightning_resumes_job(folder: str) -> dict[str, Any]:
    """What Lightning's ckpt_path brings back from a checkpoint that its own loop saved on a boundary."""
    config = {"zero_optimization": {"stage": 1}, "qsr": QSR, "zero_allow_untested_optimizer": True}
    saved: list[torch.Tensor] = []
    began: list[tuple[int, torch.Tensor]] = []

    def save(trainer: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(f"{folder}/step-4")
            saved.append(training.flat(trainer.model.parameters()).clone())

    def look(trainer: Any) -> None:
        engine = trainer.strategy.deepspeed_engine
        began.append((engine.local_steps.step, training.flat(trainer.model.parameters()).clone()))

    fit(lightning_module(Recorder(), at_end=save), copy.deepcopy(config))  # Lightning writes into it
    module = lightning_module(Recorder(), at_end=look)
    module.on_train_start = lambda: look(module.trainer)
    run = fit(module, copy.deepcopy(config), ckpt_path=f"{folder}/step-4")
    return {"saved": saved[0], "began": began, "end": run.strategy.deepspeed_engine.local_steps.step}


def test_lightning_resumes(processes: Processes, tmp_path: Path) -> None:
    for result in processes.run(lightning_resumes_job, folder=str(tmp_path)):
        step, parameters = result["began"][0]
        assert step == 4
        assert torch.equal(parameters, result["saved"])
        assert [number for number, _ in result["began"][1:]] == list(range(5, 13))
        assert result["end"] == 12


def test_a_loop_that_ends_inside_a_round_is_an_error(processes: Processes, tmp_path: Path) -> None:
    for said in processes.run(lightning_saves_job, folder=str(tmp_path), way="early"):
        assert "the loop ended at step 9" in said
        assert "inside a round; end it at qsr.total_steps, 12 (Lightning: max_steps=12)" in said


def lightning_schedules_job() -> None:
    fit(lightning_module(Recorder(), warm_up_and_decay), {"zero_optimization": {"stage": 0}, "qsr": QSR})


def test_a_scheduler_beside_an_lr_block_is_an_error_in_lightning(processes: Processes) -> None:
    with pytest.raises(JobError) as caught:
        processes.run(lightning_schedules_job)
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "ConfigError"
        assert "both qsr.lr and lr_scheduler" in error[1]


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
