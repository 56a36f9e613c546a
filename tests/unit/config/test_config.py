"""Configuration: what is refused, with which words, and what a recipe becomes."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsr_engine.config.batch import check_world_size, resolve_batch
from qsr_engine.config.deepspeed import check_supported, resolve_deepspeed_config, split_deepspeed_config
from qsr_engine.config.digest import digest
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import dump_recipe, load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError, validate

LR = {"schedule": "cosine", "peak": 0.008, "min": 1e-6, "warmup_steps": 10}
BLOCK: dict[str, Any] = {"strategy": "qsr", "h_base": 4, "alpha": 0.0175, "total_steps": 100, "lr": LR}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(QSRConfig, {**BLOCK, **changes}, where="ds.json", prefix="qsr.")
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stratgy": "qsr"}, ["qsr.stratgy: unknown key", "did you mean 'strategy'?"]),
        ({"lr": {**LR, "warmup_step": 3}}, ["qsr.lr.warmup_step: unknown key", "'warmup_steps'"]),
        ({"averaging": {"bucket": 3}}, ["qsr.averaging.bucket: unknown key", "'bucket_mb'"]),
        ({"nonsense_entirely": 1}, ["qsr.nonsense_entirely: unknown key", "the keys here are strategy, h_base"]),
        ({"alpha": -0.1}, ["qsr.alpha: found -0.1", "greater than or equal to 0"]),
        ({"alpha": "0.1"}, ["qsr.alpha: found '0.1'", "number"]),
        ({"alpha": float("nan")}, ["qsr.alpha: found nan"]),
        ({"alpha": None}, ["qsr.alpha is missing"]),
        ({"h_base": 0}, ["qsr.h_base: found 0", "greater than or equal to 1"]),
        ({"h_base": 2.5}, ["qsr.h_base: found 2.5"]),
        ({"h_base": True}, ["qsr.h_base: found True"]),
        ({"power": 0}, ["qsr.power: found 0"]),
        ({"total_steps": 0}, ["qsr.total_steps: found 0"]),
        ({"strategy": "qrs"}, ["qsr.strategy: found 'qrs'", "'qsr', 'constant', 'parallel', 'post_local' or 'swap'"]),
        ({"lr": {**LR, "warmup_steps": 101}}, ["qsr.lr.warmup_steps is 101 and total_steps is 100"]),
        ({"lr": {**LR, "min": 0.1}}, ["qsr.lr: min is 0.1 and peak is 0.008"]),
        ({"lr": {**LR, "decay_steps": [5]}}, ["qsr.lr: decay_steps is read by the schedule 'step' only"]),
        ({"lr": {"schedule": "step", "peak": 1.0, "decay_steps": [9, 5]}}, ["strictly increasing"]),
        ({"warmup_steps": 3}, ["qsr.warmup_steps stands beside an lr block"]),
        ({"lr": None}, ["qsr.warmup_steps is missing, and there is no lr block"]),
        ({"lr": None, "warmup_steps": 101}, ["qsr.warmup_steps is 101"]),
        ({"lr": None, "alpha": 0, "h_warmup": 2}, ["qsr.warmup_steps is missing"]),
        ({"strategy": "constant", "h_warmup": 2}, ["qsr.h_warmup is 2, and strategy 'constant' does not read it"]),
        (
            {"strategy": "parallel", "h_max": 9},
            ["qsr.h_max is 9, and strategy 'parallel' has no rounds"],
        ),
        ({"h_max": 3}, ["qsr.h_base is 4 and h_max is 3", "write h_base 3 or less, or h_max 4 or more"]),
        ({"h_max": 5, "h_warmup": 6}, ["qsr.h_warmup is 6 and h_max is 5"]),
        ({"h_max": 0}, ["qsr.h_max: found 0"]),
        ({"switch_step": 3}, ["qsr.switch_step is 3, and strategy 'qsr' does not read it"]),
        ({"strategy": "swap"}, ["qsr.switch_step is missing"]),
        ({"strategy": "post_local", "switch_step": 101}, ["qsr.switch_step is 101 and total_steps is 100"]),
        ({"averaging": {"bucket_mb": 1e-7}}, ["qsr.averaging.bucket_mb", "found 1e-07", "0.0001"]),
        ({"averaging": {"overlap": "next"}}, ["qsr.averaging.overlap", "found 'next'", "'next_forward'"]),
        ({"averaging": {"overlap": "delayed"}}, ["qsr.averaging: delay_steps is missing"]),
        ({"averaging": {"delay_steps": 2}}, ["delay_steps is 2, and overlap 'none' does not read it"]),
        ({"averaging": {"overlap": "delayed", "delay_steps": 1, "wire_dtype": "bf16"}}, ["write wire_dtype 'fp32'"]),
        ({"averaging": {"cuda_graph": True, "wire_dtype": "bf16"}}, ["a graph holds the plain averaging only"]),
        ({"averaging": {"cuda_graph": True, "overlap": "next_forward"}}, ["write overlap 'none'"]),
        ({"averaging": {"two_level": True, "wire_dtype": "bf16"}}, ["write wire_dtype 'fp32'", "or two_level 'auto'"]),
        ({"averaging": {"fragments": 0}}, ["qsr.averaging.fragments", "found 0", "1"]),
        ({"averaging": {"fragments": 2.5}}, ["qsr.averaging.fragments", "found 2.5"]),
        ({"averaging": {"mixing": 1.5}}, ["qsr.averaging.mixing", "found 1.5", "1"]),
        ({"averaging": {"mixing": -0.1}}, ["qsr.averaging.mixing", "found -0.1", "0"]),
        ({"averaging": {"mixing": math.nan}}, ["qsr.averaging.mixing", "found nan"]),
        (
            {"averaging": {"fragments": 2, "cuda_graph": True}},
            ["fragments is 2 and cuda_graph is true", "write cuda_graph false, or fragments 1"],
        ),
        (
            {"averaging": {"fragments": 2, "state": ["exp_avg"]}},
            ["fragments is 2 and state is ['exp_avg']", "write state [], or fragments 1"],
        ),
        ({"strategy": "parallel", "averaging": {"fragments": 4}}, ["qsr.averaging.fragments is 4"]),
        ({"strategy": "parallel", "averaging": {"mixing": 0.5}}, ["qsr.averaging.mixing is 0.5"]),
        ({"averaging": {"two_level": "yes"}}, ["qsr.averaging.two_level", "found 'yes'", "'auto'"]),
        ({"averaging": {"wire_dtype": "fp31"}}, ["qsr.averaging.wire_dtype", "found 'fp31'", "'int8'"]),
        (
            {"averaging": {"state": ["exp_avg"], "overlap": "delayed", "delay_steps": 1}},
            ["qsr.averaging", "the state would be averaged steps before the parameters"],
        ),
        (
            {"averaging": {"state": {"exp_avg": 0}}},
            ["qsr.averaging.state: found {'exp_avg': 0}", "write names of optimizer state, such as [exp_avg]"],
        ),
        ({"averaging": {"state": "exp_avg"}}, ["qsr.averaging.state: found 'exp_avg'", "{exp_avg: 3, exp_avg_sq: 6}"]),
        ({"on_other_workers": "sum"}, ["qsr.on_other_workers", "'mean' or 'fresh'"]),
        ({"outer": {"lr": 0.7, "nesterov": True}}, ["qsr.outer: nesterov is true and momentum is 0"]),
        ({"outer": {"lr": 0.7, "momentum": 1}}, ["qsr.outer.momentum", "less than 1"]),
        ({"outer": {"lr": 0.7, "speed": 1}}, ["qsr.outer.speed: unknown key"]),
        ({"outer": {"unit_steps": 8}}, ["qsr.outer: unit_steps is 8, lr is 1 and momentum is 0", "or unit_steps null"]),
        ({"outer": {"lr": 1.5, "unit_steps": 8}}, ["qsr.outer: unit_steps is 8 and lr is 1.5", "at most 1"]),
        (
            {"outer": {"lr": 0.7, "unit_steps": 8}, "averaging": {"fragments": 2}},
            ["averaging.fragments is 2", "write fragments 1"],
        ),
        (
            {"outer": {"lr": 0.7, "unit_steps": 8}, "averaging": {"mixing": 0.5}},
            ["averaging.mixing is 0.5", "write mixing 0"],
        ),
        ({"outer": {"lr": 0.7, "unit_steps": 8}, "lr": None}, ["outer.unit_steps is set", "no block lr"]),
        ({"strategy": "parallel", "averaging": {"wire_dtype": "bf16"}}, ["qsr.averaging.wire_dtype is 'bf16', and"]),
        (
            {"strategy": "parallel", "averaging": {"overlap": "next_forward"}},
            ["qsr.averaging.overlap is 'next_forward'"],
        ),
        ({"strategy": "parallel", "averaging": {"cuda_graph": True}}, ["qsr.averaging.cuda_graph is True"]),
        ({"strategy": "parallel", "averaging": {"state": ["exp_avg"]}}, ["qsr.averaging.state is ['exp_avg']"]),
        ({"strategy": "parallel", "averaging": {"bucket_mb": 8.0}}, ["leave the block averaging out"]),
        ({"strategy": "constant", "alpha": None, "power": 3.0}, ["qsr.power is 3, and strategy 'constant'"]),
        (
            {"strategy": "constant", "lr": None, "warmup_steps": 5},
            ["qsr.warmup_steps is 5, and the periods of strategy 'constant' do not depend on the learning rate"],
        ),
        ({"lr": {**LR, "factor": 0.5}}, ["qsr.lr: factor is 0.5, which the schedule 'step' reads only"]),
        ({"lr": {**LR, "base": 4.0}}, ["qsr.lr: base is 4, which the schedule 'cosine_step' reads only"]),
        ({"lr": {"schedule": "constant", "peak": 0.1, "min": 0.01}}, ["qsr.lr: min is 0.01, and the schedule 'const"]),
        ({"total_steps": 2**63}, ["qsr.total_steps: found 9223372036854775808", "less than 9223372036854775808"]),
        ({"outer": {}, "averaging": {"overlap": "delayed", "delay_steps": 1}}, ["outer is set and", "'delayed'"]),
    ],
)
def test_wrong_blocks_are_refused_with_path_and_remedy(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(**changes)
    assert message.startswith("ds.json: qsr.")
    for word in words:
        assert word in message


def test_every_mistake_is_named_at_once() -> None:
    assert len(refusal(alpha=-1, h_base=0, stratgy="x").splitlines()) == 3


def test_split_deepspeed_config(tmp_path: Path) -> None:
    config = {"train_batch_size": 8, "qsr": BLOCK}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    for source in (config, path, str(path)):
        rest, qsr = split_deepspeed_config(source)
        assert rest == {"train_batch_size": 8}
        assert qsr.alpha == 0.0175
    assert "qsr" in config, "the caller's dict is left as it is"
    with pytest.raises(ConfigError, match=r'no "qsr" block; did you mean \'qsrr\''):
        split_deepspeed_config({"qsrr": BLOCK})
    with pytest.raises(ConfigError, match=r"did you mean 'QSR'"):
        split_deepspeed_config({"QSR": BLOCK})
    with pytest.raises(ConfigError, match="config: found 3; give a mapping or the path of a JSON file"):
        split_deepspeed_config(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot read"):
        split_deepspeed_config(tmp_path / "missing.json")
    path.write_text("{")
    with pytest.raises(ConfigError, match="not a JSON file"):
        split_deepspeed_config(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="JSON object; found list"):
        split_deepspeed_config(path)


def test_a_deepspeed_file_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    """Hjson: comments, trailing commas, keys without quotes. In base64 it may stand in place of its path."""
    text = """{
      // the batch of all ranks
      "train_batch_size": 8,  # samples
      gradient_clipping: 1.5,
      "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8,},
      /* local steps */
      "qsr": {"strategy": "constant", "h_base": 2, "total_steps": 4,},
    }"""
    (tmp_path / "ds.json").write_text(text)
    zero = {"stage": 1, "reduce_bucket_size": 5e8}
    for source in (tmp_path / "ds.json", base64.urlsafe_b64encode(text.encode()).decode()):
        rest, qsr = split_deepspeed_config(source)
        assert rest == {"train_batch_size": 8, "gradient_clipping": 1.5, "zero_optimization": zero}
        assert qsr.h_base == 2
    (tmp_path / "ds.json").write_text('{"a": {"b": 1, // once\n"b": 2}}')
    with pytest.raises(ConfigError, match=r"ds\.json: not a JSON file that can be read: the key 'b' is given twice"):
        split_deepspeed_config(tmp_path / "ds.json")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((4, 64, None, None), (64, 16, 1)),
        ((4, 64, 8, None), (64, 8, 2)),
        ((4, None, 8, 3), (96, 8, 3)),
        ((4, None, 8, None), (32, 8, 1)),
        ((4, 64, None, 2), (64, 8, 2)),
    ],
)
def test_resolve_batch(given: tuple[Any, ...], expected: tuple[int, int, int]) -> None:
    ranks, train, micro, accumulation = given
    assert resolve_batch(ranks, train_batch_size=train, micro_batch_size=micro, accumulation=accumulation) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((4, 3, None, None), "is 3, which is not a multiple of 4 ranks; write 4, or start another number of ranks"),
        ((2, 7, None, None), "is 7, which is not a multiple of 2 ranks; write 6 or 8, or start"),
        (
            (2, 96, 7, None),
            "is 96, which is not a multiple of 2 ranks x train_micro_batch_size_per_gpu 7; write 84 or 98",
        ),
        ((2, 7, None, 3), "is 7, which is not a multiple of 2 ranks x gradient_accumulation_steps 3; write 6 or 12"),
    ],
)
def test_a_batch_that_ranks_cannot_share_is_told_in_the_keys_that_are_there(given: tuple[Any, ...], said: str) -> None:
    ranks, train, micro, accumulation = given
    with pytest.raises(ConfigError) as caught:
        resolve_batch(ranks, train_batch_size=train, micro_batch_size=micro, accumulation=accumulation)
    assert f"train_batch_size {said}" in str(caught.value)
    assert all(key in str(caught.value) for key, value in zip(_KEYS, (micro, accumulation), strict=True) if value)
    assert not any(
        key in str(caught.value) for key, value in zip(_KEYS, (micro, accumulation), strict=True) if not value
    )


_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def test_contradicting_batch_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size is 60, but .* 16 x .* 1 x 4 ranks is 64"):
        resolve_batch(4, train_batch_size=60, micro_batch_size=16, accumulation=1)
    with pytest.raises(ConfigError, match="neither"):
        resolve_batch(4, train_batch_size=None, micro_batch_size=None, accumulation=None)


def test_ranks_that_are_not_a_multiple_of_worker_size() -> None:
    assert check_world_size(8, 2) == 4
    with pytest.raises(ConfigError, match=r"worker_size is 3 and there are 8 ranks.*among \[1, 2, 4, 8\]"):
        check_world_size(8, 3)


def test_digest_tells_configurations_apart() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert 0 <= digest({"a": 1}) < 2**63


# ---------------------------------------------------------------------------------------- DeepSpeed configuration


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage is 4; write 0, 1, 2 or 3"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled and ZeRO is off"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 1}},
            "averages of masters in bf16 lose",
        ),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile is set"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients is set"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.dtype is None"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp8"}}, "torch_autocast.dtype is 'fp8'"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "bf16": {"enabled": True}},
            "torch_autocast and bf16 are both enabled",
        ),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is set"),
        ({"checkpoint": {"writer": {"type": "FAST"}}}, "checkpoint.writer is set"),
        ({"checkpoint": "local"}, "checkpoint is 'local'"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1; write a norm of 0 or more"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is nan"),
        ({"gradient_clipping": "auto"}, "gradient_clipping is 'auto', which Hugging Face's libraries fill in"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.params.lr is 'auto'"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is set"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device is 'nvme'"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param is set and the stage is 2",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            "averaging needs the masters in memory",
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "secondary copies would cross workers"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights is set"),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}},
            "grad_accum_dtype is fp32 and ZeRO is off",
        ),
        ({"optimizer": {"type": "OneBitAdam"}}, "'OneBitAdam' communicates by itself"),
        ({"scheduler": {"type": "WarmupLR"}}, "both qsr.lr and scheduler"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is set"),
        ({"optimizer": "AdamW"}, "optimizer is 'AdamW'; in DeepSpeed's configuration it is a block"),
        ({"zero_optimization": True}, "zero_optimization is True; in DeepSpeed's configuration it is a block"),
    ],
)
def test_what_does_not_work_yet_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    qsr = validate(QSRConfig, BLOCK, where="test")
    with pytest.raises(ConfigError, match=words):
        check_supported(config, qsr)


def test_what_works_is_not_refused() -> None:
    qsr = validate(QSRConfig, BLOCK, where="test")
    check_supported({}, qsr)
    check_supported({"train_batch_size": "auto", "data_types": {"keep_in_fp32_modules": "auto"}}, qsr)
    check_supported({"fp16": {"enabled": False}, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, qsr)
    offloaded = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    check_supported({"fp16": {"enabled": True}, "zero_optimization": offloaded}, qsr)


def test_deepspeed_sees_one_workers_batch_and_its_clipping_is_said() -> None:
    config = resolve_deepspeed_config({"train_batch_size": 64}, world_size=4, workers=2)
    assert config == {
        "gradient_clipping": 1.0,
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 1,
    }
    assert resolve_deepspeed_config({"train_batch_size": 4, "gradient_clipping": 0.0}, 4, 4)["gradient_clipping"] == 0
    with pytest.raises(ConfigError, match="train_batch_size is '64'"):
        resolve_deepspeed_config({"train_batch_size": "64"}, 4, 2)


# ------------------------------------------------------------------------------------------------------ recipes

RECIPE: dict[str, Any] = {
    "model": {"name": "timm/vit_tiny_patch16_224"},
    "data": {"shards": "somewhere", "image_size": 16},
    "batch": {"train_batch_size": 64},
    "optimizer": {"type": "SGD", "momentum": 0.9},
    "qsr": {"strategy": "qsr", "alpha": 0.01, "lr": {"schedule": "cosine", "peak": 0.1, "warmup_epochs": 2}},
    "epochs": 10,
}


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_recipe_extends_another_and_is_overridden(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", RECIPE)
    middle = {"extends": "base.yaml", "qsr": {"h_base": 4}, "seed": 1}
    write(tmp_path, "middle.yaml", middle)
    path = write(tmp_path, "leaf.yaml", {"extends": "middle.yaml", "optimizer": {"momentum": 0.5}})
    recipe = load_recipe(path, ["qsr.alpha=1e-2", "qsr.lr.peak=0.2", "data.augment=crop", "logging.every=7"])
    assert recipe.qsr.h_base == 4
    assert recipe.seed == 1
    assert recipe.optimizer.momentum == 0.5
    assert recipe.optimizer.type == "SGD"
    assert recipe.qsr.lr.peak == 0.2
    assert recipe.qsr.alpha == 0.01
    assert recipe.data.augment == "crop"
    assert recipe.logging.name == "leaf"
    assert recipe.logging.every == 7


def test_epochs_become_steps_and_the_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "a.yaml", RECIPE))
    assert load_recipe(write(tmp_path, "my recipé (2).yaml", RECIPE)).logging.name == "my-recipé-2-"
    resolved = resolve_recipe(recipe, samples=6500)  # 101 steps an epoch, 36 samples left over
    assert resolved.epochs is None
    assert resolved.qsr.total_steps == 1010
    assert resolved.qsr.lr.warmup_steps == 202
    again = load_recipe(write(tmp_path, "resolved.yaml", dump_recipe(resolved)))
    assert again == resolved
    assert resolve_recipe(again, samples=6500) == resolved


def test_evaluations_in_epochs(tmp_path: Path) -> None:
    def resolved(samples: int, **keys: Any) -> Recipe:
        raw = {**RECIPE, "logging": {**RECIPE.get("logging", {}), **keys}}
        return resolve_recipe(load_recipe(write(tmp_path, "a.yaml", raw)), samples=samples)

    recipe = resolved(6500, eval_every_epochs=2)
    assert (recipe.logging.eval_every, recipe.logging.eval_every_epochs) == (202, None)
    with pytest.raises(ConfigError, match=r"logging\.eval_every_epochs and logging\.eval_every are both given"):
        resolved(6500, eval_every_epochs=2, eval_every=5)
    with pytest.raises(ConfigError, match=r"eval_every_epochs is 0\.001, and an epoch has 101 steps; write at least"):
        resolved(6500, eval_every_epochs=0.001)


def test_switch_and_decay_in_epochs(tmp_path: Path) -> None:
    raw = {**RECIPE, "qsr": {"strategy": "swap", "switch_epoch": 2.5, "lr": {"schedule": "step", "peak": 0.1}}}
    raw["qsr"]["lr"]["decay_epochs"] = [3, 6]
    resolved = resolve_recipe(load_recipe(write(tmp_path, "a.yaml", raw)), samples=6400)
    assert (resolved.qsr.switch_step, resolved.stop_at_step, resolved.last_step) == (250, None, 1000)
    resolved = resolve_recipe(load_recipe(tmp_path / "a.yaml", ["stop_at_epoch=2.5"]), samples=6400)
    assert (resolved.qsr.total_steps, resolved.stop_at_step, resolved.last_step) == (1000, 250, 250)
    assert resolved.qsr.lr.decay_steps == [300, 600]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("qsr.alpha=-1", "qsr.alpha: found -1"),
        ("qsr.alhpa=1", "qsr.alhpa: unknown key; did you mean 'alpha'?"),
        ("qsr.lr.warmup_epoch=1", "qsr.lr.warmup_epoch: unknown key; did you mean 'warmup_epochs'?"),
        ("optimzer.type=SGD", "optimzer: unknown key; did you mean 'optimizer'?"),
        ("model.name=resnet50", "model.name: found 'resnet50'"),
        ("precision.dtype=fp8", "precision.dtype: found 'fp8'"),
        ("precision.zero_stage=4", "precision.zero_stage: found 4"),
        ("precision.dtype=fp16", "precision.dtype is 'fp16' and precision.zero_stage is 0"),
        (
            "optimizer={type: AdamW, momentum: 0.9}",
            "optimizer: momentum is 0.9, which SGD and Muon read, and type is 'AdamW'; write 0.0, or type SGD or Muon",
        ),
        (
            "optimizer.betas=[0.9, 0.99]",
            "optimizer: betas is [0.9, 0.99], which AdamW and Muon read, and type is 'SGD'",
        ),
        ("optimizer.eps=1e-6", "optimizer: eps is 1e-06, which AdamW and Muon read"),
        (
            "optimizer={type: Muon, momentum: 0.95, nesterov: true}",
            "optimizer: nesterov is True, which SGD reads, and type is 'Muon'; write False, or type SGD",
        ),
        ("optimizer={type: Muon}", "optimizer: type is 'Muon' and momentum is 0; write a momentum such as 0.95"),
        (
            "optimizer={type: Muon, momentum: 0.95}",
            "optimizer.type is 'Muon' and the engine is 'deepspeed', whose ZeRO stages give an optimizer flat parts",
        ),
        ("optimizer={type: AdamW, betas: [0.9, 1.0]}", "optimizer.betas.1: found 1.0; input should be less than 1"),
        ("optimizer={type: SGD, nesterov: true}", "optimizer: nesterov is true and momentum is 0"),
        ("precision={dtype: bf16, autocast: bf16}", "precision: autocast is 'bf16' and dtype is 'bf16'"),
        ("fsdp.compile=true", "fsdp.compile is true, and the engine 'deepspeed' does not read it"),
        ("seed=99999999999999999999", "seed: found 99999999999999999999"),
        ("logging.name=..", "logging.name: found '..'"),
        ("qsr.total_steps=5", "found both of epochs and qsr.total_steps"),
        ("epochs=null", "found neither of epochs and qsr.total_steps"),
        ("logging.name=a/b", "logging.name: found 'a/b'"),
        ("seed", "--set seed: write key.path=value"),
        ("seed.x.y=1", "--set seed.x.y=1: seed is not a block"),
        ("seed={", "--set seed={: the value is not YAML"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, change: str, words: str) -> None:
    path = write(tmp_path, "a.yaml", {**RECIPE, "seed": 0})
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, [change])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qsr.lr.warmup_epochs": 11}, "lr.warmup_steps is 1100 and total_steps is 1000"),
        ({"qsr.lr.warmup_steps": 5}, "warmup_epochs and qsr.lr.warmup_steps are both given"),
        ({"batch.train_batch_size": 6401}, "fewer than one batch"),
        ({"stop_at_epoch": 10.01}, "stop_at_epoch is 10.01, after step 1001, and qsr.total_steps is 1000"),
        ({"stop_at_step": 1001}, "stop_at_step is 1001, and qsr.total_steps is 1000"),
        ({"stop_at_epoch": 0.001}, "stop_at_epoch is 0.001, and an epoch has 100 steps; write at least one step"),
        ({"stop_at_epoch": 1, "stop_at_step": 100}, "stop_at_epoch and stop_at_step are both given"),
    ],
)
def test_impossible_durations_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    recipe = load_recipe(write(tmp_path, "a.yaml", RECIPE), [f"{key}={value}" for key, value in changes.items()])
    with pytest.raises(ConfigError) as caught:
        resolve_recipe(recipe, samples=6400)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "the key 'a' is given twice"),
        ("a: [", "not a YAML file"),
        ("- 1", "a mapping of blocks"),
        ("", "a mapping of blocks"),
        ("extends: [1]", "extends: found [1]"),
        ("a: &x {b: 1}\nc: *x", "the alias *x is not read here"),
        ("extends: missing.yaml", "cannot read this recipe"),
        ("extends: a.yaml", "a.yaml: recipes extend one another in a circle"),
        ("qsr: [1]", "qsr: found [1]; this is a block of keys, so write a mapping"),
        ("!!python/object/apply:os.system ['true']", "not a YAML file"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, "a.yaml", text))
    assert words in str(caught.value)
    assert "instance of" not in str(caught.value)  # no words of pydantic about classes


def test_a_recipe_for_the_other_engine_says_what_to_change(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", {**RECIPE, "precision": {"zero_stage": 2}})
    with pytest.raises(ConfigError, match=r"precision.zero_stage is 2 and the engine is 'fsdp'"):
        load_recipe(path, ["engine=fsdp"])
    with pytest.raises(ConfigError, match=r"precision.autocast is 'fp16' and the engine is 'fsdp'"):
        load_recipe(path, ["engine=fsdp", "precision={autocast: fp16}"])
    load_recipe(path, ["engine=fsdp", "precision.zero_stage=0", "precision.autocast=bf16", "fsdp.compile=true"])


def test_a_default_that_is_written_down_is_never_refused(tmp_path: Path) -> None:
    """A resolved recipe holds every key, also those that its strategy, optimizer and engine do not read."""
    strategies: list[dict[str, Any]] = [
        {"strategy": "parallel"},
        {"strategy": "constant", "alpha": 0.01, "power": 3.0},
        {"strategy": "qsr"},
    ]
    for qsr, optimizer, engine in zip(
        strategies, ["AdamW", "SGD", "AdamW"], ["fsdp", "deepspeed", "fsdp"], strict=True
    ):
        raw = {**RECIPE, "qsr": {**RECIPE["qsr"], **qsr}, "optimizer": {"type": optimizer}, "engine": engine}
        resolved = resolve_recipe(load_recipe(write(tmp_path, "a.yaml", raw)), samples=6400)
        again = load_recipe(write(tmp_path, "b.yaml", dump_recipe(resolved)), ["logging.name=a"])
        assert resolve_recipe(again, samples=6400) == again == resolved


def test_paths_hold_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user writes one recipe for several hosts. The resolved recipe says what was meant here."""
    monkeypatch.setenv("DATA", "/data/of-this-host")
    monkeypatch.setenv("BASES", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    data = {**RECIPE["data"], "shards": "${DATA}/train", "cache_dir": "${DATA}-$DATA"}
    write(tmp_path, "base.yaml", {**RECIPE, "data": data, "logging": {"dir": "${NOWHERE}/runs"}})
    path = write(tmp_path, "one.yaml", {"extends": "${BASES}/base.yaml"})
    recipe = load_recipe(path, ["logging.dir=${DATA}/runs"])
    assert (recipe.data.shards, recipe.data.cache_dir) == ("/data/of-this-host/train", "/data/of-this-host-$DATA")
    assert recipe.run_dir == Path("/data/of-this-host/runs/one")
    assert load_recipe(write(tmp_path, "resolved.yaml", dump_recipe(recipe))) == recipe
    with pytest.raises(ConfigError, match=r"one.yaml: logging.dir is '\$\{NOWHERE\}/runs', and .* NOWHERE is not set"):
        load_recipe(path)
    assert load_recipe(path, places=False).logging.dir == "${NOWHERE}/runs", "a plan needs no folder of a run"
    for key, value, words in (
        ("data.shards", "${DATA/x", "found '${DATA/x'; write ${NAME}"),
        ("data.shards", "x/${DATA", "found 'x/${DATA'; write ${NAME}"),
        ("data.cache_dir", "${}/x", "found '${}/x'; write ${NAME}"),
        ("data.shards", "${EMPTY}/x", "EMPTY is empty"),
    ):
        monkeypatch.setenv("EMPTY", "")
        with pytest.raises(ConfigError, match=re.escape(words)):
            load_recipe(path, ["logging.dir=runs", f"{key}={value}"])


def test_a_circle_of_recipes_is_named_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, "a.yaml", "extends: a.yaml"))
    assert "cannot read" not in str(caught.value)


def test_the_recipes_of_this_repository_are_right() -> None:
    folder = Path(__file__).parents[3] / "configs"
    variants = [path for path in folder.glob("*.yaml") if path.stem != "digits"]
    assert len(variants) >= 3
    for path in variants:
        resolved = resolve_recipe(load_recipe(path), samples=1437)
        if path.stem.startswith("digits-"):
            assert resolved.qsr.strategy == path.stem.split("-")[1]
