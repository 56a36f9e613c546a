"""What `qsr train --from` refuses before any process starts, with the words that say why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qsr_engine.checkpoint.manifest import Manifest
from qsr_engine.cli.main import main
from qsr_engine.config.batch import Batch
from qsr_engine.config.digest import digest
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import dump_recipe, load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.training.branching import changes_since, find_origin, origin_text, read_origin
from qsr_engine.training.from_recipe import deepspeed_config, fsdp_config
from qsr_engine.training.loop import shared
from tests.support.recipes import small_recipe

BATCH = Batch(96, 48, 1)


def recipe_of(tmp_path: Path, *overrides: str) -> Recipe:
    path = small_recipe(tmp_path, tmp_path / "digits")
    return resolve_recipe(load_recipe(path, overrides), samples=1437)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """As a run leaves it that has saved steps 5 and 8."""
    recipe = recipe_of(tmp_path, "logging.name=old")
    for step in (5, 8):
        folder = recipe.run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file(nn.Linear(3, 2).state_dict(), folder / "model.safetensors")
        Manifest(folder.name, step, float(step), {}, {}, [0], {}).write(folder)
    (recipe.run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    return recipe.run_dir


def test_the_newest_checkpoint_or_one_by_its_tag(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, "logging.name=new")
    newest, earlier = find_origin(str(run), recipe), find_origin(f"{run}/checkpoints/step-00000005", recipe, "mean")
    assert (newest.run, newest.tag, newest.step, newest.optimizers) == (str(run), "step-00000008", 8, "own")
    assert (earlier.tag, earlier.step, earlier.optimizers) == ("step-00000005", 5, "mean")
    monkeypatch.chdir(run.parent)
    assert find_origin("old/", recipe) == find_origin("old/checkpoints", recipe) == newest
    assert read_origin(run) is None
    (tmp_path / "from.json").write_text(origin_text(newest))
    assert read_origin(tmp_path) == newest
    for broken in ("{", '{"run": "old"}', "[]"):
        (tmp_path / "from.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"from.json: cannot be read .*; begin another run with --from"):
            read_origin(tmp_path)


@pytest.mark.parametrize(
    ("place", "overrides", "words"),
    [
        ("nowhere", [], "there is no folder"),
        ("old/checkpoints/step-00000007", [], "write one of step-00000005, step-00000008"),
        ("bare", [], "is no run of `qsr train` (it has no recipe.yaml)"),
        ("unsaved", [], "there is no whole checkpoint here; logging.checkpoint_every and stop_at_step write some"),
        ("old", ["logging.name=old"], "it is the folder of this run itself; go on with it with --resume"),
        ("old", ["qsr.total_steps=8"], "step-00000008 is of step 8, and qsr.total_steps is 8; write an earlier"),
        ("old", ["stop_at_step=6"], "step-00000008 is of step 8, and stop_at_step is 6; write an earlier"),
    ],
)
def test_checkpoints_with_which_no_run_can_begin(
    tmp_path: Path, run: Path, place: str, overrides: list[str], words: str
) -> None:
    for name in ("bare", "unsaved"):
        (run.parent / name).mkdir()
    (run.parent / "unsaved" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(ConfigError) as caught:
        find_origin(str(run.parent / place), recipe_of(tmp_path, "logging.name=new", *overrides))
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"--from {run.parent / place}: ")


def test_what_is_another_is_named_and_another_model_refused(tmp_path: Path, run: Path) -> None:
    recipe = recipe_of(tmp_path, "logging.name=new", "qsr.alpha=0.02", "data.loader_processes=2", "seed=3")
    origin = find_origin(str(run), recipe)
    assert changes_since(origin, recipe, nn.Linear(3, 2)) == {"qsr.alpha": (0.006, 0.02), "seed": (0, 3)}
    model: Any
    for model, words in (
        (nn.Linear(3, 4), ["  bias: [2] there, [4] here", "  weight: [2, 3] there, [4, 3] here"]),
        (nn.Linear(3, 2, bias=False), ["  bias: [2] there, nothing here"]),
        (nn.Sequential(nn.Linear(3, 2)), ["  0.bias: nothing there, [2] here", "  weight: [2, 3] there, nothing here"]),
    ):
        with pytest.raises(ConfigError, match="it is the checkpoint of another model") as caught:
            changes_since(origin, recipe, model)
        assert set(words) <= set(str(caught.value).splitlines())
    for key, other in (("engine", "fsdp"), ("optimizer.type", "SGD")):
        changed = recipe_of(tmp_path, "logging.name=new", f"{key}={other}")
        with pytest.raises(ConfigError, match=rf"{key} was .* and is '{other}', .*--optimizer-states fresh"):
            changes_since(origin, changed, nn.Linear(3, 2))
        anew = dataclasses.replace(origin, optimizers="fresh")
        assert key in changes_since(anew, changed, nn.Linear(3, 2))
    gone = dataclasses.replace(origin, run=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"it begins with the checkpoint \S+ of \S+gone, and that run is not there"):
        changes_since(gone, recipe, nn.Linear(3, 2))
    with_a_buffer = nn.Linear(3, 2)
    with_a_buffer.register_buffer("seen", torch.zeros(1))
    assert changes_since(origin, recipe, with_a_buffer)
    Manifest(origin.tag, 8, 9.0, {}, {}, [0], {}).write(origin.folder)
    with pytest.raises(ConfigError, match="it was written again since this run began with it"):
        changes_since(origin, recipe, nn.Linear(3, 2))


def test_hosts_may_keep_what_a_recipe_names_in_other_places(tmp_path: Path) -> None:
    """As where `${DATA}` is another on each: what ranks compare has no path."""
    here = recipe_of(tmp_path)
    there = recipe_of(tmp_path, "data.shards=/b", "data.cache_dir=/c", "logging.dir=/d")
    assert shared(here) == shared(there) != shared(recipe_of(tmp_path, "data.image_size=9"))
    assert digest(fsdp_config(here, BATCH)) == digest(fsdp_config(there, BATCH))
    assert digest(deepspeed_config(here, BATCH)) == digest(deepspeed_config(there, BATCH))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "old", "--resume"], "--from begins a run, and --resume goes on with one"),
        (["--optimizer-states", "mean"], "--optimizer-states mean is for --from, which is not given"),
    ],
)
def test_options_that_contradict_one_another(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "new.yaml", *words]) == 2
    assert said in capsys.readouterr().err
