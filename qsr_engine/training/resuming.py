"""Going on with a run: on how many ranks, with the same recipe, from its newest whole checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsr_engine.checkpoint.find import any_here, find_alone
from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.together import gathered
from qsr_engine.config.batch import Batch
from qsr_engine.config.digest import differences
from qsr_engine.config.may_differ import that_matter
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_batch import batch_on_other_ranks, resolve_recipe_batch
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.records.run_folder import CHECKPOINTS, RECIPE
from qsr_engine.training.from_recipe import Engine


def batch_for(recipe: Recipe, ranks: int, *, resume: bool) -> Batch:
    """Batch sizes for so many ranks; rank 0 says so where they are others than before.

    Raises:
        ConfigError: as resolve_recipe_batch() and batch_on_other_ranks().
    """
    if not resume:
        return resolve_recipe_batch(recipe, ranks)
    try:
        _, manifest = find_alone(recipe.run_dir / CHECKPOINTS)
    except CheckpointError:  # of this host; engine.load_checkpoint() says what is wrong, and on which
        return resolve_recipe_batch(recipe, ranks)
    then = int(manifest.layout["workers"]) * int(manifest.layout["worker_size"])
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    old = Batch(*(int(manifest.config[key]) for key in sizes))
    batch = batch_on_other_ranks(recipe, ranks, old)
    if then != ranks and os.environ.get("RANK") == "0":
        warnings.warn(
            f"the run goes on with {ranks} ranks instead of {then}: a step has {batch.train} samples "
            f"({old.train} before), {batch.micro} in a micro-batch and {batch.accumulation} micro-batches on every "
            "rank; the learning rate and H are functions of the step, and stay",
            stacklevel=2,
        )
    return batch


def check_same_recipe(recipe: Recipe) -> None:
    """Compare a recipe with the one that the run in its folder was begun with.

    What may differ: where things are, how often something is written, and what another number of ranks needs.

    Raises:
        ConfigError: something else differs; every difference is named.
    """
    path = recipe.run_dir / RECIPE
    if not path.exists():
        return
    found = differences(load_recipe(path).model_dump(), recipe.model_dump())
    lines = [f"  {key} was {then!r} and is {now!r}" for key, then, now in that_matter(found, "resume")]
    if lines:
        raise ConfigError(
            f"{recipe.run_dir}: the recipe is not the one that this run was begun with:\n" + "\n".join(lines) + "\n"
            "Resume it with the same recipe, or begin another run with `--set logging.name=NAME`"
        )


def load_newest(engine: Engine, recipe: Recipe, data: str) -> dict[str, Any] | None:
    """Go on from the newest whole checkpoint. Returns what this rank saved in it; None if there is none."""
    folder = recipe.run_dir / CHECKPOINTS
    if not any(gathered(any_here(folder))):
        return None
    _, client = engine.load_checkpoint(folder)
    client = client or {}
    check_same_data(folder, client, data)
    step = engine.local_steps.step
    if step > recipe.last_step:
        raise ConfigError(
            f"{folder}: the newest checkpoint is of step {step}, and stop_at_step is {recipe.last_step}; write a later "
            "step, or null (`--set stop_at_step=null`)"
        )
    return client


def check_same_data(folder: Path, client: Mapping[str, Any], data: str) -> None:
    """Raises ConfigError if a checkpoint, in which a rank saved this, is of other data."""
    if client.get("data", data) != data:
        raise ConfigError(
            f"{folder}: the run was trained on other data (the index of its shards differs); give it the same, or "
            "begin another run with `--set logging.name=NAME`"
        )
