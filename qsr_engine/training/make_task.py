"""The task that a recipe names."""

from __future__ import annotations

from qsr_engine.config.recipe import Recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import Index
from qsr_engine.training.images import ImageTask
from qsr_engine.training.task import Task
from qsr_engine.training.text import TextTask


def make_task(recipe: Recipe, index: Index) -> Task:
    """The task of a recipe.

    Raises:
        ConfigError: the data are of another task, or their classes or vocabulary do not fit the model.
    """
    if (index.text is not None) != (recipe.task == "text"):
        hold = "text" if recipe.task == "images" else "pictures"
        write = "task: text" if recipe.task == "images" else "shards of `qsr shards text`"
        raise ConfigError(f"task is {recipe.task!r}, and {recipe.data.shards} holds {hold}; write {write}")
    if index.text is not None:
        return TextTask(recipe, index)
    return ImageTask(recipe, index)
