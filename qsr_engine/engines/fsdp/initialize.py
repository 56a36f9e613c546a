"""`initialize_fsdp`: shard a model over the ranks of each worker, and let the workers take local steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as recompute

from qsr_engine.config.batch import check_world_size, resolve_batch
from qsr_engine.config.fsdp import FSDPConfig, load_fsdp_config, shared_part
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.fsdp.blocks import Wrap, find_blocks
from qsr_engine.engines.fsdp.copies import ComputeCopies
from qsr_engine.engines.fsdp.engine import FSDPEngine
from qsr_engine.engines.fsdp.fresh_model import Init, give_values_of_rank_0
from qsr_engine.engines.start import (
    agree,
    agree_on_optimizer,
    check_scheduler,
    join_ranks,
    order_label,
    with_sparse_gradients,
)
from qsr_engine.membership.roll_call import told_to_all

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


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
        model: on any device. What is trained is fp32; what is frozen, as a base under adapters, has any type. On the
            meta device it is made block by block, so that no rank ever holds all of it; then `init` gives the values.
        optimizer: makes the optimizer of the parameters that it is given, which are the sharded ones; a function that
            wants groups can read the names from the model, whose parameters these then are.
        config: path of a JSON file or a mapping with DeepSpeed's keys train_batch_size (over all ranks),
            train_micro_batch_size_per_gpu, gradient_accumulation_steps, gradient_clipping (1.0 where it is not said, as
            in DeepSpeed), bf16 and tensorboard, and the blocks `fsdp` (config.FSDPOptions) and `qsr`.
        lr_scheduler: makes a scheduler, which the engine steps at every step; only without `qsr.lr`.
        wrap: classes of the blocks, or a function that says of a module whether it is one; by default they are found
            (engines/fsdp/blocks.py).
        init: fills what a module of a meta-device model holds itself (not what its children hold); by default the
            module's own reset_parameters().
    Raises:
        ConfigError: the configuration is wrong, or asks for what cannot work.
        AgreementError: on every rank, if the ranks were started with different configurations, models, versions, or
            parameters in the optimizer.
        HostError: on every rank, if the ranks cannot meet; see roll_call().
    """
    with told_to_all():
        if config is None:
            raise ConfigError('initialize_fsdp() needs config=..., a path or a dict with a "qsr" block')
        settings = load_fsdp_config(config)
        _check_model(model)
        _check(optimizer, settings, lr_scheduler)
        blocks = find_blocks(model, wrap)
    device = _start_process_group()
    if settings.fsdp.cpu_offload and device.type == "cpu":
        raise ConfigError("fsdp.cpu_offload is true, and the model is on the CPU already; write false")

    agreed = agree(shared_part(settings), model, device)
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
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [group["params"] for group in made.param_groups]
    order = order_label(agree_on_optimizer(type(made).__name__, groups, names, made.param_groups, device))
    low = settings.bf16.enabled and not isinstance(model, FSDPModule)
    copies = ComputeCopies(model, blocks, torch.bfloat16) if low else None
    return FSDPEngine(model, made, scheduler, mesh, settings, batch, device, agreed, order, copies)


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


_OF_MASTERS = {torch.float32, torch.float64}


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
    if sparse := with_sparse_gradients(model):
        raise ConfigError(f"{sparse} has sparse gradients, which are not averaged; write sparse=False")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"the {type(model).__name__} has no parameter to train (requires_grad)")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(dtypes) > 1 or not dtypes <= _OF_MASTERS:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(
            f"the trained parameters are {found}; give them in float32 (model.float()), in which the optimizer and the "
            "averages work, and write bf16 for what the model computes in; frozen ones may have any type"
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
    low = [name for name, p in model.named_parameters() if id(p) in given and p.dtype not in _OF_MASTERS]
    if low:
        raise ConfigError(
            f"the optimizer has got {len(low)} frozen parameters that are not float32, such as {low[0]!r}, which no "
            "optimizer step nor average keeps exact; give it those alone that are trained, or model.float()"
        )
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in given]
    if left_out:
        raise ConfigError(
            f"the optimizer has not got {len(left_out)} parameters that take gradients, such as {left_out[0]!r}; let "
            "it take all that the function is given, or set their requires_grad to False"
        )


def _make_scheduler(make: MakeScheduler, optimizer: torch.optim.Optimizer) -> Any:
    scheduler = make(optimizer)
    check_scheduler(scheduler)
    return scheduler


def _start_process_group() -> torch.device:
    """Join the ranks that a launcher started. Returns this rank's device."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    # Both, since offloaded shards are averaged, and their norms added up, on the CPU.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"

    def start() -> None:
        if on_gpu:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group(backend)

    command = "`torchrun --nproc_per_node N SCRIPT ...`, or with deepspeed"
    join_ranks(backend, start, launched=("RANK",), command=command)
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
