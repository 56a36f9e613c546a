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
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.constants import ROUTE_TRAIN
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor

from qsr_engine.checkpoint.checkpointer import Checkpointer, Identity
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.deepspeed.files import DeepSpeedFiles
from qsr_engine.engines.deepspeed.groups import WorkerGroups
from qsr_engine.engines.deepspeed.internals import (
    deepspeed_uses,
    keep_checks_inside_the_worker,
    leave_out_later_events,
    leave_out_reduction,
    own_autocast,
    show_base_rate,
)
from qsr_engine.engines.deepspeed.loaders import DividedSampler, Loaders
from qsr_engine.engines.deepspeed.replicas import Stage3, replica_of
from qsr_engine.engines.deepspeed.traffic import parallel_bytes
from qsr_engine.engines.driver import Driver, Place, Update
from qsr_engine.engines.groups import OwnGroups
from qsr_engine.engines.replica import Parameters, Replica, sum_of_squares
from qsr_engine.engines.start import Agreed, members_of
from qsr_engine.engines.surface import Surface


class LocalStepEngine(DeepSpeedEngine, Surface):  # type: ignore[misc]  # deepspeed has no types
    """A DeepSpeed engine whose workers take local steps. Made by `initialize`, never constructed.

    (An engine that DeepSpeed has made can take this class only if DeepSpeed's is the first base.)
    Beyond DeepSpeed's own surface: `local_steps` (step, round, period, ...), and `step()` returns True at a boundary.
    """

    worker_groups: WorkerGroups | None  # None under the strategy `parallel`
    checkpoint_engine: Any
    _backwards = _direct_backwards = 0  # since the last optimizer step: of engine.backward(), of loss.backward()

    @classmethod
    def taking_over(
        cls,
        engine: DeepSpeedEngine,
        qsr: QSRConfig,
        groups: WorkerGroups | None,
        own: OwnGroups,
        agreed: Agreed,
        *,
        order: str,
        config: Mapping[str, Any],
    ) -> LocalStepEngine:
        """Turn an engine of deepspeed.initialize into a LocalStepEngine.

        Args:
            own: of the averaging.
            order: of the parameters in the optimizer.
            config: as the user gave it, without its block "qsr".
        Raises:
            ConfigError: what DeepSpeed made cannot take local steps.
        """
        if type(engine) is not DeepSpeedEngine:
            raise ConfigError(
                f"deepspeed.initialize gave a {type(engine).__name__}; local steps need a DeepSpeedEngine"
            )
        own_autocast(engine)
        show_base_rate(engine)
        if groups and qsr.worker_size == 1:
            leave_out_reduction(engine)
        replica = replica_of(engine.module, engine.optimizer, engine.device)
        _check_state(replica.optimizer)
        if groups and isinstance(replica, Stage3):
            keep_checks_inside_the_worker(engine, groups)
        if dist.get_rank(engine.data_parallel_group) == 0:
            # Under checkpoint.use_node_local_storage DeepSpeed has only the first rank of every host write a model.
            engine.save_non_zero_checkpoint = True
        workers = dist.get_world_size() // qsr.worker_size if groups else 1
        members = members_of(qsr, own, agreed, engine="deepspeed", order=order)
        place = Place(own, groups.worker_index if groups else 0, workers, members)
        engine.__class__ = cls
        taken: LocalStepEngine = engine
        taken.worker_groups = groups
        taken._loaders = Loaders()
        taken._driver = Driver(
            qsr,
            replica,
            place,
            config=agreed.config,
            device=engine.device,
            parallel_bytes=parallel_bytes(engine, qsr.worker_size),
            hidden=groups is None and engine.device.type != "cpu",
            record=taken._record,
            stand_at=taken._stand_at,
        )
        layout = {**_layout(engine, replica, workers), "order": order, "model": agreed.model}
        taken._checkpointer = Checkpointer(
            Identity(layout, {**config, "qsr": qsr.model_dump()}, place.worker, workers),
            taken,
            replica,
            DeepSpeedFiles(engine, replica, groups),
            taken._driver.local_steps,
            averaged=taken._driver.averaged,
            loaded=taken._go_on,
        )
        return taken

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's forward(). Under averaging.overlap it may wait for parameters; in evaluation, for all."""
        self._driver.begin_forward(training=self.module.training)
        if self._autocast_outside() == torch.float16 and not super().torch_autocast_enabled() and self.module.training:
            raise RuntimeError(
                "torch.autocast in fp16 is around this forward, and nothing scales the loss; leave it out and write "
                '"torch_autocast": {"enabled": true, "dtype": "float16"}, which does, or take bf16'
            )
        with deepspeed_uses(self.worker_groups):
            return super().forward(*inputs, **kwargs)

    def eval(self) -> None:
        """As DeepSpeed's. Inside a round and under overlap "delayed" the model is this worker's own: see averaged()."""
        self._driver.begin_evaluation()
        super().eval()

    def train(self, mode: bool = True) -> None:
        """As DeepSpeed's."""
        self._driver.end_evaluation() if mode else self._driver.begin_evaluation()
        super().train(mode)

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> bool:
        """As DeepSpeed's step(); at the end of a round, average the parameters over the workers: see Driver.step()."""

        def update() -> Update | None:
            steps_before, skipped_before = self.global_steps, self.skipped_steps
            scaler = self.torch_autocast_z0_gradscaler  # torch's, which skips an update by itself and lowers its scale
            scale = scaler.get_scale() if scaler and self.is_gradient_accumulation_boundary() else None
            norm = self._plain_gradient_norm(scale)
            with deepspeed_uses(self.worker_groups):
                super(LocalStepEngine, self).step(lr_kwargs)
            if self.global_steps == steps_before:
                return None
            self._backwards = self._direct_backwards = 0
            self.micro_steps = self.global_steps * self.gradient_accumulation_steps()  # also where step() ends a step
            if scale is not None and scaler.get_scale() < scale:
                self.skipped_steps += 1
                return Update(skipped=True, loss_scale=scaler.get_scale(), gradient_norm=norm)
            norm = self.get_global_grad_norm() if norm is None else norm  # computed by DeepSpeed's own optimizers
            done = Update(loss_scale=self._loss_scale(), gradient_norm=norm)
            if self.skipped_steps == skipped_before:
                return done
            return dataclasses.replace(
                done,
                skipped=True,
                step_scheduler=lambda: self.lr_scheduler.step(**(lr_kwargs or {})) if self.lr_scheduler else None,
            )

        return self._driver.step(last=self.is_gradient_accumulation_boundary(), update=update)

    def _plain_gradient_norm(self, scale: float | None) -> Tensor | None:
        """Where the optimizer is torch's own, DeepSpeed tells none. None where nobody asks, or DeepSpeed will tell.

        Args:
            scale: of the loss.
        """
        replica = self._driver.replica
        last = self.is_gradient_accumulation_boundary()
        if not (self._driver.measuring and last and isinstance(replica, Parameters)):
            return None
        gradients = [master.grad for master in replica.masters() if master.grad is not None]
        return sum_of_squares(gradients, self.device).sqrt() / (scale or 1.0)

    def _loss_scale(self) -> float | None:
        """What the loss is multiplied by in fp16; None elsewhere."""
        if self.torch_autocast_z0_gradscaler:
            return float(self.torch_autocast_z0_gradscaler.get_scale())
        scaled = self.fp16_enabled() or self.torch_autocast_dtype() == torch.float16
        return float(self.optimizer.loss_scale) if scaled and hasattr(self.optimizer, "loss_scale") else None

    def _autocast_outside(self) -> torch.dtype | None:
        """The type of a torch.autocast around what runs now, over parameters in fp32."""
        on = torch.is_autocast_enabled(self.device.type) and not (self.fp16_enabled() or self.bfloat16_enabled())
        return torch.get_autocast_dtype(self.device.type) if on else None

    def torch_autocast_enabled(self) -> bool:
        """As DeepSpeed's, and under a torch.autocast of the caller's, which DeepSpeed would switch off on a GPU."""
        return bool(super().torch_autocast_enabled()) or self._autocast_outside() is not None

    def torch_autocast_dtype(self) -> torch.dtype | None:
        configured: torch.dtype | None = super().torch_autocast_dtype()
        return configured if super().torch_autocast_enabled() else self._autocast_outside()

    def _backward_prologue(self) -> None:
        """DeepSpeed calls it at the beginning of every backward: the average's gradients are no worker's."""
        self._driver.check_own("backward()")
        super()._backward_prologue()

    def _backward_epilogue(self) -> None:
        """DeepSpeed calls it at the end of every backward, engine.backward() and loss.backward() alike."""
        super()._backward_epilogue()
        if self._running_engine_backward:
            self._backwards += 1
        else:
            self._direct_backwards += 1

    @property
    def micro_batches_seen(self) -> int:
        """Micro-batches of the step under way whose gradients are there; a loop may call step() after each or once.

        A direct backward may be that of another engine whose loss went through this one's model (a GAN's), so whole
        steps of them tell nothing.
        """
        return self._backwards + self._direct_backwards % int(self.gradient_accumulation_steps())

    def _record(self, figures: Mapping[str, float]) -> None:
        """To DeepSpeed's own monitor (TensorBoard, W&B, CSV), on its x axis: samples over all workers."""
        if self.monitor.enabled and self.global_rank == 0:
            self.monitor.write_events([(tag, value, self.global_samples) for tag, value in figures.items()])

    def _go_on(self) -> None:
        """A checkpoint has been loaded."""
        self._driver.learning_rate.set()
        self._loaders.go_to(self.micro_steps)
        leave_out_later_events(self)

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's own reduction, timed where the clock can tell (on a CPU it blocks)."""
        timed = self.worker_groups is None and self.device.type == "cpu"
        with self._driver.timed() if timed else contextlib.nullcontext(), deepspeed_uses(self.worker_groups):
            super().allreduce_gradients(*args, **kwargs)

    def offload_states(self, include: Any = None, *args: Any, **kwargs: Any) -> None:
        """As DeepSpeed's, for the optimizer's states and the gradients.

        Raises:
            RuntimeError: parameters were to be moved, in whose memory boundaries average, so that it would not be freed
                and the next boundary would average what was there.
        """
        held = (OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.lp_params)
        moved = [state.value for state in held if include is None or state in include]
        if moved and self.worker_groups is not None:
            others = [f"OffloadStateTypeEnum.{state.name}" for state in OffloadStateTypeEnum if state not in held]
            raise RuntimeError(
                f"offload_states() would move {' and '.join(moved)}, and a boundary averages the parameters where they "
                f"lie; write include=[{', '.join(others)}], or zero_optimization.offload_optimizer for the whole run"
            )
        super().offload_states(include, *args, **kwargs)

    def train_batch_size(self) -> int:
        """Samples of one step over all ranks, as in the configuration (DeepSpeed itself counts one worker's)."""
        return int(super().train_batch_size()) * self._driver.place.workers

    set_train_batch_size = Surface.set_train_batch_size  # DeepSpeed's own counts one worker's samples

    def _set_accumulation(self, steps: int) -> None:
        """So many micro-batches in a step. ZeRO's optimizers were told, too, and offload to the CPU asks them."""
        micro, ranks = self.train_micro_batch_size_per_gpu(), dist.get_world_size() // self._driver.place.workers
        super().set_train_batch_size(micro * ranks * steps)
        if hasattr(self.optimizer, "gradient_accumulation_steps"):
            self.optimizer.gradient_accumulation_steps = steps

    def deepspeed_io(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; without a sampler of the caller's, the samples are divided among all ranks, and those of
        training are in another order in every pass and go on where they were after load_checkpoint().

        DeepSpeed would give every worker the same ones, since it sees one worker's ranks only.
        """
        options = dict(zip(("batch_size", "route", "pin_memory", "data_sampler"), args, strict=False), **kwargs)
        if not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"a {type(dataset).__name__} has no length, so it cannot be divided among the ranks here; give your "
                "loop a DataLoader over a part of the data of its own on every rank"
            )
        if options.get("data_sampler") is not None:
            return super().deepspeed_io(dataset, *args[4:], **options)
        training = options.get("route", ROUTE_TRAIN) == ROUTE_TRAIN
        options["data_sampler"] = DividedSampler(dataset, shuffle=training)
        loader = super().deepspeed_io(dataset, *args[4:], **options)
        return self._loaders.add(loader, self.micro_steps) if training else loader

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, of the workers' average at this step. Every rank must call it."""
        with self.averaged(), deepspeed_uses(self.worker_groups):
            return super().save_16bit_model(*args, **kwargs)

    save_checkpoint = Surface.save_checkpoint  # before DeepSpeed's own, which DeepSpeedFiles calls for a worker
    load_checkpoint = Surface.load_checkpoint

    def _checkpoint_tag_validation(self, tag: str) -> None:
        """DeepSpeed compares the tag over all ranks; checkpoint.write.save() has done so."""

    def begin_at(self, step: int) -> None:
        """So many steps have been taken, and the samples of each."""
        self.global_steps = step
        self.global_samples = step * self.train_batch_size()

    @property
    def destroyed(self) -> bool:
        return self._driver.closed

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
