"""attach() in Lightning's loop."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support import training
from tests.support.attached import (
    BF16_STAGE_1,
    ENDS,
    OWN_SCHEDULE,
    Recorder,
    check,
    dataset,
    plain_loop,
    warm_up_and_decay,
)
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


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
