"""attach() in Lightning's loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support import training
from tests.support.attached import (
    BF16_STAGE_1,
    OWN_SCHEDULE,
    Recorder,
    check,
    dataset,
    plain_loop,
    warm_up_and_decay,
)
from tests.support.heard import messages_of_this_job
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


def lightning_without_gpu(**options: Any) -> Any:
    """Lightning's strategy, which refuses every accelerator but CUDA in setup_environment().

    On a GPU its teardown moves the model to the CPU, out of the averager's buckets: all must be averaged by then.
    """
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    class LightningWithoutGPU(DeepSpeedStrategy):  # type: ignore[misc]  # lightning's types are not read
        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)

        def teardown(self) -> None:
            local_steps = getattr(self.model, "local_steps", None)
            assert local_steps is None or local_steps.on_boundary
            super().teardown()

    return LightningWithoutGPU(**options, parallel_devices=[torch.device("cpu", rank) for rank in range(2)])


def lightning_module(
    recorder: Recorder, scheduler: Any = None, by_step: bool = False, metrics: list[float] | None = None
) -> Any:
    import lightning.pytorch as pl

    class Module(pl.LightningModule):  # type: ignore[misc]  # lightning's types are not read
        def __init__(self) -> None:
            super().__init__()
            self.net = training.make_model(torch.float32)

        def training_step(self, batch: Sequence[torch.Tensor], number: int) -> torch.Tensor:
            if by_step:
                batch = training.batch(self.global_rank, self.global_step, dtype=torch.float32)
            recorder.begin(self.trainer.strategy.deepspeed_engine, *batch)
            loss = training.loss(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
            inputs, targets = training.batch(7, 7, dtype=torch.float32)
            self.log("val", training.loss(self.net(inputs), targets))

        def on_validation_end(self) -> None:
            recorder.counted()
            if metrics is not None:
                metrics.append(self.trainer.callback_metrics["val"].item())

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
            validated = (
                DataLoader(dataset(steps=1), batch_size=training.BATCH) if "val_check_interval" in trainer else None
            )
            run.fit(module, loader, validated, ckpt_path=ckpt_path)
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


@pytest.mark.fast_cells(1)
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


def any_step_job(folder: str) -> dict[str, Any]:
    """A fit that is left alone; one that saves and validates inside rounds, and ends in one; one that resumes."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    said = messages_of_this_job()
    metrics: list[float] = []

    def run(**trainer: Any) -> Any:
        recorder = Recorder()
        config = {"zero_optimization": {"stage": 1}, "qsr": QSR, "zero_allow_untested_optimizer": True}
        # Resumed inside an epoch, Lightning begins the loader anew, so batches are a function of the step here.
        module = lightning_module(recorder, by_step=True, metrics=metrics)
        engine = fit(module, config, **trainer).strategy.deepspeed_engine
        return recorder.steps, training.flat(engine.module.parameters()).clone()

    callback = ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    alone = run()
    saved = run(max_steps=9, val_check_interval=5, enable_checkpointing=True, callbacks=[callback])
    resumed = run(ckpt_path=f"{folder}/step=3.ckpt")
    return {"runs": [alone, saved, resumed], "metrics": metrics, "said": said}


def test_lightning_saves_and_validates_inside_rounds(processes: Processes, tmp_path: Path) -> None:
    results = processes.run(any_step_job, folder=str(tmp_path))
    inputs, targets = training.batch(7, 7, dtype=torch.float32)
    expected = []
    for step in (0, 5):
        model = training.make_model(torch.float32)
        if step:
            held = [result["runs"][0][0][step - 1]["parameters"] for result in results]
            torch.nn.utils.vector_to_parameters(torch.stack(held).mean(0), model.parameters())
        expected.append(training.loss(model(inputs), targets).item())
    for result in results:
        alone, *others = [{entry["step"]: entry["parameters"] for entry in steps} for steps, _ in result["runs"]]
        assert [list(other) for other in others] == [list(range(1, 10)), list(range(4, 13))]
        for other in others:
            for step, parameters in other.items():
                assert torch.equal(parameters, alone[step]), step
        assert result["metrics"] == results[0]["metrics"], "one model on all ranks"
        assert result["metrics"] == pytest.approx(expected, rel=1e-6)
        (_, end), (_, of_all) = result["runs"][1], results[0]["runs"][1]
        assert torch.equal(end, of_all)
        assert not torch.equal(end, others[0][9])
    assert [line for line in results[0]["said"] if "stands after step 9, inside a round of 4 steps" in line]


def lightning_schedules_job() -> None:
    fit(lightning_module(Recorder(), warm_up_and_decay), {"zero_optimization": {"stage": 0}, "qsr": QSR})


def test_a_scheduler_beside_an_lr_block_is_an_error_in_lightning(processes: Processes) -> None:
    with pytest.raises(JobError) as caught:
        processes.run(lightning_schedules_job)
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "ConfigError"
        assert "both qsr.lr and lr_scheduler" in error[1]
