"""The runs of configs/imagenet: what they are, and that its README says it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from configs.imagenet import table
from qsr_engine.cli.main import main
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_batch import resolve_recipe_batch
from qsr_engine.planning.plan import Plan
from qsr_engine.training.batch_norm import has_batch_norm
from qsr_engine.training.models import create_model

PATHS = sorted(table.FOLDER.glob("*.yaml"))
EPOCHS = {"vit-b": 300, "resnet152": 200, "resnet50": 90}
plan = cache(table.plan)


def recipe_of(name: str) -> Recipe:
    made = plan(name).recipe
    assert made is not None
    return made


def test_every_strategy_and_schedule_has_a_run() -> None:
    for model, (low, high) in {"vit-b": (4, 8), "resnet152": (2, 4), "resnet50": (2, 4)}.items():
        expected = {f"{model}-constant-h{low}", f"{model}-constant-h{high}", f"{model}-qsr-h{low}"}
        expected |= {model, f"{model}-qsr-h{high}", f"{model}-power1-h{low}", f"{model}-power3-h{low}"}
        expected |= {f"{model}-post-local-h4", f"{model}-swap-h4", f"{model}-linear-qsr-h{low}"}
        expected |= {f"{model}-linear", f"{model}-step", f"{model}-step-qsr-h{low}"}
        assert expected <= set(table.RUNS)
    assert {"vit-b-b16384-qsr-h4", "resnet152-b16384-qsr-h2"} <= set(table.RUNS)


def test_the_readme_has_every_run_and_what_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m configs.imagenet.table` writes it: a command, averagings %, rounds and the longest round of each."""
    monkeypatch.setattr(table, "plan", plan)
    assert table.README.read_text() == table.readme()
    assert {path.stem for path in PATHS} == {name for name, (_, keys) in table.RUNS.items() if not keys}
    assert all(recipe_of(name).logging.name == name for name in table.RUNS), "so that no run is in another's folder"


def test_a_command_of_the_readme_is_read_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    row = next(line for line in table.README.read_text().splitlines() if line.startswith("| resnet50-step-qsr-h2 |"))
    _, _, command, percent, rounds, longest, _ = (cell.strip() for cell in row.split("|"))
    path, *sets = command.strip("`").split()
    assert main(["plan", str(table.FOLDER / path), *sets, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f"{100 * found['rounds'] / found['total_steps']:.1f}", str(found["rounds"])] == [percent, rounds]
    assert "{length} from step {start_step}".format(**found["longest_round"]) == longest


def test_the_head_says_how_to_run_it() -> None:
    for path in PATHS:
        lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert lines[-1] == "# Not run here."
        assert any(line.endswith(f"train configs/imagenet/{path.name}") for line in lines)
        assert path.stem in EPOCHS or len(path.read_text().splitlines()) - len(lines) <= 4, "a variant is a few lines"


@pytest.mark.parametrize("model", EPOCHS)
def test_a_run_is_what_its_name_says(model: str) -> None:
    for name in (name for name in table.RUNS if f"{name}-".startswith(f"{model}-")):
        recipe, qsr = recipe_of(name), plan(name).qsr
        words = name.removeprefix(model).split("-")
        stepwise = {"vit-b": "cosine_step"}.get(model, "step")
        schedule = {"linear": "linear", "step": stepwise}.get((words[1:2] or [""])[0], "cosine")
        epochs = EPOCHS[model] if schedule != "step" else 90
        strategies = {"constant": "constant", "qsr": "qsr", "power1": "qsr", "power3": "qsr", "swap": "swap"}
        strategy = next((strategies[word] for word in words if word in strategies), "parallel")
        local, vit = qsr.strategy != "parallel", model == "vit-b"
        found = [
            recipe.qsr.lr.schedule,
            recipe.batch.train_batch_size,
            qsr.total_steps,
            qsr.strategy,
            qsr.power,
            qsr.h_base if words[-1].startswith("h") else None,
            recipe.optimizer.weight_decay,
            recipe.optimizer.gradient_clipping,
        ]
        assert found == [
            schedule,
            16384 if "b16384" in words else 4096,
            epochs * (1_281_167 // recipe.batch.train_batch_size),
            "post_local" if "post" in words else strategy,
            {"power1": 1, "power3": 3}.get((words[1:2] or [""])[0], 2),
            int(words[-1][1:]) if words[-1].startswith("h") else None,
            1e-4 if not vit else 0.05 if local else 0.1,
            1 if vit and not local else 0,
        ], name


def test_a_power_is_compared_at_as_many_averagings() -> None:
    for model, low in (("vit-b", 4), ("resnet152", 2), ("resnet50", 2)):
        quadratic = plan(f"{model}-qsr-h{low}").averagings_percent
        for power in (1, 3):
            share = plan(f"{model}-power{power}-h{low}").averagings_percent
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
        assert figures(recipe_of(name), plan(name)) == expected
    vit, resnet = recipe_of("vit-b-qsr-h4"), recipe_of("resnet152-qsr-h2")
    assert (vit.qsr.alpha, resnet.qsr.alpha, recipe_of("resnet152-qsr-h4").qsr.alpha) == (0.0175, 0.2, 0.25)
    assert vit.data.randaugment is not None
    assert vit.data.randaugment.model_dump() == {"kind": "composer", "operations": 2, "magnitude": 10}
    assert vit.data.mixup == 0.2
    assert (vit.label_smoothing, resnet.label_smoothing) == (0, 0.1)
    assert resnet.batch_norm is not None
    assert (resnet.batch_norm.batches, resnet.batch_norm.batch_size) == (128, 32)


@pytest.mark.parametrize("name", EPOCHS)
def test_the_model_takes_the_images(name: str) -> None:
    recipe = recipe_of(name)
    with torch.device("meta"):
        model = create_model(recipe.model, 1000, recipe.data.image_size)
    assert has_batch_norm(model) == (recipe.batch_norm is not None)


def test_the_micro_batch_of_a_resnet_does_not_depend_on_the_ranks() -> None:
    recipe = recipe_of("resnet152")
    for ranks in (1, 16, 64):
        batch = resolve_recipe_batch(recipe, ranks)
        assert (batch.train, batch.micro, batch.accumulation) == (4096, 32, 128 // ranks)
