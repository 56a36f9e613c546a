"""Local steps in the DeepSpeed engine. The only file that imports deepspeed.

`initialize` goes through the real `deepspeed.initialize`. A worker is made of `worker_size` neighbouring ranks:
DeepSpeed is told, by the object that it calls mpu, that its data-parallel group is the worker and that its
model-parallel group is the rank alone. All that DeepSpeed reduces at a step (gradients, their norm, overflow flags)
then stays inside the worker. The engine that comes back takes the class `LocalStepEngine`, whose `step()` counts steps
and averages the parameters at boundaries.

What is averaged are the fp32 masters, in place, and what derives from them is refreshed afterwards; where they are in
each ZeRO stage and precision is written in replicas.py.

The strategy `parallel` is DeepSpeed's own data parallel over all ranks, with nothing in between.
"""

from __future__ import annotations

import contextlib
import logging
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
from deepspeed.runtime.constants import ROUTE_TRAIN
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from qsr_engine.averaging import Averager, average_packed, bucket_bytes, ring_bytes
from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.model_file import averaged_buffers, describe, named_state, order_label, read_model
from qsr_engine.checkpoint.rank_file import worker_folder
from qsr_engine.config.batch import check_world_size
from qsr_engine.config.deepspeed import (
    check_supported,
    offloads,
    resolve_deepspeed_config,
    shared_part,
    split_deepspeed_config,
)
from qsr_engine.config.digest import digest
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.deepspeed import files as deepspeed_checkpoint
from qsr_engine.engines.deepspeed.groups import WorkerGroups
from qsr_engine.engines.deepspeed.internals import check_internals, check_version
from qsr_engine.engines.deepspeed.one_rank import leave_out_reduction
from qsr_engine.engines.deepspeed.replicas import Stage3, masters_of
from qsr_engine.engines.learning_rate import LearningRate, largest_rate
from qsr_engine.engines.replica import Masters, check_state_names, make_averager, replace_state
from qsr_engine.engines.resumable import Resumable
from qsr_engine.local_steps.steps import LocalSteps
from qsr_engine.membership.facts import check_agreement
from qsr_engine.membership.roll_call import roll_call
from qsr_engine.membership.versions import versions
from qsr_engine.membership.watchdog import Watchdog

check_version(deepspeed.__version__)
check_internals(
    {
        f"{owner.__name__}.{name}": hasattr(owner, name)
        for owner, names in {
            DeepSpeedEngine: (
                "forward",
                "step",
                "allreduce_gradients",
                "save_checkpoint",
                "load_checkpoint",
                "destroy",
            ),
            partitioned_param_coordinator: ("assert_ints_same_as_other_ranks",),
            deepspeed_groups: ("mpu",),
            DeepSpeedZeroOptimizer: ("update_lp_params", "get_param_id", "reduce_ready_partitions_and_remove_grads"),
            DeepSpeedZeroOptimizer_Stage3: (
                "_partition_all_parameters",
                "_get_param_partition_rank",
                "_reassign_or_swap_out_partitioned_parameters",
                "_finalize_offload_gradient_accumulation",
                "invalidate_secondary_tensor",
            ),
        }.items()
        for name in names
    },
    deepspeed.__version__,
)

log = logging.getLogger(__name__)
# Beside tensors and plain values these are in the files of DeepSpeed, which keep no code of their own.
_IN_CHECKPOINTS: list[type] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
_deepspeed_initialize = deepspeed.initialize  # itself, also while replace_deepspeed_initialize() has another one there


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


@contextlib.contextmanager
def _without_barriers() -> Iterator[None]:
    """DeepSpeed's save_checkpoint() ends in a barrier, where the other ranks would wait for one that failed.

    What it waits for is done otherwise: the folders exist before it, and checkpoint.save() meets all ranks after it.
    """
    before = deepspeed.comm.barrier
    deepspeed.comm.barrier = lambda *args, **kwargs: None
    try:
        yield
    finally:
        deepspeed.comm.barrier = before


def _compare_inside_the_worker(ints: list[int]) -> None:
    """Stage 3 checks in its first forwards that all ranks run the same modules in the same order.

    DeepSpeed broadcasts from rank 0 to all ranks for it, also across workers. Here the ranks of a worker compare
    theirs; without workers it is DeepSpeed's own check.
    """
    workers = deepspeed_groups.mpu
    if not isinstance(workers, WorkerGroups):
        _compare_with_all_ranks(ints)
        return
    found: list[list[int]] = [[] for _ in range(workers.get_data_parallel_world_size())]
    if len(found) > 1:
        dist.all_gather_object(found, ints, group=workers.worker)
        if any(other != ints for other in found):
            raise RuntimeError(
                f"the ranks {dist.get_process_group_ranks(workers.worker)} of a worker run different modules or "
                "parameters under ZeRO stage 3, so their collectives would not match; a worker's ranks must take the "
                f"same path through the model. Numbers of modules or parameters found: {[len(o) for o in found]}"
            )


_compare_with_all_ranks = partitioned_param_coordinator.assert_ints_same_as_other_ranks
partitioned_param_coordinator.assert_ints_same_as_other_ranks = _compare_inside_the_worker


def _keep_checks_inside_the_worker(engine: DeepSpeedEngine, groups: WorkerGroups) -> None:
    """Also where the model is called without the engine (`engine.module(...)`), as evaluations do."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    reset_step = coordinator.reset_step

    def reset_step_inside_the_worker() -> None:
        with _deepspeed_uses(groups):
            reset_step()

    coordinator.reset_step = reset_step_inside_the_worker


class LocalStepEngine(DeepSpeedEngine, Resumable):  # type: ignore[misc]  # deepspeed has no types
    """A DeepSpeed engine whose workers take local steps. Made by `initialize`, never constructed.

    (An engine that DeepSpeed has made can take this class only if DeepSpeed's is the first base.)
    Beyond DeepSpeed's own surface: `local_steps` (step, round, period, ...), and `step()` returns True at a boundary.
    """

    local_steps: LocalSteps
    worker_groups: WorkerGroups | None  # None under the strategy `parallel`
    checkpoint_engine: Any
    _own_folder = deepspeed_checkpoint.DEEPSPEED_TAG
    _trained: frozenset[Tensor]  # the parameters that the optimizer updates, under ZeRO
    _model_digest: int
    _order: str  # of the parameters in the optimizer

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's forward(). Under averaging.overlap it may wait for parameters; in evaluation, for all."""
        if self.module.training:
            self.local_steps.begin_forward()
        else:
            self.local_steps.finish()
        with _deepspeed_uses(self.worker_groups):
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
            RuntimeError: the run has taken its total_steps already, or something else than qsr.lr set the learning
                rate; nothing was changed.
        """
        self.local_steps.check_unfinished()
        if self.is_gradient_accumulation_boundary():
            self._learning_rate.check()
            self.local_steps.begin_update()
            if self.worker_groups and self.local_steps.mode == "parallel":
                self._average_gradients(self.worker_groups.across)
        steps_before, skipped_before = self.global_steps, self.skipped_steps
        with _deepspeed_uses(self.worker_groups):
            super().step(lr_kwargs)
        if self.global_steps == steps_before:
            return False
        if self.skipped_steps > skipped_before:
            self._note_skipped_step(lr_kwargs)
        boundary = self.local_steps.advance()
        self._learning_rate.set()
        if boundary and self.monitor.enabled and self.global_rank == 0:
            self._write_boundary()
        return boundary

    def _note_skipped_step(self, lr_kwargs: dict[str, Any] | None) -> None:
        """The gradients overflowed on this worker, and DeepSpeed left out the update and the scheduler's step.

        The step counts here as on the other workers, so the scheduler takes it too: else the workers' learning rates
        would differ from now on, and with them their periods. Under the strategy `parallel` all ranks skip alike, and
        DeepSpeed's own way is left.
        """
        state = self.local_steps
        state.skipped_steps += 1
        if self.worker_groups is None:
            state.skipped_steps_of_all_workers = state.skipped_steps
            return
        if self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        if self.worker_groups.get_data_parallel_rank() == 0:
            scale = getattr(self.optimizer, "loss_scale", None)
            log.warning(
                "step %d: the gradients of worker %d overflowed, so it skipped the update; the step counts (skipped so "
                "far: %d; loss scale now: %s)",
                state.step,
                self.worker_groups.worker_index,
                state.skipped_steps,
                scale,
            )

    def _write_boundary(self) -> None:
        """To DeepSpeed's own monitor (TensorBoard, W&B, CSV), on its x axis: samples over all workers."""
        figures = self.local_steps.figures()
        events = [(f"Train/LocalSteps/{name}", value, self.global_samples) for name, value in figures.items()]
        self.monitor.write_events(events)

    def _average_gradients(self, group: dist.ProcessGroup) -> None:
        """Average over the workers what DeepSpeed reduced inside this one; the first phase of `post_local`."""
        started = time.perf_counter()
        average_packed(self._masters.gradients(), group, bucket_bytes(self.local_steps.qsr.averaging.bucket_mb, group))
        self._masters.gradients_changed()
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

    @property
    def _workers(self) -> int:
        return dist.get_world_size(self.worker_groups.across) if self.worker_groups else 1

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, on a boundary only. Raises RuntimeError inside a round."""
        self._check_boundary("save")
        self.local_steps.wait()
        with _deepspeed_uses(self.worker_groups):
            return super().save_16bit_model(*args, **kwargs)

    save_checkpoint = Resumable.save_checkpoint  # before DeepSpeed's own, which these call for a worker
    load_checkpoint = Resumable.load_checkpoint

    def _checkpoint_tag_validation(self, tag: str) -> None:
        """DeepSpeed compares the tag over all ranks; checkpoint.save() has done so."""

    def _write_worker(self, folder: Path, without_frozen: bool) -> None:
        writer = self.checkpoint_engine
        files = self.checkpoint_engine = deepspeed_checkpoint.GuardedFiles(writer, _IN_CHECKPOINTS)
        try:
            with _deepspeed_uses(self.worker_groups), _without_barriers():
                DeepSpeedEngine.save_checkpoint(
                    self,
                    str(folder),
                    tag=deepspeed_checkpoint.DEEPSPEED_TAG,
                    client_state={},
                    save_latest=False,
                    exclude_frozen_parameters=without_frozen,
                )
        finally:
            self.checkpoint_engine = writer
        if files.error is not None:
            raise files.error
        (folder / "latest").write_text(deepspeed_checkpoint.DEEPSPEED_TAG, encoding="utf-8")

    def _check_worker(self, folder: Path) -> None:
        if self.load_universal_checkpoint():
            raise CheckpointError(
                "checkpoint.load_universal is true, and DeepSpeed then runs code that it finds in files; write false"
            )
        files = deepspeed_checkpoint.GuardedFiles(self.checkpoint_engine, _IN_CHECKPOINTS)
        for path in sorted((folder / self._own_folder).glob("*.pt")):
            files.check(path)

    def _load_worker(self, folder: Path, worker: int, state: Mapping[str, Any], **kwargs: Any) -> None:
        reader = self.checkpoint_engine
        self.checkpoint_engine = deepspeed_checkpoint.GuardedFiles(reader, _IN_CHECKPOINTS)
        try:
            with _deepspeed_uses(self.worker_groups):
                path, _ = DeepSpeedEngine.load_checkpoint(
                    self, str(worker_folder(folder, worker)), tag=deepspeed_checkpoint.DEEPSPEED_TAG, **kwargs
                )
        finally:
            self.checkpoint_engine = reader
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load for worker {worker}")

    def _read_model(self, folder: Path, only: set[str] | None) -> None:
        with _deepspeed_uses(self.worker_groups):
            read_model(folder, self.module, self._put_parameter, only)
            if only is None:
                self._masters.refresh()

    def _whole_model(self, *, keep: bool) -> dict[str, Tensor]:
        with _deepspeed_uses(self.worker_groups):
            return named_state(self.module, self._full_parameter, keep)

    def _full_parameter(self, parameter: Tensor) -> Tensor:
        """The fp32 master of a parameter, whole; the parameter itself where it is not trained."""
        if self.zero_optimization():
            value = safe_get_full_fp32_param(parameter) if parameter in self._trained else None
            if value is None and hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    return parameter.detach().clone()
            return parameter if value is None else value
        return self._masters.master_of(parameter)

    def _put_parameter(self, parameter: Any, value: Tensor) -> None:
        if self.zero_optimization() and parameter in self._trained:
            if hasattr(parameter, "ds_id"):  # in parts of equal size, the last one padded
                size, ranks = parameter.partition_numel(), dist.get_world_size(parameter.ds_process_group)
                parts = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel())).view(ranks, size)
                part = parts[dist.get_rank(parameter.ds_process_group)]
                safe_set_local_fp32_param(parameter, part.to(self.device))
            else:
                safe_set_full_fp32_param(parameter, value.to(self.device))
        elif hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        elif self.zero_optimization():
            parameter.data.copy_(value)
        else:
            self._masters.master_of(parameter).data.copy_(value)

    def _layout(self) -> dict[str, Any]:
        """What must be the same for a run to go on bit for bit."""
        ranks = dist.get_world_size()
        return {
            "engine": "deepspeed",
            "workers": self._workers,
            "worker_size": ranks // self._workers,
            "zero_stage": int(self.zero_optimization_stage()),
            "masters": type(self._masters).__name__,
            "precision": str(self.get_data_types()[0]).removeprefix("torch."),
            "optimizer": type(self.basic_optimizer).__name__,
            "order": self._order,
            "model": self._model_digest,
        }

    @property
    def _worker(self) -> int:
        return self.worker_groups.worker_index if self.worker_groups else 0

    def destroy(self) -> None:
        """As DeepSpeed's destroy(); call it before the process group is destroyed."""
        self.local_steps.watchdog.close()
        self.local_steps.averager.close()
        super().destroy()


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
        AgreementError: on every rank, if the ranks were started with different configurations, models, versions, or
            parameters in the optimizer.
        HostError: on every rank, if the ranks cannot meet; see roll_call().
    """
    config = next((c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None), None)
    if config is None:
        raise ConfigError('initialize() needs config=..., a DeepSpeed configuration with a "qsr" block')
    if model is None:
        raise ConfigError("initialize() needs model=..., a torch.nn.Module")
    ds_config, qsr = split_deepspeed_config(config)
    check_supported(ds_config, qsr)
    flat = [name for name, p in model.named_parameters() if p.dim() == 0 and not hasattr(p, "ds_id")]
    if flat:
        raise ConfigError(f"the parameter {flat[0]!r} has the shape [], which DeepSpeed cannot broadcast; make it [1]")
    apart = [name for name, p in model.named_parameters() if not p.is_contiguous()]
    if apart and get_accelerator().device_name() == "cpu":
        raise ConfigError(
            f"the parameter {apart[0]!r} is not contiguous (channels_last?), and DeepSpeed cannot broadcast that on a "
            "CPU; make it contiguous: p.data = p.data.contiguous(), or write model.channels_last: false in a recipe"
        )
    if optimizer is None and not ds_config.get("optimizer"):
        raise ConfigError('there is no optimizer; give initialize() one, or write an "optimizer" block')
    for name, given in (("mpu", mpu), ("mesh_param", mesh_param)):
        if given is not None:
            raise ConfigError(f"initialize({name}=...): local steps set the process groups themselves; leave it out")
    if lr_scheduler is not None and qsr.lr is not None:
        raise ConfigError("both qsr.lr and lr_scheduler=... set the learning rate; leave one of them out")
    _start_process_group(distributed_port, dist_init_required)

    # First of all, so that what follows fails on every rank or on none.
    facts = {
        "config": {**shared_part(ds_config), "qsr": qsr.model_dump()},
        "model": describe(model),
        "versions": versions(),  # again, for a process group that somebody else has made
    }
    device = torch.device(get_accelerator().current_device_name())
    check_agreement(facts, device)
    workers = check_world_size(dist.get_world_size(), qsr.worker_size)
    parallel = qsr.strategy == "parallel"
    given_config = ds_config
    ds_config = resolve_deepspeed_config(ds_config, dist.get_world_size(), 1 if parallel else workers)
    groups = None
    if not parallel:
        groups = WorkerGroups.make(qsr.worker_size, worker=_zero_init_group(model, qsr), on_cpu=offloads(ds_config))
    _copy_from_rank_0(model, device, groups)

    with _deepspeed_uses(groups):
        engine, ds_optimizer, _, lr_scheduler = _deepspeed_initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            lr_scheduler=lr_scheduler,
            mpu=groups,
            collate_fn=collate_fn,
            config=ds_config,
        )
    order = _describe_optimizer(engine)
    check_agreement({"optimizer": order}, device)
    engine._order = order_label(order)
    engine._model_digest = digest(facts["model"])
    engine._given_config = given_config
    _take_local_steps(engine, qsr, groups, digest(facts["config"]))
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data)
    return engine, ds_optimizer, engine.training_dataloader, lr_scheduler


def zero_init(config: str | os.PathLike[str] | Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """`deepspeed.zero.Init` for a configuration with a `"qsr"` block: build a model that no single GPU can hold.

    Parameters are partitioned over the ranks of each worker as they are made. Every worker needs worker_size ranks that
    can hold the model together. Give the model and the same configuration to initialize() afterwards.

        with qsr_engine.zero_init(config):
            model = make_model()

    Raises:
        ConfigError: as initialize(), or the ZeRO stage is not 3.
    """
    ds_config, qsr = split_deepspeed_config(config)
    check_supported(ds_config, qsr)
    stage = (ds_config.get("zero_optimization") or {}).get("stage", 0)
    if stage != 3:
        raise ConfigError(f"zero_init() partitions parameters, and zero_optimization.stage is {stage}; write 3")
    _start_process_group(29500, None)
    workers = check_world_size(dist.get_world_size(), qsr.worker_size)
    parallel = qsr.strategy == "parallel"
    resolved = resolve_deepspeed_config(ds_config, dist.get_world_size(), 1 if parallel else workers)
    groups = None if parallel else WorkerGroups.make(qsr.worker_size)
    init: contextlib.AbstractContextManager[Any] = deepspeed.zero.Init(
        data_parallel_group=groups.worker if groups else None, config_dict_or_path=resolved, mpu=groups
    )
    return init


def _start_process_group(port: int, init_required: bool | None) -> None:
    if not dist.is_initialized() and "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
        raise ConfigError(
            "this process was not started by a launcher (RANK is not set); start it with "
            "`deepspeed SCRIPT ...`, `deepspeed --module MODULE ...` or torchrun"
        )
    _leave_out_shared_memory_collective()
    backend = get_accelerator().communication_backend_name()
    with contextlib.nullcontext() if dist.is_initialized() else roll_call(backend):
        deepspeed.comm.init_distributed(dist_backend=backend, distributed_port=port, dist_init_required=init_required)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # DeepSpeed does it too, after our first collective


def _leave_out_shared_memory_collective() -> None:
    """Before the process group starts: DeepSpeed would compile a collective for CPUs that only its inference calls.

    Compiling takes a minute and a C++ compiler.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def replace_deepspeed_initialize(function: Callable[..., tuple[Any, Any, Any, Any]]) -> Iterator[None]:
    """`deepspeed.initialize` is this function for all who call it by that name, until the block ends."""
    _leave_out_shared_memory_collective()
    before = deepspeed.initialize
    deepspeed.initialize = function
    try:
        yield
    finally:
        deepspeed.initialize = before


def _zero_init_group(model: nn.Module, qsr: QSRConfig) -> dist.ProcessGroup | None:
    """The group over which deepspeed.zero.Init has partitioned the model; None if it has not."""
    groups: set[dist.ProcessGroup] = {parameter.ds_process_group for parameter in _partitioned(model)}
    first = dist.get_rank() // qsr.worker_size * qsr.worker_size
    ranks = list(range(first, first + qsr.worker_size))
    for group in groups:
        found = dist.get_process_group_ranks(group)
        if found != ranks:
            raise ConfigError(
                f"the model was partitioned by deepspeed.zero.Init over the ranks {found}, and a worker is made of the "
                f"ranks {ranks}; build it under `with qsr_engine.zero_init(config):`, or without zero.Init"
            )
    return next(iter(groups), None)


def _partitioned(model: nn.Module) -> list[Any]:
    """The parameters that deepspeed.zero.Init has partitioned."""
    return [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]


@torch.no_grad()
def _copy_from_rank_0(model: nn.Module, device: torch.device, groups: WorkerGroups | None) -> None:
    """Move the model to the device and give every rank the values of rank 0; of partitioned parameters, its part."""
    partitioned = _partitioned(model)
    if partitioned:
        whole = {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in partitioned}
        tensors = [parameter.data for parameter in model.parameters() if id(parameter) in whole]
        if groups is not None:
            source = dist.get_global_rank(groups.across, 0)
            for parameter in partitioned:
                dist.broadcast(parameter.ds_tensor.data, source, group=groups.across)
    else:
        model.to(device)
        tensors = [parameter.data for parameter in model.parameters()]
    for tensor in (*tensors, *model.buffers()):
        there = tensor.detach().to(device).contiguous()
        dist.broadcast(there, 0)
        tensor.copy_(there)


def _take_local_steps(engine: DeepSpeedEngine, qsr: QSRConfig, groups: WorkerGroups | None, config_digest: int) -> None:
    """Turn an engine of deepspeed.initialize into a LocalStepEngine."""
    if type(engine) is not DeepSpeedEngine:
        raise ConfigError(f"deepspeed.initialize gave a {type(engine).__name__}; local steps need a DeepSpeedEngine")
    trained = sum(_numel(p) * p.element_size() for p in engine.module.parameters() if p.requires_grad)
    average_buffers = qsr.averaging.buffers == "average"
    if groups and qsr.worker_size == 1:
        leave_out_reduction(engine)
    masters = masters_of(engine)
    _check_state(masters.base_optimizer)
    state_names = check_state_names(qsr.averaging.state, masters)
    if groups and isinstance(masters, Stage3):
        _keep_checks_inside_the_worker(engine, groups)
    engine.__class__ = LocalStepEngine
    engine.worker_groups = groups
    engine._masters = masters
    attributes = ("fp16_groups", "bit16_groups", "bf16_groups")
    trained_groups: list[list[Tensor]] = next(
        (getattr(engine.optimizer, name) for name in attributes if hasattr(engine.optimizer, name)), []
    )
    engine._trained = frozenset(parameter for group in trained_groups for parameter in group)
    watchdog = Watchdog.of_this_run(qsr.faults.timeout_seconds, groups.across if groups else None)
    engine.local_steps = LocalSteps(
        qsr,
        _averager(masters, qsr, groups, engine.device),
        config_digest,
        optimizer_lr=lambda: largest_rate(engine.optimizer.param_groups),
        buffers=lambda: averaged_buffers(engine.module) if average_buffers else [],
        optimizer_state=lambda: [tensor for name in state_names for tensor in masters.state_to_average(name)],
        replace_state=lambda left_out: replace_state(masters, qsr, groups.across, left_out) if groups else 0,
        after_averaging=masters.refresh,
        parallel_bytes=ring_bytes(trained, dist.get_world_size()),
        watchdog=watchdog,
    )
    engine._learning_rate = LearningRate(engine.optimizer, engine.local_steps)


def _check_state(optimizer: torch.optim.Optimizer) -> None:
    """Some optimizers (torch's Adagrad) make their state at once; DeepSpeed may replace the parameters afterwards."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) not in held for parameter in optimizer.state):
        raise ConfigError(
            f"{type(optimizer).__name__} makes its state for the parameters that it is given, and DeepSpeed gives it "
            "masters in their place afterwards, without state; write an optimizer that makes it at its first step, "
            "such as AdamW or SGD, or fp32 at ZeRO stage 0"
        )


def _averager(masters: Masters, qsr: QSRConfig, groups: WorkerGroups | None, device: torch.device) -> Averager:
    return make_averager(masters, qsr, groups.across, groups.worker, device) if groups else Averager([], None)


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _describe_optimizer(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Which parameters are averaged, in which order: it must be the same on every rank."""
    optimizer = engine.optimizer
    attributes = ("fp16_groups", "bit16_groups", "bf16_groups")
    groups = next(
        (getattr(optimizer, name) for name in attributes if hasattr(optimizer, name)),
        [group["params"] for group in optimizer.param_groups],
    )
    return {
        "type": type(engine.basic_optimizer).__name__,
        **{
            f"group {number}": {f"parameter {place}": engine.param_names.get(p, "?") for place, p in enumerate(group)}
            for number, group in enumerate(groups)
        },
    }
