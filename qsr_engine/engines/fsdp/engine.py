"""Local steps on PyTorch's own sharding (FSDP2), without DeepSpeed. The only file that imports FSDP and DTensor.

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
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint as recompute

from qsr_engine.averaging import Averager, all_gather_flat, average_packed, bucket_bytes, ring_bytes
from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.model_file import averaged_buffers, describe, named_state, order_label, read_model
from qsr_engine.checkpoint.rank_file import worker_folder
from qsr_engine.config.batch import check_world_size, resolve_batch
from qsr_engine.config.digest import digest
from qsr_engine.config.fsdp import FSDPConfig, load_fsdp_config
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.fsdp import files as fsdp_checkpoint
from qsr_engine.engines.fsdp.blocks import Wrap, find_blocks
from qsr_engine.engines.fsdp.copies import Copies
from qsr_engine.engines.fsdp.fresh_model import Init, give_values_of_rank_0
from qsr_engine.engines.learning_rate import LearningRate, largest_rate
from qsr_engine.engines.replica import Parameters, check_state_names, make_averager, replace_state
from qsr_engine.engines.resumable import Resumable
from qsr_engine.local_steps.steps import LocalSteps
from qsr_engine.membership.facts import check_agreement
from qsr_engine.membership.roll_call import roll_call
from qsr_engine.membership.versions import versions
from qsr_engine.membership.watchdog import Watchdog

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


class Shards(Parameters):
    """FSDP's parameters: this rank's optimizer updates its shard of each, where FSDP keeps it."""

    sharded = True

    def __init__(self, engine: FSDPEngine) -> None:
        super().__init__(engine)
        self.may_be_shared = not engine.config.fsdp.cpu_offload  # offloaded shards are pinned, and must stay so

    def held(self) -> list[Tensor]:
        return [_local(parameter) for parameter in super().held()]

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        """Each shard is a bucket of its own: FSDP holds its memory, so it does not move."""
        return [shard.view(-1) for shard in self.held() if shard.numel()]

    def refresh(self) -> None:
        """Gathered parameters that a forward without a backward has left are those from before."""
        reshard(self.module)

    def gradients(self) -> list[Tensor]:
        parameters = [parameter for parameter in super().held() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:  # not used in this step here; maybe on another worker
                parameter.grad = torch.zeros_like(parameter)
        return [gradient for p in parameters if (gradient := _local(p.grad)).numel()]

    def state(self, name: str) -> list[Tensor | None]:
        states = self.optimizer.state
        found = [states[p].get(name) if p in states else None for p in super().held()]
        return [_local(value) if isinstance(value, Tensor) else value for value in found]

    overlaps_with = "a worker_size of 1 in fp32"

    @property
    def why_no_overlap(self) -> str | None:
        return "FSDP gathers a parameter by a collective when it is read, for which a forward cannot wait"


def _local(tensor: Any) -> Tensor:
    """This rank's part of a tensor, the very memory that FSDP holds."""
    return cast(Tensor, tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach())


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters, so that the module holds the shards again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class Whole(Parameters):
    """The parameters of a worker of one rank that computes in bf16."""

    overlaps_with = "a worker_size of 1 in fp32"

    @property
    def why_no_overlap(self) -> str | None:
        return "the bf16 copies of all parameters are made when a forward begins"


class FSDPEngine(Resumable):
    """A model whose workers take local steps. Made by `initialize_fsdp`.

    `module` is the model, `optimizer` torch's own, `mesh` the device mesh (worker, shard); `local_steps` tells step,
    round and period. Methods have DeepSpeed's names.
    """

    _own_folder = fsdp_checkpoint.FOLDER
    _may_differ = frozenset({"workers", "worker_size", "precision"})

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        mesh: DeviceMesh,
        config: FSDPConfig,
        batch: tuple[int, int, int],
        device: torch.device,
        copies: Copies | None = None,
    ) -> None:
        self.module = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.mesh = mesh
        self.config = config
        self.device = device
        self.global_steps = self.global_samples = self.micro_steps = 0
        self._batch = batch
        self._given_config = config.model_dump(exclude={"qsr"})
        self._model_digest, self._order = 0, ""
        self._named = dict(model.named_parameters())  # sharded, and the optimizer's
        self._copies = copies  # of the parameters, in bf16, where FSDP does not make them
        whole = Parameters if copies is None else Whole
        self._masters = Shards(self) if isinstance(model, FSDPModule) else whole(self)
        self._writer = _tensorboard(config)
        self._loss: Tensor | None = None
        self.local_steps = self._make_local_steps()
        self._learning_rate = LearningRate(optimizer, self.local_steps)

    @property
    def _parallel(self) -> bool:
        """Whether torch itself averages gradients over all workers, at every step of the run."""
        return self.config.qsr.strategy == "parallel"

    def _make_local_steps(self) -> LocalSteps:
        qsr, across = self.config.qsr, self.mesh.get_group("worker")
        masters = self._masters
        average_buffers = qsr.averaging.buffers == "average"
        state_names = check_state_names(qsr.averaging.state, masters)
        sent = sum(shard.numel() * shard.element_size() for shard in masters.held())
        watchdog = Watchdog.of_this_run(qsr.faults.timeout_seconds, across)
        averager = Averager([], None)
        if not self._parallel:
            averager = make_averager(masters, qsr, across, self.mesh.get_group("shard"), self.device)
        return LocalSteps(
            qsr,
            averager,
            digest(shared_part(self.config)),
            optimizer_lr=lambda: largest_rate(self.optimizer.param_groups),
            buffers=lambda: averaged_buffers(self.module) if average_buffers else [],
            optimizer_state=lambda: [tensor for name in state_names for tensor in masters.state_to_average(name)],
            replace_state=lambda left_out: replace_state(masters, qsr, across, left_out),
            after_averaging=masters.refresh,
            parallel_bytes=ring_bytes(sent, dist.get_world_size(across)),
            watchdog=watchdog,
        )

    # ---------------------------------------------------------------------------------------------- a step

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's forward. Under averaging.overlap it may wait for parameters; in evaluation, for all."""
        if self.module.training:
            self.local_steps.begin_forward()
        else:
            self.local_steps.finish()
        return self.module(*inputs, **kwargs)

    def train(self, mode: bool = True) -> None:
        if not mode:
            self.local_steps.finish()
        self.module.train(mode)

    def eval(self) -> None:
        """Under overlap "delayed", call `local_steps.wait()` on every rank before it."""
        self.train(False)

    def backward(self, loss: Tensor) -> Tensor:
        """Backward of a micro-batch's mean loss; gradients of the micro-batches of a step are averaged."""
        if self._parallel and isinstance(self.module, FSDPModule):
            self.module.set_requires_all_reduce(self.is_gradient_accumulation_boundary())
        (loss / self.gradient_accumulation_steps()).backward()  # type: ignore[no-untyped-call]
        self._loss = loss.detach()
        if self._copies is not None:
            self._copies.collect()
        return loss

    def step(self) -> bool:
        """End a micro-batch; after the last one of a step, take the optimizer's step; at the end of a round, average.

        Returns:
            True at a boundary, False inside a round or inside gradient accumulation.
        Raises:
            BoundaryError: on every rank, as averaging.exchange_headers() says; nothing was averaged.
            RuntimeError: the run has taken its total_steps already, or something else than qsr.lr set the learning
                rate; nothing was changed.
        """
        state = self.local_steps
        state.check_unfinished()
        last = self.is_gradient_accumulation_boundary()
        if last:
            self._learning_rate.check()
        self.micro_steps += 1
        if not last:
            return False
        self._check_reduced()
        state.begin_update()
        if state.mode == "parallel" and not self._parallel:
            self._average_gradients()
        self._clip()
        self._hold_masters()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        boundary = state.advance()
        self._learning_rate.set()
        if boundary and self._writer is not None:
            self._write_boundary()
        return boundary

    def _hold_masters(self) -> None:
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

    def _average_gradients(self) -> None:
        """Average over the workers what FSDP reduced inside this one; the first phase of `post_local`."""
        started = time.perf_counter()
        across = self.mesh.get_group("worker")
        average_packed(self._masters.gradients(), across, bucket_bytes(self.config.qsr.averaging.bucket_mb, across))
        self.local_steps.seconds_averaging += time.perf_counter() - started

    def _clip(self) -> None:
        """Clip this worker's gradient to the configured L2 norm."""
        limit = self.config.gradient_clipping
        if not limit:
            return
        gradients = [_local(p.grad) for p in self._named.values() if p.grad is not None]
        norm = get_total_norm(gradients).to(self.device)
        if self._masters.sharded:
            squares = norm.square()
            dist.all_reduce(squares, group=self.mesh.get_group("shard"))
            norm = squares.sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def _write_boundary(self) -> None:
        """To TensorBoard, under DeepSpeed's tags and on its x axis: samples over all workers."""
        events = {f"Train/LocalSteps/{name}": value for name, value in self.local_steps.figures().items()}
        events["Train/Samples/lr"] = self.get_lr()[0]
        if self._loss is not None:
            events["Train/Samples/train_loss"] = self._loss.item()
        for tag, value in events.items():
            self._writer.add_scalar(tag, value, self.global_samples)

    @property
    def seconds_averaging(self) -> float | None:
        """Wall-clock seconds in averagings so far; None where it runs beside compute and cannot be told apart."""
        hidden = self._parallel and dist.get_world_size() > 1
        return None if hidden else self.local_steps.seconds_averaging

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch under way is the last one of its step."""
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def train_batch_size(self) -> int:
        """Samples of one step over all ranks."""
        return self._batch[0]

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._batch[1]

    def gradient_accumulation_steps(self) -> int:
        return self._batch[2]

    def get_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def destroy(self) -> None:
        """Call it before the process group is destroyed."""
        self.local_steps.watchdog.close()
        self.local_steps.averager.close()
        if self._writer is not None:
            self._writer.close()

    # ------------------------------------------------------------------------------------------- checkpoints

    @property
    def _workers(self) -> int:
        return 1 if self._parallel else self.mesh.size(0)

    @property
    def _worker(self) -> int:
        return 0 if self._parallel else self.mesh.get_local_rank("worker")

    def _group(self) -> dist.ProcessGroup | None:
        """The ranks that write one worker's folder together."""
        return None if self._parallel else self.mesh.get_group("shard")

    def _layout(self) -> dict[str, Any]:
        return {
            "engine": "fsdp",
            "workers": self._workers,
            "worker_size": dist.get_world_size() // self._workers,
            "precision": "bfloat16" if self.config.bf16.enabled else "float32",
            "optimizer": type(self.optimizer).__name__,
            "order": self._order,
            "model": self._model_digest,
        }

    def _write_worker(self, folder: Path, without_frozen: bool) -> None:
        self._hold_masters()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            if parameter.requires_grad or not without_frozen:
                tensors[f"parameters/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"state/{name}/{key}"] = value
        fsdp_checkpoint.write(folder / self._own_folder, tensors, self._group())

    def _own_state(self) -> dict[str, Any]:
        """What of the optimizer is no tensor, and the engine's counters."""
        plain = {
            name: {k: v for k, v in self.optimizer.state.get(parameter, {}).items() if not isinstance(v, Tensor)}
            for name, parameter in self._named.items()
        }
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {
            "counts": [self.global_steps, self.global_samples, self.micro_steps],
            "plain": {name: values for name, values in plain.items() if values},
            "groups": groups,
        }

    def _check_worker(self, folder: Path) -> None:
        fsdp_checkpoint.names(folder / self._own_folder)

    @torch.no_grad()
    def _load_worker(self, folder: Path, worker: int, state: Mapping[str, Any], **kwargs: Any) -> None:
        """In place: the parameters stay where they are, and so does optimizer state that is there already."""
        strange = sorted(set(kwargs) - {"load_module_strict", "load_optimizer_states", "load_lr_scheduler_states"})
        if strange:
            raise CheckpointError(f"load_checkpoint({strange[0]}=...) means nothing to the FSDP engine; leave it out")
        self._hold_masters()
        own = worker_folder(folder, worker) / self._own_folder
        into: dict[str, Tensor] = {}
        loaded: dict[str, dict[str, Any]] = {}
        for key, entry in fsdp_checkpoint.names(own).items():
            kind, _, rest = key.partition("/")
            name, _, what = rest.rpartition("/") if kind == "state" else (rest, "", "")
            if name not in self._named:
                raise CheckpointError(f"{folder}: it has a parameter {name!r}, which this model has not")
            parameter = self._named[name]
            if kind == "parameters":
                into[key] = parameter.detach()
                continue
            value = self.optimizer.state.get(parameter, {}).get(what)
            if not isinstance(value, Tensor) or value.shape != entry.size or value.dtype != entry.properties.dtype:
                value = self._empty_state(parameter, what, entry)
            into[key] = value
            loaded.setdefault(name, {})[what] = value
        fsdp_checkpoint.read(own, into, self._group())
        self._take_over(loaded, state["own"])

    def _empty_state(self, parameter: Tensor, what: str, entry: Any) -> Tensor:
        if entry.size == parameter.shape:
            return torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
        group: dict[str, Any] = next(
            (g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"])), {}
        )
        on_host = what == "step" and not (group.get("capturable") or group.get("fused"))  # as torch's own load does
        return torch.zeros(entry.size, dtype=entry.properties.dtype, device="cpu" if on_host else self.device)

    def _take_over(self, loaded: Mapping[str, dict[str, Any]], own: Mapping[str, Any]) -> None:
        self.optimizer.zero_grad()
        for name, parameter in self._named.items():
            values = {**loaded.get(name, {}), **own["plain"].get(name, {})}
            self.optimizer.state.pop(parameter, None)
            if values:
                self.optimizer.state[parameter] = values
        for group, saved in zip(self.optimizer.param_groups, own["groups"], strict=True):
            group.update(saved)
        self.global_steps, self.global_samples, self.micro_steps = own["counts"]

    def _read_model(self, folder: Path, only: set[str] | None) -> None:
        self._hold_masters()
        read_model(folder, self.module, self._put, only)

    def _whole_model(self, *, keep: bool) -> dict[str, Tensor]:
        self._hold_masters()
        return named_state(self.module, self._whole, keep)

    def _whole(self, parameter: Tensor) -> Tensor:
        """A parameter in its shape, gathered inside the worker. FSDP shards rows, the last shards may be short."""
        shard = _local(parameter)
        if not isinstance(parameter, DTensor):
            return shard
        rows, ranks = -(-parameter.shape[0] // self.mesh.size(1)), self.mesh.size(1)
        padded = torch.zeros(rows, *parameter.shape[1:], dtype=shard.dtype, device=self.device)
        padded[: shard.shape[0]] = shard
        gathered = padded.new_empty(rows * ranks, *parameter.shape[1:])
        all_gather_flat(gathered, padded, group=self.mesh.get_group("shard"))
        return gathered[: parameter.shape[0]]

    def _put(self, parameter: Tensor, value: Tensor) -> None:
        """Give a parameter a value that every rank has; no communication."""
        shard = _local(parameter)
        if isinstance(parameter, DTensor):
            rows = -(-parameter.shape[0] // self.mesh.size(1))
            value = value[rows * self.mesh.get_local_rank("shard") :][: shard.shape[0]]
        shard.copy_(value)


def _tensorboard(config: FSDPConfig) -> Any:
    if not config.tensorboard.enabled or dist.get_rank() != 0:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(os.path.join(config.tensorboard.output_path, config.tensorboard.job_name))


def shared_part(config: FSDPConfig) -> dict[str, Any]:
    """The part of a configuration that must be the same on every rank."""
    return config.model_dump(exclude={"tensorboard"})


# --------------------------------------------------------------------------------------------- initialize_fsdp


def initialize_fsdp(
    *,
    model: nn.Module,
    optimizer: MakeOptimizer,
    config: str | os.PathLike[str] | Mapping[str, Any],
    lr_scheduler: MakeScheduler | None = None,
    wrap: Wrap | None = None,
    init: Init | None = None,
) -> FSDPEngine:
    """Shard a model over the ranks of each worker, and let the workers take local steps.

    The parameters and buffers of rank 0 become those of every rank. The model is changed in place.

    Args:
        model: with fp32 parameters, on any device. On the meta device it is made block by block, so that no rank ever
            holds all of it; then `init` gives the values.
        optimizer: makes the optimizer of the parameters that it is given, which are the sharded ones; a function that
            wants groups can read the names from the model, whose parameters these then are.
        config: path of a JSON file or a mapping with DeepSpeed's keys train_batch_size (over all ranks),
            train_micro_batch_size_per_gpu, gradient_accumulation_steps, gradient_clipping (1.0 where it is not said, as
            in DeepSpeed), bf16 and tensorboard, and the blocks `fsdp` (config.FSDPOptions) and `qsr`.
        lr_scheduler: makes a scheduler, which the engine steps at every step; only without `qsr.lr`.
        wrap: classes of the blocks, or a function that says of a module whether it is one; by default they are found
            (engines/blocks.py).
        init: fills what a module of a meta-device model holds itself (not what its children hold); by default the
            module's own reset_parameters().
    Raises:
        ConfigError: the configuration is wrong, or asks for what cannot work.
        AgreementError: on every rank, if the ranks were started with different configurations, models, versions, or
            parameters in the optimizer.
        HostError: on every rank, if the ranks cannot meet; see roll_call().
    """
    if config is None:
        raise ConfigError('initialize_fsdp() needs config=..., a path or a dict with a "qsr" block')
    settings = load_fsdp_config(config)
    _check_model(model)
    _check(optimizer, settings, lr_scheduler)
    blocks = find_blocks(model, wrap)
    device = _start_process_group()
    if settings.fsdp.cpu_offload and device.type == "cpu":
        raise ConfigError("fsdp.cpu_offload is true, and the model is on the CPU already; write false")

    # The versions again, for a process group that somebody else has made.
    facts = {"config": shared_part(settings), "model": describe(model), "versions": versions()}
    check_agreement(facts, device)
    qsr = settings.qsr
    workers = check_world_size(dist.get_world_size(), qsr.worker_size)
    batch = resolve_batch(
        dist.get_world_size(),
        train_batch_size=settings.train_batch_size,
        micro_batch_size=settings.train_micro_batch_size_per_gpu,
        accumulation=settings.gradient_accumulation_steps,
    )
    mesh = init_device_mesh(device.type, (workers, qsr.worker_size), mesh_dim_names=("worker", "shard"))
    _make(model, blocks, _shard(settings, mesh), settings, device, init)
    given = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made = optimizer(given)
    _check_optimizer(made, model)
    scheduler = _make_scheduler(lr_scheduler, made) if lr_scheduler is not None else None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        f"group {number}": {f"parameter {place}": names[id(p)] for place, p in enumerate(group["params"])}
        for number, group in enumerate(made.param_groups)
    }
    check_agreement({"optimizer": {"type": type(made).__name__, **groups}}, device)
    low = settings.bf16.enabled and not isinstance(model, FSDPModule)
    copies = Copies(model, blocks, torch.bfloat16) if low else None
    engine = FSDPEngine(model, made, scheduler, mesh, settings, batch, device, copies)
    engine._model_digest = digest(facts["model"])
    engine._order = order_label(groups)
    return engine


def _check(optimizer: Any, settings: FSDPConfig, lr_scheduler: Any) -> None:
    if not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer is a {type(optimizer).__name__}; give a function of the parameters, for example "
            "lambda parameters: torch.optim.AdamW(parameters), since sharding makes new parameters"
        )
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise ConfigError(
            f"lr_scheduler is a {type(lr_scheduler).__name__}; give a function of the optimizer that makes it"
        )
    if lr_scheduler is not None and settings.qsr.lr is not None:
        raise ConfigError("both qsr.lr and lr_scheduler=... set the learning rate; leave one of them out")


def _check_model(model: nn.Module) -> None:
    """Refuse what cannot be sharded, or would reduce gradients by itself."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    for name, module in model.named_modules():
        where = f"the module {name!r}" if name else "the model"
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ConfigError(f"{where} is a DistributedDataParallel, which reduces gradients at every step; unwrap it")
        if isinstance(module, FSDPModule):
            raise ConfigError(f"{where} is sharded already; leave fully_shard out, initialize_fsdp() calls it")
        if hasattr(module, "_orig_mod"):
            raise ConfigError(f"{where} was made by torch.compile; give the model itself, and write fsdp.compile true")
        if getattr(module, "sparse", None) is True:
            raise ConfigError(f"{where} has sparse gradients, which are not averaged; write sparse=False")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"the {type(model).__name__} has no parameter to train (requires_grad)")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(
            f"the parameters are {found}; give a model in float32 (model.float()), in which the optimizer and the "
            "averages work, and write bf16 for what it computes in"
        )
    flat = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if flat:
        raise ConfigError(f"the parameter {flat[0]!r} has the shape [], which FSDP cannot shard; make it [1]")


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer(...) gave a {type(optimizer).__name__}; it must give a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("LBFGS calls the model several times in a step; write an optimizer such as AdamW or SGD")
    known = {id(parameter) for parameter in model.parameters()}
    strange = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if strange:
        raise ConfigError(
            f"optimizer(...) gave an optimizer of {strange} parameters that the model does not have now: they are from "
            "before it was sharded; use those that the function is given, or model.named_parameters() inside it"
        )

    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in given]
    if left_out:
        raise ConfigError(
            f"the optimizer has not got {len(left_out)} parameters that take gradients, such as {left_out[0]!r}; let "
            "it take all that the function is given, or set their requires_grad to False"
        )


def _make_scheduler(make: MakeScheduler, optimizer: torch.optim.Optimizer) -> Any:
    scheduler = make(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(
            "ReduceLROnPlateau needs a metric at every step, which the engine does not have; write a schedule of the "
            "step, or set the learning rate yourself after engine.step() and give no lr_scheduler"
        )
    return scheduler


def _start_process_group() -> torch.device:
    """Join the ranks that a launcher started. Returns this rank's device."""
    if not dist.is_initialized() and "RANK" not in os.environ:
        raise ConfigError(
            "this process was not started by a launcher (RANK is not set); start it with "
            "`torchrun --nproc_per_node N SCRIPT ...`, or with deepspeed"
        )
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Both, since offloaded shards are averaged, and their norms added up, on the CPU.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        with roll_call(backend):
            dist.init_process_group(backend)
    return device


def _shard(settings: FSDPConfig, mesh: DeviceMesh) -> Callable[[nn.Module, bool], None] | None:
    """What shards a block (module, whether it is the whole model); None where nothing is to be sharded."""
    qsr, workers, ranks = settings.qsr, mesh.size(0), mesh.size(1)
    parallel = qsr.strategy == "parallel" and workers > 1
    if ranks == 1 and not parallel and not settings.fsdp.cpu_offload:
        return None
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def shard(module: nn.Module, is_root: bool) -> None:
        empty = [name for name, parameter in module.named_parameters() if parameter.numel() == 0]
        if empty:
            raise ConfigError(f"the parameter {empty[0]!r} has no elements, which FSDP cannot shard; leave it out")
        fully_shard(
            module,
            mesh=mesh if parallel else mesh["shard"],
            # The root's own parameters are needed first in backward, so freeing them saves nothing.
            reshard_after_forward=settings.fsdp.reshard_after_forward and not is_root,
            mp_policy=low if settings.bf16.enabled else MixedPrecisionPolicy(),
            offload_policy=CPUOffloadPolicy() if settings.fsdp.cpu_offload else OffloadPolicy(),
        )

    return shard


def _make(
    model: nn.Module,
    blocks: list[nn.Module],
    shard: Callable[[nn.Module, bool], None] | None,
    settings: FSDPConfig,
    device: torch.device,
    init: Init | None,
) -> None:
    """Block by block: on the device, with the values of rank 0, then sharded; the rest of the model last."""
    done: set[nn.Module] = set()
    for module in (*blocks, model):
        give_values_of_rank_0(module, done, device, init, contiguous=shard is not None)
        if module is not model:
            if settings.fsdp.activation_checkpointing:
                module.forward = partial(recompute, module.forward, use_reentrant=False)
            if settings.fsdp.compile:
                module.compile()
        if shard is not None:
            shard(module, module is model)
        done.update(module.modules())
