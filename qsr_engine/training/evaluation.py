"""Evaluation on the averaged parameters: accuracy, loss, and how sharp the minimum is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from qsr_engine.config.recipe import Recipe
from qsr_engine.data import Index
from qsr_engine.data.device import Normalise, on_device
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.training.batches import warn_of
from qsr_engine.training.from_recipe import DTYPES, Engine
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

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Accuracy (%) and loss over the whole evaluation split, and the sharpness where the recipe asks for it.

        Every rank must call it, on a boundary.
        """
        engine = self._engine
        engine.local_steps.wait()
        if self._recipe.batch_norm is None:
            engine.local_steps.boundary.buffers.average()
        totals = torch.zeros(3, dtype=torch.float64, device=engine.device)  # samples, right ones, summed loss
        with self._model_is_read():
            engine.eval()
            for images, labels in self._batches():
                self._moved()
                scores = engine.module(self._normalise(images)).float()
                right = (scores.argmax(1) == labels).sum()
                loss = F.cross_entropy(scores, labels, reduction="sum", ignore_index=-1)
                totals += torch.stack([(labels >= 0).sum(), right, loss]).double()
        dist.all_reduce(totals)
        engine.train()
        samples, right, loss = totals.tolist()
        evaluated = {"eval_accuracy": 100 * right / max(1, samples), "eval_loss": loss / max(1, samples)}
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
            plain = {"augment": "none", "randaugment": None, "loader_processes": 0, "decoder": "cpu"}
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
