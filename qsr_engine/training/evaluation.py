"""Evaluation on the averaged parameters: what the task measures, and how sharp the minimum is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.config.recipe import PrecisionConfig, Recipe
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.device import on_device
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.training.batches import warn_of
from qsr_engine.training.from_recipe import Engine, autocast
from qsr_engine.training.make_task import make_task
from qsr_engine.training.sharpness import largest_eigenvalue
from qsr_engine.training.task import Task

ModelIsRead = Callable[[], AbstractContextManager[None]]


class Evaluation:
    """Evaluates a recipe's model in all ranks together.

    Args:
        size: samples in a batch.
        moved: called for every batch.
        model_is_read: entered while the averaged model is used.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        task: Task,
        size: int,
        moved: Callable[[], None],
        model_is_read: ModelIsRead,
    ) -> None:
        self._model_is_read = model_is_read
        self._recipe, self._engine, self._task, self._size, self._moved = recipe, engine, task, size, moved
        place = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "batch_size": size}
        self._loader = EvalLoader(recipe.data.shards, task.index, recipe.data, **place)
        self._best: dict[str, Any] = {}  # as Task.best() gives it

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best = dict(state.get("best", {}))  # an older checkpoint has none

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """What the task measures over the whole evaluation split, its best so far, and the sharpness where the recipe
        asks for it, by the names of a Record's fields.

        Every rank must call it, after the same step.
        """
        engine = self._engine
        totals = torch.zeros((), dtype=torch.float64, device=engine.device)
        with engine.averaged(), self._model_is_read():
            engine.eval()
            for loaded in self._batches():
                self._moved()
                inputs, targets = self._task.batch(loaded)
                with autocast(self._recipe, engine.device):
                    outputs = engine.module(inputs)
                totals = totals + self._task.totals(outputs, targets).double()
        dist.all_reduce(totals)
        engine.train()
        evaluated: dict[str, Any] = self._task.evaluation(totals.tolist())
        self._best = dict(self._task.best(evaluated, self._best, engine.local_steps.step))
        evaluated |= self._best
        if self._recipe.logging.sharpness_samples:
            evaluated["sharpness"] = self._sharpness(self._recipe.logging.sharpness_samples)
        return evaluated

    def _batches(self) -> Iterator[ImageBatch]:
        """Batches of this rank; one that has a batch fewer than others gets a sample that does not count at the end.

        Where the ranks of a worker hold the parameters together, every forward of one needs one of the others.
        """
        seen, device = 0, self._engine.device
        for loaded in on_device(self._loader, device):
            warn_of(loaded.skipped)
            seen += 1
            yield loaded
        for _ in range(seen, self._loader.most_batches):
            yield self._task.blank(device)

    def _sharpness(self, samples: int) -> float:
        """The sharpness of the averaged model on samples without augmentation, on rank 0; the others wait for it."""
        state = self._engine.averaged_state_dict()
        value = math.nan
        if dist.get_rank() == 0:
            data = self._recipe.data.model_copy(
                update={"augment": "none", "randaugment": None, "loader_processes": 0, "mixup": 0.0}
            )
            plain = {"data": data, "precision": PrecisionConfig(), "label_smoothing": 0.0}
            task = make_task(self._recipe.model_copy(update=plain), self._task.index)
            with torch.random.fork_rng(devices=[]):  # of the initial parameters, which are not used
                model = task.create_model()
            model.load_state_dict(state)
            device, size = self._engine.device, min(samples, self._size)
            loader = TrainLoader(data.shards, task.index, data, rank=0, ranks=1, batch_size=size, seed=0)
            batches = [task.batch(loaded) for loaded in islice(loader.batches(device=device), max(1, samples // size))]

            def loss(outputs: Any, targets: Tensor) -> Tensor:
                self._moved()
                return task.loss(outputs, targets)

            value = largest_eigenvalue(model.to(device).eval(), batches, loss)
        dist.barrier()
        return value
