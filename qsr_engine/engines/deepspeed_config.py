"""What a DeepSpeed configuration may say beside its `"qsr"` block: refusals by name, batch sizes, defaults made plain.

Imports neither deepspeed nor torch, so that a configuration is refused before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsr_engine.config import ConfigError, QSRConfig, resolve_batch

DEEPSPEED_GRADIENT_CLIPPING = 1.0  # DeepSpeed 0.19 clips to this norm where the configuration says nothing

# Keys that say where a rank writes and what it prints; hosts may differ in them.
_LOCAL_KEYS = frozenset(
    {"tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "comms_logger", "nebula", "dump_state"}
    | {"steps_per_print", "wall_clock_breakdown", "memory_breakdown"}
)
# Blocks with an "enabled" switch, and plain keys, that change what is communicated or what the masters are.
_REFUSED_BLOCKS = ("fp16", "amp", "torch_autocast", "hybrid_engine", "elasticity", "data_efficiency")
_REFUSED_KEYS = ("sequence_parallel_size", "data_parallel_size", "expert_parallel", "tensor_parallel", "pipeline")
_REFUSED_ZERO_KEYS = ("offload_optimizer", "offload_param", "zenflow", "zero_quantized_gradients")
_REFUSED_OPTIMIZERS = ("onebitadam", "zerooneadam", "onebitlamb", "muon")


def check_supported(config: Mapping[str, Any], qsr: QSRConfig) -> None:
    """Refuse by name what local steps cannot work with, or not yet.

    Raises:
        ConfigError: with the key's path, the reason and the nearest setting that works.
    """
    for key in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ConfigError(f"{key} is {config[key]!r}; in DeepSpeed's configuration it is a block of keys")
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    bf16 = _enabled(config.get("bf16", config.get("bfloat16")))
    if stage not in (0, 1):
        raise ConfigError(f"zero_optimization.stage is {stage}, which local steps do not support yet; write 0 or 1")
    if bf16 and stage == 0:
        raise ConfigError("bf16 with ZeRO stage 0 is not supported yet; write zero_optimization.stage 1, or leave bf16")
    for key in _REFUSED_BLOCKS:
        if _enabled(config.get(key)):
            instead = "bf16 with zero_optimization.stage 1, or fp32" if key in ("fp16", "amp") else f"no {key}"
            raise ConfigError(f"{key} is enabled, which local steps do not support yet; use {instead}")
    for key in _REFUSED_KEYS:
        if config.get(key) not in (None, 1, False, {}):
            raise ConfigError(f"{key} is set, which local steps do not support yet; leave it out")
    for key in _REFUSED_ZERO_KEYS:
        block = zero.get(key)
        nowhere = isinstance(block, Mapping) and block.get("device") == "none"  # what else it says is not read then
        if block not in (None, False) and not nowhere:
            raise ConfigError(f"zero_optimization.{key} is set, which local steps do not support yet; leave it out")
    if config.get("managed_gradient_accumulation") is False:
        raise ConfigError("managed_gradient_accumulation is false, which local steps do not support yet; leave it out")
    optimizer = str((config.get("optimizer") or {}).get("type", ""))
    if optimizer.lower() in _REFUSED_OPTIMIZERS:
        raise ConfigError(f"optimizer.type {optimizer!r} communicates by itself; use for example AdamW or SGD")
    if qsr.lr is not None and config.get("scheduler"):
        raise ConfigError("both qsr.lr and scheduler set the learning rate; leave one of them out")


def _enabled(block: Any) -> bool:
    return bool(block.get("enabled", False)) if isinstance(block, Mapping) else bool(block)


def resolve_deepspeed_config(config: Mapping[str, Any], world_size: int, workers: int) -> dict[str, Any]:
    """The configuration that DeepSpeed gets: batch sizes of one worker, and gradient clipping said plainly.

    Args:
        config: with batch sizes over all ranks, as DeepSpeed's users write them; "auto" counts as not given.
        world_size: number of ranks.
        workers: number of workers that DeepSpeed will not see beyond; 1 for its own data parallel.
    Raises:
        ConfigError: the batch sizes contradict one another.
    """
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    given = [None if config.get(key) == "auto" else config.get(key) for key in keys]
    for key, value in zip(keys, given, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{key} is {value!r}; write a whole number of at least 1")
    train, micro, accumulation = resolve_batch(
        world_size, train_batch_size=given[0], micro_batch_size=given[1], accumulation=given[2]
    )
    return {
        "gradient_clipping": DEEPSPEED_GRADIENT_CLIPPING,
        **config,
        **dict(zip(keys, (train // workers, micro, accumulation), strict=True)),
    }


def shared_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a DeepSpeed configuration that must be the same on every rank."""
    return {key: value for key, value in config.items() if key not in _LOCAL_KEYS}
