"""A model whose workers take local steps on PyTorch's own sharding (FSDP2); `initialize.py` makes it.

The ranks form a device mesh (worker, shard). Parameters are sharded over the ranks of a worker by torch's
`fully_shard`, block by block, and all that it gathers and reduces stays inside the worker. The optimizer updates a
rank's shards; at a boundary they are averaged over the workers where they lie. torch's own switches
(`set_requires_all_reduce`, `set_requires_gradient_sync`) do not give local steps: they delay a reduction that comes
after all.

    worker of several ranks               `fully_shard` over the worker
    worker of one rank                    the plain model: nothing is gathered; in bf16 it computes in copies
    strategy `parallel`                   `fully_shard` over (worker, shard): torch's HSDP, and FSDP with one worker
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map

from qsr_engine.checkpoint.checkpointer import Checkpointer, Identity
from qsr_engine.config.fsdp import FSDPConfig
from qsr_engine.engines.driver import Driver, Place, Update
from qsr_engine.engines.events import go_on
from qsr_engine.engines.fsdp.copies import ComputeCopies
from qsr_engine.engines.fsdp.files import FSDPFiles
from qsr_engine.engines.fsdp.shards import ComputedInCopies, Shards, local_part, reshard
from qsr_engine.engines.groups import OwnGroups
from qsr_engine.engines.learning_rate import base_rate
from qsr_engine.engines.replica import Parameters, Replica
from qsr_engine.engines.start import Agreed, members_of
from qsr_engine.engines.surface import Surface
from qsr_engine.local_steps.traffic import fsdp_parallel_bytes


class FSDPEngine(Surface):
    """A model whose workers take local steps. Made by `initialize_fsdp`.

    `module` is the model, `optimizer` torch's own, `mesh` the device mesh (worker, shard); `local_steps` tells step,
    round and period. Methods have DeepSpeed's names.

    Args:
        batch: samples of a step over all ranks, samples of a micro-batch of a rank, micro-batches of a step.
        order: of the parameters in the optimizer.
        copies: of the parameters, in bf16, where FSDP does not make them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        mesh: DeviceMesh,
        config: FSDPConfig,
        batch: tuple[int, int, int],
        device: torch.device,
        agreed: Agreed,
        order: str,
        copies: ComputeCopies | None = None,
    ) -> None:
        self.module = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.mesh = mesh
        self.config = config
        self.device = device
        self.global_steps = self.global_samples = self.micro_steps = self._backwards = 0
        self._batch = batch
        self._named = dict(model.named_parameters())  # sharded, and the optimizer's
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._left_out = {name: p for name, p in self._named.items() if id(p) not in held}  # frozen, so far
        self._copies = copies
        self._writer = _tensorboard(config)
        self._loss: Tensor | None = None
        self._loss_is_divided = False  # in a backward of the engine
        # Whether torch itself averages gradients over all workers, at every step of the run.
        self._parallel = config.qsr.strategy == "parallel"
        replica = self._replica()
        self._sharded = replica.sharded
        own = OwnGroups.make(dist.get_world_size() if self._parallel else mesh.size(1))
        workers, worker = (1, 0) if self._parallel else (mesh.size(0), mesh.get_local_rank("worker"))
        trained = [parameter for parameter in self._named.values() if parameter.requires_grad]
        reduced = "fp64" if trained[0].dtype == torch.float64 and not config.bf16.enabled else "fp32"
        gradients = {reduced: sum(parameter.numel() for parameter in trained)}
        self._driver = Driver(
            config.qsr,
            replica,
            Place(own, worker, workers, members_of(config.qsr, own, agreed, engine="fsdp", order=order)),
            config=agreed.config,
            device=device,
            parallel_bytes=fsdp_parallel_bytes(gradients, mesh.size(0)),
            hidden=self._parallel and dist.get_world_size() > 1,
            record=self._record,
            stand_at=self._stand_at,
        )
        layout = {
            "engine": "fsdp",
            "workers": workers,
            "worker_size": dist.get_world_size() // workers,
            "precision": "bfloat16" if config.bf16.enabled else "float32",
            "optimizer": type(optimizer).__name__,
            "order": order,
            "model": agreed.model,
        }
        given = {**config.model_dump(exclude={"qsr"}), "qsr": config.qsr.model_dump()}
        self._checkpointer = Checkpointer(
            Identity(layout, given, worker, workers),
            self,
            replica,
            FSDPFiles(self, self._named, replica, own.inside),
            self.local_steps,
            averaged=self._driver.averaged,
            loaded=self._go_on,
        )

    def _replica(self) -> Replica:
        if isinstance(self.module, FSDPModule):
            pinned = self.config.fsdp.cpu_offload
            return Shards(self.module, self.optimizer, self.mesh, self.device, pinned=pinned)
        if self._copies is not None:
            return ComputedInCopies(self.module, self.optimizer, self._copies.withdraw)
        return Parameters(self.module, self.optimizer)

    # ---------------------------------------------------------------------------------------------- a step

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's forward. Under averaging.overlap it may wait for parameters; in evaluation, for all."""
        self._driver.begin_forward(training=self.module.training)
        self._begin_micro_batch()
        outputs = self.module(*inputs, **kwargs)
        return tree_map(self._divided, outputs) if self.gradient_accumulation_steps() > 1 else outputs

    def _begin_micro_batch(self) -> None:
        kind = self.device.type
        if torch.is_grad_enabled() and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.half:
            raise RuntimeError(
                "the model is called under torch.autocast in float16, whose gradients need a scaled loss, and the FSDP "
                "engine scales none; write torch.autocast(..., dtype=torch.bfloat16)"
            )
        if self._parallel and isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(self.is_gradient_accumulation_boundary())

    def _divided(self, output: Any) -> Any:
        """An output whose gradient is divided by the micro-batches of a step, as DeepSpeed does for `loss.backward()`.

        Each once: what the model itself makes of it, as a loss beside its logits, has the tensor before this one.
        """
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return output
        return _DividedGradient.apply(output, self._divisor)

    def _divisor(self) -> int:
        return 1 if self._loss_is_divided else self.gradient_accumulation_steps()

    def train(self, mode: bool = True) -> None:
        self._driver.end_evaluation() if mode else self._driver.begin_evaluation()
        self.module.train(mode)

    def eval(self) -> None:
        """Inside a round, and under overlap "delayed", the model is this worker's own: see averaged()."""
        self.train(False)

    def backward(self, loss: Tensor) -> Tensor:
        """Backward of a micro-batch's mean loss; gradients of the micro-batches of a step are averaged.

        `loss.backward()` does the same for a loss of what the engine has returned.
        """
        self._driver.check_own("backward()")
        self._begin_micro_batch()
        self._loss_is_divided = True
        try:
            (loss / self.gradient_accumulation_steps()).backward()  # type: ignore[no-untyped-call]
        finally:
            self._loss_is_divided = False
        self._loss = loss.detach()
        self._backwards += 1
        return loss

    def step(self) -> bool:
        """End a micro-batch; after the last one of a step, take the optimizer's step; at the end of a round, average:
        see Driver.step()."""
        last = self.is_gradient_accumulation_boundary()

        def update() -> Update | None:
            self.micro_steps += 1
            if not last:
                return None
            self._check_reduced()
            self._check_held()
            norm = self._clip()
            self.hold_masters()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            self._backwards = 0
            self.global_steps += 1
            self.global_samples += self.train_batch_size()
            return Update(gradient_norm=norm)

        return self._driver.step(last=last, update=update)

    def hold_masters(self) -> None:
        """The module holds what the optimizer updates, and nothing that was gathered or made from it before."""
        reshard(self.module)
        if self._copies is not None:
            self._copies.withdraw()

    def _check_reduced(self) -> None:
        """Under `parallel`, gradients of earlier micro-batches wait for those of the last one, block by block."""
        if not self._parallel or self.gradient_accumulation_steps() == 1:
            return
        for name, part in self.module.named_modules():
            groups = part._get_fsdp_state()._fsdp_param_groups if isinstance(part, FSDPModule) else []
            if any(getattr(group, "_partial_reduce_output", None) is not None for group in groups):
                raise RuntimeError(
                    f"the block {name!r} was used in an earlier micro-batch of step {self.local_steps.step} and not in "
                    "the last one, with which torch's HSDP reduces the gradients of both; use it in the last one too, "
                    "or write gradient_accumulation_steps 1"
                )

    def _check_held(self) -> None:
        """Parameters may be frozen and unfrozen at any time; the optimizer must have all that are trained."""
        for name, parameter in self._left_out.items():
            if parameter.requires_grad:
                raise RuntimeError(
                    f"the parameter {name!r} takes gradients at step {self.local_steps.step}, and the optimizer has "
                    "not got it, so nothing would train it; give the optimizer all of model.parameters() in "
                    "initialize_fsdp(optimizer=...), or leave its requires_grad False"
                )

    def _clip(self) -> Tensor | None:
        """Clip this worker's gradient to the configured L2 norm. Returns what it was; None where nobody asks for it."""
        limit = self.config.gradient_clipping
        if not (limit or self._driver.measuring):
            return None
        gradients = [local_part(p.grad) for p in self._named.values() if p.grad is not None]
        norm = get_total_norm(gradients).to(self.device)
        if self._sharded:
            squares = norm.square()
            dist.all_reduce(squares, group=self.mesh.get_group("shard"))
            norm = squares.sqrt()
        if gradients and limit:
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        return norm

    def _record(self, figures: Mapping[str, float]) -> None:
        """To TensorBoard, under DeepSpeed's tags and on its x axis: samples over all workers."""
        if self._writer is None:
            return
        events = {**figures, "Train/Samples/lr": base_rate(self.optimizer.param_groups)}
        if self._loss is not None:
            events["Train/Samples/train_loss"] = self._loss.item()
        for tag, value in events.items():
            self._writer.add_scalar(tag, value, self.global_samples)

    def _go_on(self) -> None:
        """A checkpoint has been loaded."""
        self._driver.learning_rate.set()
        if self._writer is not None:
            self._writer = go_on(self._writer, self.global_samples)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last one of its step."""
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    @property
    def micro_batches_seen(self) -> int:
        """Micro-batches of the step under way whose gradients are there."""
        return max(self._backwards, self.micro_steps % self.gradient_accumulation_steps())

    def train_batch_size(self) -> int:
        """Samples of one step over all ranks."""
        return self._batch[0]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._batch[1]

    def gradient_accumulation_steps(self) -> int:
        return self._batch[2]

    def _set_accumulation(self, steps: int) -> None:
        micro = self.train_micro_batch_size_per_gpu()
        self._batch = (micro * steps * dist.get_world_size(), micro, steps)

    def get_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def begin_at(self, step: int) -> None:
        """So many steps have been taken, and the samples of each."""
        self.global_steps = step
        self.global_samples = step * self.train_batch_size()

    def destroy(self) -> None:
        """Call it before the process group is destroyed."""
        self._driver.close()
        if self._writer is not None:
            self._writer.close()


class _DividedGradient(torch.autograd.Function):
    """A tensor as it is, in the same memory; its gradient is divided by what a function gives in the backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, divisor: Callable[[], int]) -> Tensor:
        ctx.divisor = divisor
        return tensor.detach()  # no view for autograd, so a loop may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.divisor(), None


def _tensorboard(config: FSDPConfig) -> Any:
    if not config.tensorboard.enabled or dist.get_rank() != 0:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(os.path.join(config.tensorboard.output_path, config.tensorboard.job_name))
