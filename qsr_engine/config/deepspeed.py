"""DeepSpeed's own JSON with one more block, `"qsr"`: refusals by name, batch sizes, defaults made plain.

Imports neither deepspeed nor torch, so that a configuration is refused before anything starts.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hjson

from qsr_engine.config.batch import resolve_batch
from qsr_engine.config.deepspeed_keys import check_keys
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError, validate

DEEPSPEED_GRADIENT_CLIPPING = 1.0  # DeepSpeed 0.19 clips to this norm where the configuration says nothing

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Keys that say where a rank writes and what it prints; hosts may differ in them.
_LOCAL_KEYS = frozenset(
    {"tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "comms_logger", "nebula", "dump_state"}
    | {"steps_per_print", "wall_clock_breakdown", "memory_breakdown"}
)
_AUTOCAST_TYPES = ("bfloat16", "bf16", "float16", "fp16")
_REFUSED_OPTIMIZERS = ("onebitadam", "zerooneadam", "onebitlamb", "muon")
_LOW_PRECISION_MASTERS = ("fp16_master_weights_and_grads", "bf16_master_weights_and_grads")


def split_deepspeed_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], QSRConfig]:
    """Take the `"qsr"` block out of a DeepSpeed configuration.

    Args:
        config: as for read_deepspeed_config().
    Returns:
        What DeepSpeed itself reads, and the checked block.
    Raises:
        ConfigError: the file cannot be read, or there is no `"qsr"` block, or it is wrong.
    """
    where = "config" if isinstance(config, Mapping) else f"{config!s:.200}"
    raw = read_deepspeed_config(config)
    if "qsr" not in raw:
        near = [key for key in raw if difflib.get_close_matches("qsr", [str(key).lower()], cutoff=0.5)]
        hint = f"; did you mean {near[0]!r} to be 'qsr'?" if near else "."
        raise ConfigError(
            f'{where}: there is no "qsr" block{hint} Write for example '
            '"qsr": {"strategy": "qsr", "h_base": 4, "alpha": 0.0175, "total_steps": 93600, "lr": {...}}'
        )
    qsr = validate(QSRConfig, raw.pop("qsr"), where=where, prefix="qsr.")
    return raw, qsr


def read_deepspeed_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a DeepSpeed configuration, in a dict of their own.

    Args:
        config: a mapping, or the path of a JSON file, read as DeepSpeed does, as Hjson: with comments and trailing
            commas; or the text of one in URL-safe base64, as DeepSpeed's launcher may pass it.
    Raises:
        ConfigError: it is neither a mapping nor a path, or the file cannot be read.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(f"config: found {config!r}; give a mapping or the path of a JSON file")
    return _read_json(Path(config))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {twice!r} is given twice")
    return dict(pairs)


def _parsed(text: str) -> Any:
    """Raises ValueError for all that cannot be read."""
    try:
        return hjson.loads(text, object_pairs_hook=_without_duplicates)
    except Exception as error:  # hjson raises OverflowError for 1e999, and RecursionError for thousands of brackets
        raise ValueError(str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        with contextlib.suppress(ValueError):
            raw = _parsed(base64.urlsafe_b64decode(str(path)).decode())
            if isinstance(raw, dict):
                return raw
        where = f"{path!s:.200}"
        raise ConfigError(f"{where}: cannot read this configuration: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not a JSON file that can be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration is a JSON object; found {type(raw).__name__}")
    return raw


def check_supported(config: Mapping[str, Any], qsr: QSRConfig) -> None:
    """Refuse by name what local steps cannot work with, or not yet.

    Raises:
        ConfigError: with the key's path, the reason and the nearest setting that works.
    """
    for path in _auto(config):
        if path not in (*_BATCH_KEYS, "data_types.keep_in_fp32_modules"):
            raise ConfigError(
                f"{path} is 'auto', which Hugging Face's libraries fill in and DeepSpeed does not; write it"
            )
    for key in ("zero_optimization", "bf16", "fp16", "torch_autocast", "checkpoint", "optimizer", "scheduler"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise ConfigError(f"{key} is {config[key]!r}; in DeepSpeed's configuration it is a block of keys")
    check_keys(config)
    clipping = config.get("gradient_clipping") or 0.0
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not 0 <= clipping < math.inf:
        raise ConfigError(f"gradient_clipping is {clipping!r}; write a norm of 0 or more, 0 for none")
    zero = config.get("zero_optimization") or {}
    _check_zero(zero, qsr)
    _check_precision(config, zero)
    _check_autocast(config)
    if str(config.get("gradient_allreduce_op")).lower() == "sum" and qsr.strategy != "parallel":
        raise ConfigError(
            "gradient_allreduce_op is 'sum', and only the ranks of a worker would add up their gradients; leave it "
            "out, and multiply the learning rate"
        )
    optimizer = str((config.get("optimizer") or {}).get("type", ""))
    if optimizer.lower() in _REFUSED_OPTIMIZERS:
        raise ConfigError(f"optimizer.type {optimizer!r} communicates by itself; use for example AdamW or SGD")
    if qsr.lr is not None and config.get("scheduler"):
        raise ConfigError("both qsr.lr and scheduler set the learning rate; leave one of them out")


def _auto(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _auto(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value == "auto":
            yield f"{prefix}{key}"


def _check_zero(zero: Mapping[str, Any], qsr: QSRConfig) -> None:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage is {stage!r}; write 0, 1, 2 or 3")
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = _offload_device(zero, key)
        if device == "none":
            continue
        if device != "cpu":
            raise ConfigError(
                f"zero_optimization.{key}.device is {device!r}: averaging needs the masters in memory; write 'cpu'"
            )
        if stage not in stages:
            near = " or ".join(map(str, stages))
            raise ConfigError(
                f"zero_optimization.{key} is set and the stage is {stage}, where DeepSpeed has nothing to offload; "
                f"write stage {near}, or leave it out"
            )
    secondary = zero.get("zero_hpz_partition_size", 1)
    if qsr.strategy != "parallel" and secondary > 1 and qsr.worker_size % secondary:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size is {secondary} and qsr.worker_size is {qsr.worker_size}: "
            "secondary copies would cross workers; write a size that divides worker_size, or 1"
        )


def _check_precision(config: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    bf16, fp16 = config.get("bf16", config.get("bfloat16")), config.get("fp16")
    if _enabled(bf16) and _enabled(fp16):
        raise ConfigError("bf16 and fp16 are both enabled; leave one of them out")
    for name, block in (("bf16", bf16), ("fp16", fp16)):
        for key in _LOW_PRECISION_MASTERS:
            if isinstance(block, Mapping) and block.get(key):
                raise ConfigError(
                    f"{name}.{key} is set, and averages of masters in {name} lose what small steps have changed; leave "
                    "it out, so that the masters are fp32"
                )
    if _enabled(fp16) and not zero.get("stage", 0):
        raise ConfigError(
            "fp16 is enabled and ZeRO is off: DeepSpeed then divides the gradients by a loss scale by which it did not "
            "multiply them (https://github.com/deepspeedai/DeepSpeed/pull/8393); write zero_optimization.stage 1, "
            "which shards nothing with worker_size 1, or bf16"
        )
    accumulation = (config.get("data_types") or {}).get("grad_accum_dtype")
    if accumulation in ("fp32", "float32") and (_enabled(bf16) or _enabled(fp16)) and not zero.get("stage", 0):
        raise ConfigError(
            "data_types.grad_accum_dtype is fp32 and ZeRO is off, which DeepSpeed does not implement; write "
            "zero_optimization.stage 1, or leave it out"
        )


def _check_autocast(config: Mapping[str, Any]) -> None:
    block = config.get("torch_autocast")
    if not _enabled(block):
        return
    dtype = block.get("dtype") if isinstance(block, Mapping) else None
    if dtype not in _AUTOCAST_TYPES:
        raise ConfigError(f"torch_autocast.dtype is {dtype!r}; write 'bfloat16', or 'float16', whose loss is scaled")
    for other in ("bf16", "bfloat16", "fp16"):
        if _enabled(config.get(other)):
            raise ConfigError(
                f"torch_autocast and {other} are both enabled: under the one the parameters are fp32, under the other "
                "they are low-precision copies of fp32 masters; leave one of them out"
            )


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether the masters lie on the CPU while the model is on a GPU."""
    return _offload_device(config.get("zero_optimization") or {}, "offload_optimizer") == "cpu"


def _offload_device(zero: Mapping[str, Any], key: str) -> str:
    block = zero.get(key)
    if block is None or block is False:
        return "none"
    return str(block.get("device", "none")) if isinstance(block, Mapping) else str(block)


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
    given = [None if config.get(key) == "auto" else config.get(key) for key in _BATCH_KEYS]
    for key, value in zip(_BATCH_KEYS, given, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{key} is {value!r}; write a whole number of at least 1")
    train, micro, accumulation = resolve_batch(
        world_size, train_batch_size=given[0], micro_batch_size=given[1], accumulation=given[2]
    )
    return {
        "gradient_clipping": DEEPSPEED_GRADIENT_CLIPPING,
        **config,
        **dict(zip(_BATCH_KEYS, (train // workers, micro, accumulation), strict=True)),
    }


def shared_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a DeepSpeed configuration that must be the same on every rank."""
    return {key: value for key, value in config.items() if key not in _LOCAL_KEYS}
