"""Local steps in the DeepSpeed engine. The only file that imports deepspeed.

`initialize` goes through the real `deepspeed.initialize`. A worker is made of `worker_size` neighbouring ranks:
DeepSpeed is told, by the object that it calls mpu, that its data-parallel group is the worker and that its
model-parallel group is the rank alone. All that DeepSpeed reduces at a step (gradients, their norm, overflow flags)
then stays inside the worker. The engine that comes back takes the class `LocalStepEngine`, whose `step()` counts steps
and averages the parameters at boundaries.

Which tensors are averaged (the fp32 masters; what derives from them is refreshed afterwards):

    stage 0, fp32      the parameters themselves, moved into flat buckets
    stage 1            `single_partition_of_fp32_groups`, flat already, then `update_lp_params()`
    stage 1, BF16_Optimizer (bf16 with fp32 gradient accumulation)   `fp32_groups_flat_partition`, likewise

The strategy `parallel` is DeepSpeed's own data parallel over all ranks, with nothing in between.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from qsr_engine.averaging import (
    Averager,
    average_packed,
    bucket_bytes,
    check_agreement,
    flat_buckets,
    ring_bytes,
)
from qsr_engine.config import ConfigError, QSRConfig, check_world_size, digest, split_deepspeed_config
from qsr_engine.engines.deepspeed_config import check_supported, resolve_deepspeed_config, shared_part
from qsr_engine.engines.one_rank import leave_out_reduction
from qsr_engine.engines.worker_groups import WorkerGroups
from qsr_engine.local_steps import LocalSteps


@contextlib.contextmanager
def _deepspeed_uses(workers: WorkerGroups | None) -> Iterator[None]:
    """Let DeepSpeed ask these groups, None for all ranks.

    DeepSpeed keeps them in one global variable and reads it at every step, so that a second engine in the process
    would silently reduce over the groups of the first.
    """
    before = deepspeed_groups.mpu
    deepspeed_groups.mpu = workers
    try:
        yield
    finally:
        deepspeed_groups.mpu = before


class LocalStepEngine(DeepSpeedEngine):  # type: ignore[misc]  # deepspeed has no types
    """A DeepSpeed engine whose workers take local steps. Made by `initialize`, never constructed.

    Beyond DeepSpeed's own surface: `local_steps` (step, round, period, ...), and `step()` returns True at a boundary.
    """

    local_steps: LocalSteps
    worker_groups: WorkerGroups | None  # None under the strategy `parallel`

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's forward(). Under averaging.overlap it may wait for parameters; in evaluation, for all."""
        if self.module.training:
            self.local_steps.begin_forward()
        else:
            self.local_steps.finish()
        return super().forward(*inputs, **kwargs)

    def eval(self) -> None:
        """As DeepSpeed's eval(). Under overlap "delayed", call `local_steps.wait()` on every rank before it."""
        self.local_steps.finish()
        super().eval()

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> bool:
        """As DeepSpeed's step(); at the end of a round, average the parameters over the workers.

        Returns:
            True at a boundary, False inside a round or inside gradient accumulation.
        Raises:
            BoundaryError: on every rank, as averaging.exchange_headers() says; nothing was averaged.
            RuntimeError: the run has taken its total_steps already.
        """
        if self.local_steps.finished:
            raise RuntimeError(
                f"the run ended at step {self.local_steps.step}, which is qsr.total_steps; a longer run needs a larger "
                "total_steps from its start, since the learning rate and the last round depend on it"
            )
        if self.is_gradient_accumulation_boundary():
            self.local_steps.begin_update()
            if self.worker_groups and self.local_steps.mode == "parallel":
                self._average_gradients(self.worker_groups.across)
        steps_before = self.global_steps
        with _deepspeed_uses(self.worker_groups):
            super().step(lr_kwargs)
        if self.global_steps == steps_before:
            return False
        boundary = self.local_steps.advance()
        self._set_learning_rate()
        if boundary and self.monitor.enabled and self.global_rank == 0:
            self._write_boundary()
        return boundary

    def _write_boundary(self) -> None:
        """To DeepSpeed's own monitor (TensorBoard, W&B, CSV), on its x axis: samples over all workers."""
        state = self.local_steps
        figures: dict[str, float] = {
            "period": state.period,
            "averagings": state.averagings,
            "bytes_sent": state.bytes_sent,
        }
        if state.relative_distance is not None:
            figures["relative_distance"] = state.relative_distance
        events = [(f"Train/LocalSteps/{name}", value, self.global_samples) for name, value in figures.items()]
        self.monitor.write_events(events)

    def _set_learning_rate(self) -> None:
        if self.local_steps.qsr.lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.local_steps.learning_rate * group.get("lr_scale", 1.0)

    def _average_gradients(self, group: dist.ProcessGroup) -> None:
        """Average over the workers what DeepSpeed reduced inside this one; the first phase of `post_local`."""
        started = time.perf_counter()
        average_packed(_gradients(self), group, bucket_bytes(self.local_steps.qsr.averaging.bucket_mb, group))
        self.local_steps.seconds_averaging += time.perf_counter() - started

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's own reduction, timed where the clock can tell (on a CPU it blocks)."""
        started = time.perf_counter()
        with _deepspeed_uses(self.worker_groups):
            super().allreduce_gradients(*args, **kwargs)
        if self.worker_groups is None and self.device.type == "cpu":
            self.local_steps.seconds_averaging += time.perf_counter() - started

    @property
    def seconds_averaging(self) -> float | None:
        """Wall-clock seconds in averagings so far; None where it runs beside compute and cannot be told apart."""
        hidden = self.worker_groups is None and self.device.type != "cpu"
        return None if hidden else self.local_steps.seconds_averaging

    def train_batch_size(self) -> int:
        """Samples of one step over all ranks, as in the configuration (DeepSpeed itself counts one worker's)."""
        return int(super().train_batch_size()) * self._workers

    def set_train_batch_size(self, train_batch_size: int) -> None:
        if train_batch_size % self._workers:
            raise ValueError(f"train_batch_size {train_batch_size} does not divide into {self._workers} workers")
        super().set_train_batch_size(train_batch_size // self._workers)

    @property
    def _workers(self) -> int:
        return dist.get_world_size(self.worker_groups.across) if self.worker_groups else 1

    def save_checkpoint(self, save_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> bool:
        """DeepSpeed's own checkpoint, one folder a worker, with the local-step state in it; on a boundary only.

        Arguments as DeepSpeed's. Random state and the position in the data are the caller's, as with DeepSpeed.

        Raises:
            RuntimeError: inside a round, where every worker has parameters of its own.
        """
        if not self.local_steps.on_boundary:
            raise RuntimeError(
                f"step {self.local_steps.step} is inside a round of {self.local_steps.period} steps, where every "
                "worker has parameters of its own; save when engine.step() has returned True"
            )
        self.local_steps.wait()
        names = ("tag", "client_state", "save_latest", "exclude_frozen_parameters")
        kwargs.update(zip(names, args, strict=False))
        tag = str(kwargs.pop("tag", None) or f"global_step{self.global_steps}")
        state = {**(kwargs.pop("client_state", None) or {}), _STATE_KEY: self.local_steps.state_dict()}
        folder = self._worker_folder(save_dir)
        folder.mkdir(parents=True, exist_ok=True)  # DeepSpeed does it on rank 0 of all ranks only
        with _deepspeed_uses(self.worker_groups):
            saved = bool(super().save_checkpoint(str(folder), tag=tag, client_state=state, **kwargs))
        carried = self.local_steps.averager.state_dict()
        if carried:
            torch.save(carried, folder / tag / self._averager_file)
        if kwargs.get("save_latest", True) and self.worker_groups and self.worker_groups.get_data_parallel_rank() == 0:
            (folder / "latest").write_text(tag, encoding="utf-8")
        dist.barrier()
        return saved

    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load what save_checkpoint() wrote, every worker its own. Arguments and result as DeepSpeed's.

        Raises:
            FileNotFoundError: there is no checkpoint of this worker in load_dir.
        """
        self.local_steps.averager.finish()
        folder = self._worker_folder(load_dir)
        tag = kwargs.get("tag", args[0] if args else None)
        if tag is not None and not (folder / str(tag)).is_dir():
            raise FileNotFoundError(f"{folder}: there is no checkpoint with the tag {tag!r} here")
        with _deepspeed_uses(self.worker_groups):
            path, client_state = super().load_checkpoint(str(folder), *args, **kwargs)
        if path is None or client_state is None or _STATE_KEY not in client_state:
            raise FileNotFoundError(
                f"{folder}: there is no checkpoint that this engine wrote for this worker; give the folder that "
                "save_checkpoint() was given, and start as many workers as wrote it"
            )
        self.local_steps.load_state_dict(client_state.pop(_STATE_KEY))
        self.local_steps.averager.restart()
        carried = Path(path).parent / self._averager_file
        if carried.exists():
            self.local_steps.averager.load_state_dict(torch.load(carried, weights_only=True))
        self._set_learning_rate()
        return path, client_state

    @property
    def _averager_file(self) -> str:
        """What this rank carries over from one averaging to the next (wire_dtype int8), beside DeepSpeed's files."""
        return f"averager_rank_{self.global_rank:05d}.pt"

    def destroy(self) -> None:
        """As DeepSpeed's destroy(); call it before the process group is destroyed."""
        self.local_steps.averager.close()
        super().destroy()

    def _worker_folder(self, folder: str | os.PathLike[str]) -> Path:
        return Path(folder) / f"worker-{self.worker_groups.worker_index:05d}" if self.worker_groups else Path(folder)


_STATE_KEY = "qsr_local_steps"


# -------------------------------------------------------------------------------------------------- initialize


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> tuple[LocalStepEngine, Any, Any, Any]:
    """`deepspeed.initialize` for a configuration with a `"qsr"` block; the same arguments, the same four results.

    The parameters and buffers of rank 0 become those of every rank. `train_batch_size` counts the samples of one step
    over all ranks, as in DeepSpeed. With `qsr.lr` the engine sets the learning rate of every parameter group at every
    step (times the group's `lr_scale`, if it has one); without, it follows the optimizer's.

    Returns:
        (engine, optimizer, training_dataloader, lr_scheduler); the engine is a LocalStepEngine.
    Raises:
        ConfigError: the configuration is wrong, or asks for what does not work with local steps (yet).
        AgreementError: on every rank, if the ranks were started with different configurations, models, or parameters
            in the optimizer.
    """
    config = next((c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None), None)
    if config is None:
        raise ConfigError('initialize() needs config=..., a DeepSpeed configuration with a "qsr" block')
    if model is None:
        raise ConfigError("initialize() needs model=..., a torch.nn.Module")
    ds_config, qsr = split_deepspeed_config(config)
    check_supported(ds_config, qsr)
    if optimizer is None and not ds_config.get("optimizer"):
        raise ConfigError('there is no optimizer; give initialize() one, or write an "optimizer" block')
    for name, given in (("mpu", mpu), ("mesh_param", mesh_param)):
        if given is not None:
            raise ConfigError(f"initialize({name}=...): local steps set the process groups themselves; leave it out")
    if lr_scheduler is not None and qsr.lr is not None:
        raise ConfigError("both qsr.lr and lr_scheduler=... set the learning rate; leave one of them out")
    _start_process_group(distributed_port, dist_init_required)

    # First of all, so that what follows fails on every rank or on none.
    facts = {"config": {**shared_part(ds_config), "qsr": qsr.model_dump()}, "model": _describe(model)}
    device = torch.device(get_accelerator().current_device_name())
    check_agreement(facts, device)
    workers = check_world_size(dist.get_world_size(), qsr.worker_size)
    parallel = qsr.strategy == "parallel"
    ds_config = resolve_deepspeed_config(ds_config, dist.get_world_size(), 1 if parallel else workers)
    model.to(device)
    _copy_from_rank_0(model)

    groups = None if parallel else WorkerGroups.make(qsr.worker_size)
    with _deepspeed_uses(groups):
        engine, ds_optimizer, _, lr_scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            lr_scheduler=lr_scheduler,
            mpu=groups,
            collate_fn=collate_fn,
            config=ds_config,
        )
    check_agreement({"optimizer": _describe_optimizer(engine)}, device)
    _take_local_steps(engine, qsr, groups, digest(facts["config"]))
    if training_data is not None:
        # DeepSpeed would give every worker the same samples, since it sees one worker's ranks only.
        sampler: DistributedSampler[Any] = DistributedSampler(training_data, dist.get_world_size(), dist.get_rank())
        engine.training_dataloader = engine.deepspeed_io(training_data, data_sampler=sampler)
    return engine, ds_optimizer, engine.training_dataloader, lr_scheduler


def _start_process_group(port: int, init_required: bool | None) -> None:
    if not dist.is_initialized() and "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
        raise ConfigError(
            "this process was not started by a launcher (RANK is not set); start it with "
            "`deepspeed SCRIPT ...`, `deepspeed --module MODULE ...` or torchrun"
        )
    # DeepSpeed would compile a shared-memory collective for CPUs, which takes a minute and a C++ compiler, and which
    # only its inference engine calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        distributed_port=port,
        dist_init_required=init_required,
    )
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # DeepSpeed does it too, after our first collective


def _describe(model: nn.Module) -> dict[str, str]:
    """Name, type and shape of every parameter and buffer; it must be the same on every rank."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors}


@torch.no_grad()
def _copy_from_rank_0(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        contiguous = tensor.detach().contiguous()
        dist.broadcast(contiguous, 0)
        tensor.copy_(contiguous)


def _take_local_steps(engine: DeepSpeedEngine, qsr: QSRConfig, groups: WorkerGroups | None, config_digest: int) -> None:
    """Turn an engine of deepspeed.initialize into a LocalStepEngine."""
    if type(engine) is not DeepSpeedEngine:
        raise ConfigError(f"deepspeed.initialize gave a {type(engine).__name__}; local steps need a DeepSpeedEngine")
    if qsr.lr is not None:
        _check_learning_rates(engine.optimizer.param_groups)
    trained = sum(p.numel() * p.element_size() for p in engine.module.parameters() if p.requires_grad)
    average_buffers = qsr.averaging.buffers == "average"
    if groups and qsr.worker_size == 1:
        leave_out_reduction(engine)
    engine.__class__ = LocalStepEngine
    engine.worker_groups = groups
    engine.local_steps = LocalSteps(
        qsr,
        _averager(engine, qsr, groups),
        config_digest,
        optimizer_lr=lambda: float(engine.optimizer.param_groups[0]["lr"]),
        buffers=[b for b in engine.module.buffers() if b.is_floating_point() and average_buffers],
        after_averaging=getattr(engine.optimizer, "update_lp_params", None) or (lambda: None),
        parallel_bytes=ring_bytes(trained, dist.get_world_size()),
    )
    engine._set_learning_rate()


# Of DeepSpeed's optimizers with flat fp32 masters: the masters, the low-precision copies, flat and by parameter.
_FLAT_MASTERS = (
    ("single_partition_of_fp32_groups", "bit16_groups_flat", "bit16_groups"),
    ("fp32_groups_flat_partition", "bf16_groups_flat", "bf16_groups"),
)


def _averager(engine: DeepSpeedEngine, qsr: QSRConfig, groups: WorkerGroups | None) -> Averager:
    """What is averaged at a boundary: the masters, in place."""
    if groups is None:
        return Averager([], None)
    optimizer, options = engine.optimizer, qsr.averaging
    names = next((names for names in _FLAT_MASTERS if hasattr(optimizer, names[0])), None)
    if names is not None:
        masters, copies, parameters = (getattr(optimizer, name) for name in names)
        flat = [master.detach() for master in masters]
        averager = Averager(
            flat, groups.across, options, shard_group=groups.worker, tensors=lambda: list(getattr(optimizer, names[0]))
        )
        if options.overlap == "next_forward":
            _overlap_masters(averager, engine.module, copies, parameters, qsr.worker_size)
        return averager

    def held() -> list[Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    buckets = flat_buckets(held(), bucket_bytes(options.bucket_mb, groups.across))
    averager = Averager(buckets, groups.across, options, tensors=held)
    if options.overlap == "next_forward":
        places = [(parameter, *_place_in(parameter, buckets)) for parameter in held() if parameter.numel()]
        averager.overlap_with(engine.module, places, refresh=lambda part: None)
    return averager


def _overlap_masters(
    averager: Averager, module: nn.Module, copies: list[Tensor], parameters: list[list[Tensor]], worker_size: int
) -> None:
    """The model reads low-precision copies, which lie in their flat tensors as the masters do in theirs."""
    if worker_size > 1:
        raise ConfigError(
            f"qsr.averaging.overlap is 'next_forward' and qsr.worker_size is {worker_size} under ZeRO: a rank holds a "
            "part of the masters, so a parameter is whole only after a collective inside the worker, for which a "
            "forward cannot wait; write overlap 'none' or 'delayed', or worker_size 1, or ZeRO stage 0"
        )
    places = [
        (parameter, *_place_in(parameter, copies)) for group in parameters for parameter in group if parameter.numel()
    ]

    @torch.no_grad()
    def refresh(part: Tensor) -> None:
        group, start, stop = _place_in(part, averager.buckets)
        copies[group][start:stop].copy_(part)

    averager.overlap_with(module, places, refresh)


def _place_in(tensor: Tensor, buckets: list[Tensor]) -> tuple[int, int, int]:
    """(number of the bucket, start, stop) in elements, of the memory that a dense tensor covers."""
    for number, bucket in enumerate(buckets):
        start, rest = divmod(tensor.data_ptr() - bucket.data_ptr(), bucket.element_size())
        if rest == 0 and 0 <= start < bucket.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            return number, start, start + last + 1
    raise RuntimeError(f"a parameter of shape {tuple(tensor.shape)} is in none of the buckets")


def _describe_optimizer(engine: DeepSpeedEngine) -> dict[str, dict[str, str]]:
    """Which parameters are averaged, in which order: it must be the same on every rank."""
    optimizer = engine.optimizer
    groups = next(
        (getattr(optimizer, name) for name in ("bit16_groups", "bf16_groups") if hasattr(optimizer, name)),
        [group["params"] for group in optimizer.param_groups],
    )
    return {
        f"group {number}": {f"parameter {place}": engine.param_names.get(p, "?") for place, p in enumerate(group)}
        for number, group in enumerate(groups)
    }


def _gradients(engine: DeepSpeedEngine) -> list[Tensor]:
    """The gradients of this rank's part of the parameters, reduced inside the worker, not yet clipped."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        return list(optimizer.fp32_groups_gradient_flat_partition)
    if hasattr(optimizer, "averaged_gradients"):
        return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # not used in this step here; it may be on another worker
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters]


def _check_learning_rates(param_groups: list[dict[str, Any]]) -> None:
    rates = {float(group["lr"]) for group in param_groups if "lr_scale" not in group}
    if len(rates) > 1:
        raise ConfigError(
            f"the parameter groups have the learning rates {sorted(rates)}, and qsr.lr sets one for all; give the "
            "groups an 'lr_scale' (a factor on qsr.lr), or leave qsr.lr out and use a scheduler of your own"
        )
