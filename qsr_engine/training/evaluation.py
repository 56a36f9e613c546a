"""Evaluation on the averaged parameters: accuracy, loss, and how sharp the minimum is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from qsr_engine.config.recipe import Recipe
from qsr_engine.data import Index
from qsr_engine.data.device import Normalise, on_device
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.training.batches import warn_of
from qsr_engine.training.from_recipe import DTYPES, Engine, autocast
from qsr_engine.training.models import create_model
from qsr_engine.training.sharpness import largest_eigenvalue

ModelIsRead = Callable[[], AbstractContextManager[None]]


class Evaluation:
    """Evaluates a recipe's model in all ranks together.

    Args:
        size: pictures in a batch.
        moved: called for every batch.
        model_is_read: entered while the averaged model is used.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        index: Index,
        size: int,
        moved: Callable[[], None],
        model_is_read: ModelIsRead,
    ) -> None:
        self._model_is_read = model_is_read
        self._recipe, self._engine, self._index, self._size, self._moved = recipe, engine, index, size, moved
        place = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "batch_size": size}
        self._loader = EvalLoader(recipe.data.shards, index, recipe.data, **place)
        self._normalise = Normalise(engine.device, DTYPES[recipe.precision.dtype])
        self._best: dict[str, Any] = {}  # best_accuracy and best_step, as a Record has them

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best = dict(state.get("best", {}))  # an older checkpoint has none

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Accuracies (%) and loss over the whole evaluation split, the best accuracy so far, and the sharpness where
        the recipe asks for it, by the names of a Record's fields.

        Every rank must call it, after the same step.
        """
        engine = self._engine
        # samples, right ones, those right among the first five, summed loss
        totals = torch.zeros(4, dtype=torch.float64, device=engine.device)
        classes = 0
        with engine.averaged(), self._model_is_read():
            engine.eval()
            for images, labels in self._batches():
                self._moved()
                with autocast(self._recipe, engine.device):
                    scores = engine.module(self._normalise(images)).float()
                classes = scores.shape[1]
                right = (scores.argmax(1) == labels).sum()
                among_five = (scores.topk(min(5, classes)).indices == labels[:, None]).sum()
                loss = F.cross_entropy(scores, labels, reduction="sum", ignore_index=-1)
                totals += torch.stack([(labels >= 0).sum(), right, among_five, loss]).double()
        dist.all_reduce(totals)
        engine.train()
        samples, *right_ones, loss = totals.tolist()
        accuracy, top5 = (100 * count / max(1, samples) for count in right_ones)
        if accuracy > self._best.get("best_accuracy", -1.0):
            self._best = {"best_accuracy": accuracy, "best_step": engine.local_steps.step}
        evaluated = {"eval_accuracy": accuracy, "eval_loss": loss / max(1, samples), **self._best}
        if classes > 5:  # else it is 100
            evaluated["eval_top5_accuracy"] = top5
        if self._recipe.logging.sharpness_samples:
            evaluated["sharpness"] = self._sharpness(self._recipe.logging.sharpness_samples)
        return evaluated

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this rank; one that has a batch fewer than others gets a picture that does not count at the end.

        Where the ranks of a worker hold the parameters together, every forward of one needs one of the others.
        """
        seen, device = 0, self._engine.device
        for images, labels, skipped in on_device(self._loader, device):
            warn_of(skipped)
            seen += 1
            yield images, labels
        size = self._recipe.data.image_size
        for _ in range(seen, self._loader.most_batches):
            yield torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device), torch.tensor([-1], device=device)

    def _sharpness(self, samples: int) -> float:
        """The sharpness of the averaged model on pictures without augmentation, on rank 0; the others wait for it."""
        state = self._engine.averaged_state_dict()
        value = math.nan
        if dist.get_rank() == 0:
            plain = {"augment": "none", "randaugment": None, "loader_processes": 0}
            data = self._recipe.data.model_copy(update=plain)
            with torch.random.fork_rng(devices=[]):  # of the initial parameters, which are not used
                model = create_model(self._recipe.model, self._index.class_count, data.image_size)
            model.load_state_dict(state)
            device, size = self._engine.device, min(samples, self._size)
            loader = TrainLoader(data.shards, self._index, data, rank=0, ranks=1, batch_size=size, seed=0)
            normalise = Normalise(device, torch.float32)
            batches = [
                (normalise(batch.images), batch.labels)
                for batch in islice(loader.batches(device=device), max(1, samples // size))
            ]

            def loss(scores: Tensor, labels: Tensor) -> Tensor:
                self._moved()
                return F.cross_entropy(scores, labels)

            value = largest_eigenvalue(model.to(device).eval(), batches, loss)
        dist.barrier()
        return value
