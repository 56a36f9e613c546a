"""`initialize` and `zero_init`: DeepSpeed's own, for a configuration with a `"qsr"` block.

`initialize` goes through the real `deepspeed.initialize`; the engine that comes back takes the class `LocalStepEngine`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from qsr_engine.config.batch import check_world_size
from qsr_engine.config.deepspeed import (
    check_supported,
    offloads,
    resolve_deepspeed_config,
    shared_part,
    split_deepspeed_config,
)
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.deepspeed.compiled_models import with_plain_names
from qsr_engine.engines.deepspeed.engine import LocalStepEngine
from qsr_engine.engines.deepspeed.groups import WorkerGroups
from qsr_engine.engines.deepspeed.internals import (
    autocast_of_this_engine,
    deepspeed_initialize,
    deepspeed_uses,
    deepspeed_zero_init,
    leave_out_shared_memory_collective,
)
from qsr_engine.engines.deepspeed.models import check_model, check_sparse_gradients, with_muon_checked
from qsr_engine.engines.deepspeed.replicas import trained_groups
from qsr_engine.engines.groups import OwnGroups
from qsr_engine.engines.start import agree, agree_on_optimizer, check_scheduler, join_ranks, order_label
from qsr_engine.membership.roll_call import told_to_all


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
    given = next((c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None), None)
    with told_to_all():
        for name, value in (("mpu", mpu), ("mesh_param", mesh_param)):
            if value is not None:
                raise ConfigError(
                    f"initialize({name}=...): local steps set the process groups themselves; leave it out"
                )
        ds_config, qsr, model = _checked(given, model, optimizer, lr_scheduler)
    _start_process_group(distributed_port, dist_init_required)

    device = torch.device(get_accelerator().current_device_name())
    agreed = agree({**shared_part(ds_config), "qsr": qsr.model_dump()}, model, device)
    groups, resolved = _groups_and_config(ds_config, qsr, model)
    own = OwnGroups.make(qsr.worker_size if groups else dist.get_world_size(), on_cpu=offloads(resolved))
    _copy_from_rank_0(model, device, own.across)

    with deepspeed_uses(groups), autocast_of_this_engine():
        engine, ds_optimizer, _, lr_scheduler = deepspeed_initialize(
            model=model,
            optimizer=with_muon_checked(optimizer, resolved),
            model_parameters=model_parameters,
            lr_scheduler=lr_scheduler,
            mpu=groups,
            collate_fn=collate_fn,
            config=resolved,
        )
    check_scheduler(lr_scheduler)
    check_sparse_gradients(model, engine.basic_optimizer, engine.zero_optimization_stage(), qsr.strategy)
    kind = type(engine.basic_optimizer).__name__
    options = engine.optimizer.param_groups
    named = agree_on_optimizer(kind, trained_groups(engine.optimizer), engine.param_names, options, device)
    order = order_label({"type": kind, **named})
    engine = LocalStepEngine.taking_over(engine, qsr, groups, own, agreed, order=order, config=ds_config)
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data)
    return engine, ds_optimizer, engine.training_dataloader, lr_scheduler


def _checked(
    config: Any, model: nn.Module | None, optimizer: Any, lr_scheduler: Any
) -> tuple[dict[str, Any], QSRConfig, nn.Module]:
    """What initialize() was given, before the ranks meet: DeepSpeed's configuration, the block "qsr" and the model."""
    if config is None:
        raise ConfigError('initialize() needs config=..., a DeepSpeed configuration with a "qsr" block')
    if model is None:
        raise ConfigError("initialize() needs model=..., a torch.nn.Module")
    ds_config, qsr = split_deepspeed_config(config)
    check_supported(ds_config, qsr)
    model = with_plain_names(model)
    check_model(model)
    if optimizer is None and not ds_config.get("optimizer"):
        raise ConfigError('there is no optimizer; give initialize() one, or write an "optimizer" block')
    if lr_scheduler is not None and qsr.lr is not None:
        raise ConfigError("both qsr.lr and lr_scheduler=... set the learning rate; leave one of them out")
    return ds_config, qsr, model


def zero_init(
    config: str | os.PathLike[str] | Mapping[str, Any], **options: Any
) -> contextlib.AbstractContextManager[Any]:
    """`deepspeed.zero.Init` for a configuration with a `"qsr"` block: build a model that no single GPU can hold.

    Parameters are partitioned over the ranks of each worker as they are made. Every worker needs worker_size ranks that
    can hold the model together. Give the model and the same configuration to initialize() afterwards.

        with qsr_engine.zero_init(config):
            model = make_model()

    Args:
        options: others of deepspeed.zero.Init.
    Raises:
        ConfigError: as initialize(), or the ZeRO stage is not 3.
    """
    with told_to_all():
        ds_config, qsr = split_deepspeed_config(config)
        check_supported(ds_config, qsr)
    stage = (ds_config.get("zero_optimization") or {}).get("stage", 0)
    if stage != 3:
        raise ConfigError(f"zero_init() partitions parameters, and zero_optimization.stage is {stage}; write 3")
    _start_process_group(29500, None)
    groups, resolved = _groups_and_config(ds_config, qsr, None)
    init: contextlib.AbstractContextManager[Any] = deepspeed_zero_init(
        data_parallel_group=groups.worker if groups else None, config_dict_or_path=resolved, mpu=groups, **options
    )
    return init


def _groups_and_config(
    ds_config: Mapping[str, Any], qsr: QSRConfig, model: nn.Module | None
) -> tuple[WorkerGroups | None, dict[str, Any]]:
    """The groups of this rank, None under `parallel`, and the configuration that DeepSpeed gets.

    Args:
        model: whose parameters may be partitioned already; None where there is none yet.
    """
    ranks = dist.get_world_size()
    workers = check_world_size(ranks, qsr.worker_size)
    if qsr.strategy == "parallel":
        return None, resolve_deepspeed_config(ds_config, ranks, 1)
    resolved = resolve_deepspeed_config(ds_config, ranks, workers)
    if model is None:
        return WorkerGroups.make(qsr.worker_size), resolved
    worker = _zero_init_group(model, qsr)
    return WorkerGroups.make(qsr.worker_size, worker=worker), resolved


def _start_process_group(port: int, init_required: bool | None) -> None:
    leave_out_shared_memory_collective()
    backend = get_accelerator().communication_backend_name()
    join_ranks(
        backend,
        lambda: deepspeed.comm.init_distributed(
            dist_backend=backend, distributed_port=port, dist_init_required=init_required
        ),
        launched=("RANK", "OMPI_COMM_WORLD_RANK"),
        command="`deepspeed SCRIPT ...`, `deepspeed --module MODULE ...` or torchrun",
    )
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # DeepSpeed does it too, after our first collective


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
                f"ranks {ranks}; build it under `with qsr_engine.zero_init(config):`, inside "
                "attach() where a library partitions it (Trainer's from_pretrained), or without zero.Init"
            )
    return next(iter(groups), None)


def _partitioned(model: nn.Module) -> list[Any]:
    """The parameters that deepspeed.zero.Init has partitioned."""
    return [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]


@torch.no_grad()
def _copy_from_rank_0(model: nn.Module, device: torch.device, across: dist.ProcessGroup) -> None:
    """Move the model to the device and give every rank the values of rank 0; of partitioned parameters, its part."""
    partitioned = _partitioned(model)
    if partitioned:
        whole = {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in partitioned}
        tensors = [parameter.data for parameter in model.parameters() if id(parameter) in whole]
        source = dist.get_global_rank(across, 0)
        for parameter in partitioned:
            dist.broadcast(parameter.ds_tensor.data, source, group=across)
    else:
        model.to(device)
        tensors = [parameter.data for parameter in model.parameters()]
    for tensor in (*tensors, *model.buffers()):
        there = tensor.detach().to(device).contiguous()
        dist.broadcast(there, 0)
        tensor.copy_(there)
