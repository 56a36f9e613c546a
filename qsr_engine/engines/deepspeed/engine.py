"""The DeepSpeed engine that takes local steps; `initialize.py` makes it.

A worker is made of `worker_size` neighbouring ranks: DeepSpeed is told, by the object that it calls mpu, that its
data-parallel group is the worker and that its model-parallel group is the rank alone. All that DeepSpeed reduces at a
step (gradients, their norm, overflow flags) then stays inside the worker.

What is averaged are the fp32 masters, in place, and what derives from them is refreshed afterwards; where they are in
each ZeRO stage and precision is written in replicas.py.

The strategy `parallel` is DeepSpeed's own data parallel over all ranks, with nothing in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.constants import ROUTE_TRAIN
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.utils.data import DistributedSampler

from qsr_engine.averaging import ring_bytes
from qsr_engine.checkpoint.checkpointer import Checkpointer, Identity
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.deepspeed.files import DeepSpeedFiles
from qsr_engine.engines.deepspeed.groups import WorkerGroups
from qsr_engine.engines.deepspeed.internals import deepspeed_uses, keep_checks_inside_the_worker, leave_out_reduction
from qsr_engine.engines.deepspeed.replicas import Stage3, replica_of
from qsr_engine.engines.driver import Driver, Place, Update
from qsr_engine.engines.replica import Replica
from qsr_engine.engines.start import Agreed
from qsr_engine.engines.surface import Surface


class LocalStepEngine(DeepSpeedEngine, Surface):  # type: ignore[misc]  # deepspeed has no types
    """A DeepSpeed engine whose workers take local steps. Made by `initialize`, never constructed.

    (An engine that DeepSpeed has made can take this class only if DeepSpeed's is the first base.)
    Beyond DeepSpeed's own surface: `local_steps` (step, round, period, ...), and `step()` returns True at a boundary.
    """

    worker_groups: WorkerGroups | None  # None under the strategy `parallel`
    checkpoint_engine: Any

    @classmethod
    def taking_over(
        cls,
        engine: DeepSpeedEngine,
        qsr: QSRConfig,
        groups: WorkerGroups | None,
        agreed: Agreed,
        *,
        order: str,
        config: Mapping[str, Any],
    ) -> LocalStepEngine:
        """Turn an engine of deepspeed.initialize into a LocalStepEngine.

        Args:
            order: of the parameters in the optimizer.
            config: as the user gave it, without its block "qsr".
        Raises:
            ConfigError: what DeepSpeed made cannot take local steps.
        """
        if type(engine) is not DeepSpeedEngine:
            raise ConfigError(
                f"deepspeed.initialize gave a {type(engine).__name__}; local steps need a DeepSpeedEngine"
            )
        trained = sum(_numel(p) * p.element_size() for p in engine.module.parameters() if p.requires_grad)
        if groups and qsr.worker_size == 1:
            leave_out_reduction(engine)
        replica = replica_of(engine.module, engine.optimizer, engine.device)
        _check_state(replica.optimizer)
        if groups and isinstance(replica, Stage3):
            keep_checks_inside_the_worker(engine, groups)
        workers = dist.get_world_size(groups.across) if groups else 1
        place = Place(
            groups.across if groups else None,
            groups.worker if groups else None,
            groups.worker_index if groups else 0,
            workers,
        )
        engine.__class__ = cls
        taken: LocalStepEngine = engine
        taken.worker_groups = groups
        taken._driver = Driver(
            qsr,
            replica,
            place,
            config=agreed.config,
            device=engine.device,
            parallel_bytes=ring_bytes(trained, dist.get_world_size()),
            hidden=groups is None and engine.device.type != "cpu",
            record=taken._record,
        )
        layout = {**_layout(engine, replica, workers), "order": order, "model": agreed.model}
        taken._checkpointer = Checkpointer(
            Identity(layout, {**config, "qsr": qsr.model_dump()}, place.worker, workers),
            taken,
            replica,
            DeepSpeedFiles(engine, replica, groups),
            taken._driver.local_steps,
            loaded=taken._driver.learning_rate.set,
        )
        return taken

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's forward(). Under averaging.overlap it may wait for parameters; in evaluation, for all."""
        self._driver.begin_forward(training=self.module.training)
        with deepspeed_uses(self.worker_groups):
            return super().forward(*inputs, **kwargs)

    def eval(self) -> None:
        """As DeepSpeed's eval(). Under overlap "delayed", call `local_steps.wait()` on every rank before it."""
        self._driver.begin_evaluation()
        super().eval()

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> bool:
        """As DeepSpeed's step(); at the end of a round, average the parameters over the workers: see Driver.step()."""

        def update() -> Update | None:
            steps_before, skipped_before = self.global_steps, self.skipped_steps
            with deepspeed_uses(self.worker_groups):
                super(LocalStepEngine, self).step(lr_kwargs)
            if self.global_steps == steps_before:
                return None
            if self.skipped_steps == skipped_before:
                return Update()
            return Update(
                skipped=True,
                loss_scale=getattr(self.optimizer, "loss_scale", None),
                step_scheduler=lambda: self.lr_scheduler.step(**(lr_kwargs or {})) if self.lr_scheduler else None,
            )

        return self._driver.step(last=self.is_gradient_accumulation_boundary(), update=update)

    def _record(self, figures: Mapping[str, float]) -> None:
        """To DeepSpeed's own monitor (TensorBoard, W&B, CSV), on its x axis: samples over all workers."""
        if self.monitor.enabled and self.global_rank == 0:
            self.monitor.write_events([(tag, value, self.global_samples) for tag, value in figures.items()])

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's own reduction, timed where the clock can tell (on a CPU it blocks)."""
        timed = self.worker_groups is None and self.device.type == "cpu"
        with self._driver.timed() if timed else contextlib.nullcontext(), deepspeed_uses(self.worker_groups):
            super().allreduce_gradients(*args, **kwargs)

    def train_batch_size(self) -> int:
        """Samples of one step over all ranks, as in the configuration (DeepSpeed itself counts one worker's)."""
        return int(super().train_batch_size()) * self._driver.place.workers

    def set_train_batch_size(self, train_batch_size: int) -> None:
        workers = self._driver.place.workers
        if train_batch_size % workers:
            raise ValueError(f"train_batch_size {train_batch_size} does not divide into {workers} workers")
        super().set_train_batch_size(train_batch_size // workers)

    def deepspeed_io(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; without a sampler of the caller's, the samples are divided among all ranks.

        DeepSpeed would give every worker the same ones, since it sees one worker's ranks only.
        """
        options = dict(zip(("batch_size", "route", "pin_memory", "data_sampler"), args, strict=False), **kwargs)
        if not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"a {type(dataset).__name__} has no length, so it cannot be divided among the ranks here; give your "
                "loop a DataLoader over a part of the data of its own on every rank"
            )
        if options.get("data_sampler") is None:
            training = options.get("route", ROUTE_TRAIN) == ROUTE_TRAIN
            ranks, rank = dist.get_world_size(), dist.get_rank()
            options["data_sampler"] = DistributedSampler(dataset, ranks, rank, shuffle=training)
        return super().deepspeed_io(dataset, *args[4:], **options)

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, on a boundary only. Raises RuntimeError inside a round."""
        self.local_steps.rounds.check_boundary("save")
        self.local_steps.wait()
        with deepspeed_uses(self.worker_groups):
            return super().save_16bit_model(*args, **kwargs)

    save_checkpoint = Surface.save_checkpoint  # before DeepSpeed's own, which DeepSpeedFiles calls for a worker
    load_checkpoint = Surface.load_checkpoint

    def _checkpoint_tag_validation(self, tag: str) -> None:
        """DeepSpeed compares the tag over all ranks; checkpoint.write.save() has done so."""

    def begin_at(self, step: int) -> None:
        """So many steps have been taken, and the samples of each."""
        self.global_steps = step
        self.global_samples = step * self.train_batch_size()

    def destroy(self) -> None:
        """As DeepSpeed's destroy(); call it before the process group is destroyed."""
        self._driver.close()
        super().destroy()


def _layout(engine: DeepSpeedEngine, replica: Replica, workers: int) -> dict[str, Any]:
    """What must be the same for a run to go on bit for bit, beside the model."""
    return {
        "engine": "deepspeed",
        "workers": workers,
        "worker_size": dist.get_world_size() // workers,
        "zero_stage": int(engine.zero_optimization_stage()),
        "masters": type(replica).__name__,
        "precision": str(engine.get_data_types()[0]).removeprefix("torch."),
        "optimizer": type(engine.basic_optimizer).__name__,
    }


def _check_state(optimizer: torch.optim.Optimizer) -> None:
    """Some optimizers (torch's Adagrad) make their state at once; DeepSpeed may replace the parameters afterwards."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in held for parameter in optimizer.state):
        raise ConfigError(
            f"{type(optimizer).__name__} makes its state for the parameters that it is given, and DeepSpeed gives it "
            "masters in their place afterwards, without state; write an optimizer that makes it at its first step, "
            "such as AdamW or SGD, or fp32 at ZeRO stage 0"
        )


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
