"""Which models can take local steps under DeepSpeed; the others are refused before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.muon import MuonWithAdamW
from qsr_engine.engines.start import with_sparse_gradients

# Modules of DeepSpeed's that spread one model over ranks by groups of their own, by the start of their class's module
# or its name, and what they do.
_SPREAD = {
    "deepspeed.moe.": "keeps other experts on every rank, which an averaging would mix, in groups over all ranks",
    "deepspeed.runtime.pipe.": "puts the stages of a model on several ranks",
    "deepspeed.sequence.": "spreads a sequence over ranks",
    "deepspeed.runtime.sequence_parallel.": "spreads a sequence over ranks",
    "deepspeed.module_inject.layers.TensorParallel": "spreads its weight over ranks",
}


def check_model(model: nn.Module) -> None:
    """Refuse what has nothing to train, what is spread over ranks already, and what DeepSpeed cannot broadcast.

    Raises:
        ConfigError: with the name of the module or parameter.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"the {type(model).__name__} has no parameter to train (requires_grad)")
    _check_not_spread(model)
    flat = [name for name, p in model.named_parameters() if p.dim() == 0 and not hasattr(p, "ds_id")]
    if flat:
        raise ConfigError(f"the parameter {flat[0]!r} has the shape [], which DeepSpeed cannot broadcast; make it [1]")
    apart = [name for name, p in model.named_parameters() if not p.is_contiguous()]
    if apart and get_accelerator().device_name() == "cpu":
        raise ConfigError(
            f"the parameter {apart[0]!r} is not contiguous (channels_last?), and DeepSpeed cannot broadcast that on a "
            "CPU; make it contiguous: p.data = p.data.contiguous(), or write model.channels_last: false in a recipe"
        )


def check_sparse_gradients(model: nn.Module, optimizer: Any, stage: int, strategy: str) -> None:
    """Refuse sparse gradients where something in a step takes dense ones only.

    Args:
        optimizer: torch's.
        stage: of ZeRO.
        strategy: of local steps.
    Raises:
        ConfigError: with the name of the module.
    """
    sparse = with_sparse_gradients(model)
    if sparse is None:
        return
    if stage:
        why = f"ZeRO stage {stage} does not take; write sparse=False, or stage 0"
    elif strategy == "post_local":
        why = "strategy 'post_local' does not average before its switch; write sparse=False, or another strategy"
    elif not isinstance(optimizer, torch.optim.SGD | torch.optim.SparseAdam | torch.optim.Adagrad):
        why = f"{type(optimizer).__name__} does not take; write sparse=False, or an optimizer such as SGD or SparseAdam"
    else:
        return
    raise ConfigError(f"{sparse} has sparse gradients, which {why}")


def with_muon_checked(optimizer: Any, config: Mapping[str, Any]) -> Any:
    """The optimizer, or the function that makes it, where DeepSpeed leaves matrices as they are.

    Raises:
        ConfigError: it is Muon, and DeepSpeed would give it flat masters; of a function, when DeepSpeed calls it.
    """
    stage = config.get("zero_optimization", {}).get("stage", 0)
    low = next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), None)

    def checked(made: Any) -> Any:
        if isinstance(made, torch.optim.Muon | MuonWithAdamW) and (stage or low):
            found = f"zero_optimization.stage is {stage}" if stage else f"{low} is enabled"
            raise ConfigError(
                f"the optimizer is {type(made).__name__} and {found}, under which DeepSpeed gives an optimizer flat "
                "parts of the parameters, and Muon needs matrices; write stage 0 in fp32, or use initialize_fsdp()"
            )
        return made

    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        return checked(optimizer)
    return lambda parameters: checked(optimizer(parameters))


def _check_not_spread(model: nn.Module) -> None:
    """Every worker holds the whole model: its ranks share it by ZeRO, and nothing else does."""
    for name, module in model.named_modules():
        where = f"the module {name!r}" if name else "the model"
        kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
        for start, does in _SPREAD.items():
            found = next((kind for kind in kinds if kind.startswith(start)), None)
            if found is not None:
                raise ConfigError(
                    f"{where} is a {found}, which {does}; local steps need the whole model in every worker: put a "
                    "plain module in its place, and shard with ZeRO inside workers of several ranks (qsr.worker_size)"
                )
        if getattr(module, "zero_shards", 1) > 1:
            raise ConfigError(
                f"{where} spreads its weight over all ranks (LoRAConfig.base_weight_sharding {module.zero_shards}), "
                "also across workers; write 1, and shard with ZeRO stage 3"
            )
    for name, parameter in model.named_parameters():
        if getattr(parameter, "allreduce", True) is False:
            raise ConfigError(
                f"the parameter {name!r} has allreduce=False, so it is an expert's that other ranks do not hold, and "
                "an averaging would mix it with theirs; local steps need the whole model in every worker"
            )
        if hasattr(parameter, "device_mesh"):
            raise ConfigError(
                f"the parameter {name!r} is a DTensor, spread over ranks already; give the plain model, and shard with "
                "ZeRO inside workers of several ranks (qsr.worker_size)"
            )
