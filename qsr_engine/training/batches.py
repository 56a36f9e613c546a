"""The batches that a rank trains on, as the model reads them, and their place in the data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.config.batch import Batch
from qsr_engine.config.recipe import Recipe
from qsr_engine.data import Index
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.device import MixUp, Normalise
from qsr_engine.data.loader import TrainLoader
from qsr_engine.training.figures import Clock
from qsr_engine.training.from_recipe import DTYPES


class Batches:
    """Pictures and labels or, mixed, shares of classes, one micro-batch after another.

    A rank's stream goes on where the samples seen so far would end if this many ranks had seen them: with the same
    ranks exactly where it was. With others an epoch is whole again from the next one on.

    Args:
        step: optimizer steps done, where a checkpoint does not say how many samples these had.
        clock: gets the seconds of waiting for data.
    """

    def __init__(
        self, recipe: Recipe, index: Index, batch: Batch, device: torch.device, *, step: int, clock: Clock
    ) -> None:
        place = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "batch_size": batch.micro}
        self._loader = TrainLoader(recipe.data.shards, index, recipe.data, seed=recipe.seed, **place)
        self._device, self._clock = device, clock
        self._normalise = Normalise(device, DTYPES[recipe.precision.dtype])
        self._mixup = MixUp(recipe.data.mixup, len(index.classes or ())) if recipe.data.mixup > 0 else None
        self._together = batch.micro * dist.get_world_size()  # samples of all ranks in a micro-batch
        self._stream: Iterator[ImageBatch] | None = None
        self.images_seen = step * batch.train  # training samples of all ranks, also other ranks before a resumption
        self.skipped: set[str] = set()  # bad samples of this rank

    def state_dict(self) -> dict[str, Any]:
        return {"images_seen": self.images_seen, "skipped_samples": sorted(self.skipped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before the first batch."""
        self.images_seen = int(state.get("images_seen", self.images_seen))
        self.skipped = set(state.get("skipped_samples", ()))

    def next(self) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] and labels [B], or shares of classes [B, classes]."""
        if self._stream is None:
            self._stream = self._loader.batches(self.images_seen // self._together, self.skipped, self._device)
        started = time.perf_counter()
        batch = next(self._stream)
        self._clock.data += time.perf_counter() - started
        warn_of(batch.skipped)
        self.skipped.update(batch.skipped)
        self.images_seen += self._together
        images, labels = self._normalise(batch.images), batch.labels
        return (images, labels) if self._mixup is None else self._mixup(images, labels)


def warn_of(skipped: Sequence[str]) -> None:
    """Say which bad samples a batch has left out."""
    for text in skipped:
        warnings.warn(f"skipped: {text}", stacklevel=3)  # Python shows the same text once
