"""The recipes for ImageNet in configs/imagenet: what they are, and that their heads say what they send."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_engine.config.recipe import Recipe, resolve_recipe_batch
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.planning.plan import Plan, make_plan
from qsr_engine.training.batch_norm import has_batch_norm
from qsr_engine.training.models import create_model

FOLDER = Path(__file__).parents[3] / "configs" / "imagenet"
PATHS = sorted(FOLDER.glob("*.yaml"))
MODELS = {"vit-b": 300, "resnet152": 200, "resnet50": 90}  # epochs
load = cache(load_recipe)
plan = cache(make_plan)


def head(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith("#")]


def test_every_strategy_and_schedule_has_a_recipe() -> None:
    names = {path.stem for path in PATHS}
    for model, (low, high) in {"vit-b": (4, 8), "resnet152": (2, 4), "resnet50": (2, 4)}.items():
        expected = {f"{model}-constant-h{low}", f"{model}-constant-h{high}", f"{model}-qsr-h{low}"}
        expected |= {model, f"{model}-qsr-h{high}", f"{model}-power1-h{low}", f"{model}-power3-h{low}"}
        expected |= {f"{model}-post-local-h4", f"{model}-swap-h4", f"{model}-linear-qsr-h{low}"}
        expected |= {f"{model}-linear", f"{model}-step", f"{model}-step-qsr-h{low}"}
        assert expected <= names
    assert {"vit-b-b16384-qsr-h4", "resnet152-b16384-qsr-h2"} <= names


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_head_says_how_to_run_it_and_what_it_sends(path: Path) -> None:
    """The share of communication is computed here; `qsr plan RECIPE --write-header` writes it."""
    lines = head(path)
    assert lines[-1] == plan(path).header()
    assert lines[-2] == "# Not run here."
    assert any(line.endswith(f"train configs/imagenet/{path.name}") for line in lines)
    assert path.stem in MODELS or len(path.read_text().splitlines()) - len(lines) <= 4, "a variant is a few lines"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_recipe_is_what_its_name_says(path: Path) -> None:
    recipe, qsr = load(path), plan(path).qsr
    model = next(name for name in MODELS if path.stem == name or path.stem.startswith(f"{name}-"))
    words = path.stem.removeprefix(model).split("-")
    stepwise = {"vit-b": "cosine_step"}.get(model, "step")
    assert recipe.qsr.lr.schedule == {"linear": "linear", "step": stepwise}.get((words[1:2] or [""])[0], "cosine")
    assert recipe.batch.train_batch_size == (16384 if "b16384" in words else 4096)
    steps = MODELS[model] if stepwise != recipe.qsr.lr.schedule or model == "vit-b" else 90
    assert qsr.total_steps == steps * (1_281_167 // recipe.batch.train_batch_size)
    strategies = {"constant": "constant", "qsr": "qsr", "power1": "qsr", "power3": "qsr", "swap": "swap"}
    strategy = next((strategies[word] for word in words if word in strategies), "parallel")
    assert qsr.strategy == ("post_local" if "post" in words else strategy)
    assert qsr.power == {"power1": 1, "power3": 3}.get((words[1:2] or [""])[0], 2)
    if words[-1].startswith("h"):
        assert qsr.h_base == int(words[-1][1:])
    local = qsr.strategy != "parallel"
    assert recipe.optimizer.weight_decay == (1e-4 if model != "vit-b" else 0.05 if local else 0.1)


def test_a_power_is_compared_at_the_same_communication() -> None:
    for model, low in (("vit-b", 4), ("resnet152", 2), ("resnet50", 2)):
        quadratic = plan(FOLDER / f"{model}-qsr-h{low}.yaml").communication_percent
        for power in (1, 3):
            share = plan(FOLDER / f"{model}-power{power}-h{low}.yaml").communication_percent
            assert share == pytest.approx(quadratic, rel=0.01)


def figures(recipe: Recipe, made: Plan) -> list[Any]:
    lr, optimizer = made.qsr.lr, recipe.optimizer
    assert lr is not None
    return [lr.peak, lr.min, lr.warmup_steps, optimizer.type, optimizer.momentum, optimizer.gradient_clipping]


def test_the_papers_settings() -> None:
    """Peak, minimum, warm-up in steps, optimizer, momentum, clipping; written again from the paper's authors' code."""
    for name, expected in {
        "vit-b": [0.008, 1e-6, 10000, "AdamW", 0, 1],
        "vit-b-b16384": [0.016, 1e-6, 2500, "AdamW", 0, 1],
        "resnet152": [0.8, 1e-6, 5 * 312, "SGD", 0.9, 0],
        "resnet152-b16384": [3.2, 1e-6, 5 * 78, "SGD", 0.9, 0],
        "resnet50": [0.8, 1e-6, 5 * 312, "SGD", 0.9, 0],
    }.items():
        assert figures(load(FOLDER / f"{name}.yaml"), plan(FOLDER / f"{name}.yaml")) == expected
    vit, resnet = load(FOLDER / "vit-b-qsr-h4.yaml"), load(FOLDER / "resnet152-qsr-h2.yaml")
    assert (vit.qsr.alpha, resnet.qsr.alpha, load(FOLDER / "resnet152-qsr-h4.yaml").qsr.alpha) == (0.0175, 0.2, 0.25)
    assert vit.data.randaugment is not None
    assert (vit.data.randaugment.operations, vit.data.randaugment.magnitude, vit.data.mixup) == (2, 10, 0.2)
    assert (vit.label_smoothing, resnet.label_smoothing) == (0, 0.1)
    assert resnet.batch_norm is not None
    assert (resnet.batch_norm.batches, resnet.batch_norm.batch_size) == (128, 32)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_takes_the_images(name: str) -> None:
    recipe = load(FOLDER / f"{name}.yaml")
    with torch.device("meta"):
        model = create_model(recipe.model, 1000, recipe.data.image_size)
    assert has_batch_norm(model) == (recipe.batch_norm is not None)


def test_the_micro_batch_of_a_resnet_does_not_depend_on_the_ranks() -> None:
    recipe = load(FOLDER / "resnet152.yaml")
    for ranks in (1, 16, 64):
        batch = resolve_recipe_batch(recipe, ranks)
        assert (batch.train, batch.micro, batch.accumulation) == (4096, 32, 128 // ranks)
