"""The table of DeepSpeed's keys beside the installed DeepSpeed itself."""

from __future__ import annotations

from typing import Any

import pytest

from qsr_engine.config.deepspeed import check_supported
from qsr_engine.config.deepspeed_keys import KEYS, REFUSED_KEYS, REMOVED_KEYS, TRANSLATED, WORKS
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError, validate

QSR = validate(QSRConfig, {"strategy": "constant", "h_base": 2, "total_steps": 4}, where="test")


class Asked(dict[str, Any]):
    """A block that notes which keys it is asked for."""

    def __init__(self, block: str, found: set[str], *args: Any) -> None:
        super().__init__(*args)
        self.block, self.found = block, found

    def __contains__(self, key: object) -> bool:
        self.found.add(f"{self.block}{key}")
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.found.add(f"{self.block}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.found.add(f"{self.block}{key}")
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return self


def keys_of_deepspeed() -> set[str]:
    """Those that its configuration asks for or has a field for, and those that it ends for.

    Blocks that only it reads (monitors, aio, timers) are known by their name alone.
    """
    from deepspeed import initialize
    from deepspeed.runtime import config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    found = {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    raw = Asked("", found, {"train_batch_size": 1})
    plain = ("checkpoint", "data_types", "torch_autocast", "activation_checkpointing", "flops_profiler", "optimizer")
    for block in (*plain, "scheduler", "checkpoint.parallel_write"):
        parent, _, name = block.rpartition(".")
        owner = raw if not parent else raw[parent]
        dict.__setitem__(owner, name, Asked(f"{block}.", found))
    dict.__setitem__(raw["optimizer"], "type", "Adam")
    dict.__setitem__(raw["scheduler"], "type", "WarmupLR")
    dict.__setitem__(raw["torch_autocast"], "dtype", "bf16")
    config.DeepSpeedConfig(raw)
    found |= {name for name in initialize.__code__.co_consts if str(name).endswith("parallel_size")}
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "bfloat16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "compile": config.CompileConfig,
    }
    for block, model in models.items():
        for name, field in model.model_fields.items():
            found |= {f"{block}.{name}", f"{block}.{field.alias or name}"}
    return found


def test_every_key_of_the_installed_deepspeed_is_known() -> None:
    """And no other one: a key that is new, renamed or gone must be looked at."""
    assert keys_of_deepspeed() == set(KEYS)


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


@pytest.mark.parametrize("path", sorted(REFUSED_KEYS.keys() | REMOVED_KEYS))
def test_a_refused_key_is_refused_by_name(path: str) -> None:
    harmless, _ = REFUSED_KEYS.get(path, ((), ""))
    for value in (False, 0.5, True, {"a": 1}):
        if value not in harmless:
            with pytest.raises(ConfigError, match=rf"^{path} is (set|there), .*; "):
                check_supported(nested(path, value), QSR)
    for value in harmless:
        check_supported(nested(path, value), QSR)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping: DeepSpeed 0.19.8 has no such key; did you mean 'gradient_clip"),
        ({"train_mirco_batch_size_per_gpu": 1}, "did you mean 'train_micro_batch_size_per_gpu'"),
        ({"my_own_settings": {}}, "my_own_settings: DeepSpeed 0.19.8 has no such key; leave it out"),
        ({"zero_optimization": {"stag": 1}}, "zero_optimization.stag: .* did you mean 'stage'"),
        ({"checkpoint": {"tag_validaton": "Fail"}}, "checkpoint.tag_validaton: .* did you mean 'tag_validation'"),
        ({"gradient_allreduce_op": "SUM"}, "gradient_allreduce_op is 'sum'"),
    ],
)
def test_what_deepspeed_would_pass_over_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_supported(config, QSR)


def test_what_is_known_passes() -> None:
    """Keys at null, which says nothing; a note of the user's; and blocks that are switched off."""
    for path, verdict in KEYS.items():
        if verdict in (WORKS, TRANSLATED):
            check_supported(nested(path, None), QSR)
        if verdict == TRANSLATED:
            check_supported(nested(path, "auto" if "batch" in path or "steps" in path else 1.0), QSR)
    check_supported({"_note": "of mine"}, QSR)
    check_supported({"autotuning": {"enabled": False}, "expert_parallel": {"enabled": False}, "pipeline": {}}, QSR)
    parallel = validate(QSRConfig, {"strategy": "parallel", "total_steps": 4}, where="test")
    check_supported({"gradient_allreduce_op": "sum"}, parallel)
