"""The configuration of `initialize_fsdp`: the keys of DeepSpeed that mean something there, `fsdp` and `qsr`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from qsr_engine.config.deepspeed import split_deepspeed_config
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError, NonNegative, PositiveInt, StrictModel, validate


class FSDPOptions(StrictModel):
    """What the FSDP engine does beside sharding a worker's parameters over its ranks."""

    reshard_after_forward: bool = True
    """free a block's gathered parameters after its forward, and gather them again for its backward. All `fsdp` keys are
    for the engine `fsdp`, and an error with the other one"""
    cpu_offload: bool = False
    """on a GPU: parameters, gradients and optimizer state stay on the CPU"""
    activation_checkpointing: bool = False
    """every block keeps its input only, and computes the rest again in its backward"""
    compile: bool = False
    """`torch.compile` for every block"""


class EnabledConfig(StrictModel):
    """DeepSpeed's switch of a precision."""

    enabled: bool = False


class TensorBoardConfig(StrictModel):
    """DeepSpeed's `tensorboard` block: event files in output_path/job_name."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class FSDPConfig(StrictModel):
    """The configuration of `initialize_fsdp`: DeepSpeed's keys that mean something there, `fsdp` and `qsr`."""

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    gradient_clipping: NonNegative = 1.0  # per worker; DeepSpeed's own default, so that both engines read it alike
    bf16: EnabledConfig = EnabledConfig()
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    fsdp: FSDPOptions = FSDPOptions()
    qsr: QSRConfig


def _is_off(key: str, block: Any) -> bool:
    """A block of DeepSpeed's that is switched off, which a user's file may hold and which says nothing here."""
    if key == "zero_optimization":
        return bool(block == {"stage": 0})
    return key in ("fp16", "compile", *_MONITORS) and isinstance(block, Mapping) and block.get("enabled") is False


_MONITORS = ("wandb", "csv_monitor", "comet")
# Keys of DeepSpeed's that a user brings along, and what stands for them here.
_NOT_FOR_FSDP = {
    "zero_optimization": "a worker's ranks shard everything, as ZeRO stage 3 does; fsdp.reshard_after_forward false "
    "keeps parameters gathered from forward to backward, and fsdp.cpu_offload is the offload",
    "optimizer": "give initialize_fsdp(optimizer=lambda parameters: torch.optim.AdamW(parameters, ...))",
    "scheduler": "write qsr.lr, or give initialize_fsdp(lr_scheduler=lambda optimizer: ...)",
    "fp16": "there is no loss scaling; write bf16",
    "activation_checkpointing": "write fsdp.activation_checkpointing",
    "compile": "write fsdp.compile",
    "communication_data_type": "gradients are reduced in fp32",
    "data_types": "gradients are accumulated and reduced in fp32",
    **dict.fromkeys(_MONITORS, "write tensorboard, or log engine.local_steps.figures() where engine.step() is True"),
}


def load_fsdp_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> FSDPConfig:
    """Read and check the configuration of `initialize_fsdp`.

    Args:
        config: path of a JSON file, or a mapping.
    Raises:
        ConfigError: it cannot be read, or a key is unknown, means nothing under FSDP, or is wrong.
    """
    where = "config" if isinstance(config, Mapping) else str(config)
    raw, qsr = split_deepspeed_config(config)
    raw = {key: value for key, value in raw.items() if not _is_off(key, value)}
    lines = [
        f"{where}: {key}: the FSDP engine does not read it; {_NOT_FOR_FSDP[key]}" for key in raw if key in _NOT_FOR_FSDP
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    return validate(FSDPConfig, {**raw, "qsr": qsr}, where=where)


def shared_part(config: FSDPConfig) -> dict[str, Any]:
    """The part of a configuration that must be the same on every rank."""
    return config.model_dump(exclude={"tensorboard"})
