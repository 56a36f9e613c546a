"""Configuration: what is refused, with which words, and what a recipe becomes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from qsr_engine.config.batch import check_world_size, resolve_batch
from qsr_engine.config.deepspeed import check_supported, resolve_deepspeed_config, split_deepspeed_config
from qsr_engine.config.digest import digest
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe import Recipe, RecipeQSR
from qsr_engine.config.recipe_file import dump_recipe, load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError, submodel, validate

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
        ({"averaging": {"two_level": "yes"}}, ["qsr.averaging.two_level", "found 'yes'", "'auto'"]),
        ({"averaging": {"wire_dtype": "fp31"}}, ["qsr.averaging.wire_dtype", "found 'fp31'", "'int8'"]),
        (
            {"averaging": {"state": ["exp_avg"], "overlap": "delayed", "delay_steps": 1}},
            ["qsr.averaging", "the state would be averaged steps before the parameters"],
        ),
        ({"on_other_workers": "sum"}, ["qsr.on_other_workers", "'mean' or 'fresh'"]),
        ({"outer": {"lr": 0.7, "nesterov": True}}, ["qsr.outer: nesterov is true and momentum is 0"]),
        ({"outer": {"lr": 0.7, "momentum": 1}}, ["qsr.outer.momentum", "less than 1"]),
        ({"outer": {"lr": 0.7, "speed": 1}}, ["qsr.outer.speed: unknown key"]),
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


def test_contradicting_batch_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size is 60, but .* 16 x .* 1 x 4 ranks is 64"):
        resolve_batch(4, train_batch_size=60, micro_batch_size=16, accumulation=1)
    with pytest.raises(ConfigError, match="train_batch_size is 3"):
        resolve_batch(4, train_batch_size=3, micro_batch_size=None, accumulation=None)
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
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is enabled"),
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


def test_switch_and_decay_in_epochs(tmp_path: Path) -> None:
    raw = {**RECIPE, "qsr": {"strategy": "swap", "switch_epoch": 2.5, "lr": {"schedule": "step", "peak": 0.1}}}
    raw["qsr"]["lr"]["decay_epochs"] = [3, 6]
    resolved = resolve_recipe(load_recipe(write(tmp_path, "a.yaml", raw)), samples=6400)
    assert resolved.qsr.switch_step == 250
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
        assert resolved.qsr.strategy == path.stem.split("-")[1]


def test_every_key_is_documented() -> None:
    """And nothing else: configs/README.md lists the keys of the models."""
    text = (Path(__file__).parents[3] / "configs" / "README.md").read_text()
    recipe, block = text.split("## The `qsr` block")

    def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name in model.model_fields:
            inner = submodel(model, name)
            yield from keys(inner, f"{prefix}{name}.") if inner and name != "qsr" else [prefix + name]

    def documented(part: str) -> set[str]:
        cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
        return {key for cell in cells for key in re.findall(r"`([\w.]+)`", cell)}

    epochs = set(re.findall(r"`([\w.]+)`", block.rpartition("durations in epochs")[2]))
    assert documented(recipe) == set(keys(Recipe))
    assert documented(block) == set(keys(QSRConfig))
    assert documented(block) | epochs == set(keys(RecipeQSR))
