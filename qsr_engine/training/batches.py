"""The batches that a rank trains on, as the model reads them, and their place in the data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from qsr_engine.config.batch import Batch, Part
from qsr_engine.config.recipe import Recipe
from qsr_engine.data import DataError, Index
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.loader import TrainLoader
from qsr_engine.data.own_loader import OwnLoader
from qsr_engine.membership.facts import check_agreement
from qsr_engine.training.figures import Clock
from qsr_engine.training.task import Batch as Pair
from qsr_engine.training.task import Task


class Batches:
    """What a task's model reads and is compared with, one micro-batch after another.

    A rank's stream goes on where the samples seen so far would end if this many ranks had seen them: with the same
    ranks exactly where it was. With others an epoch is whole again from the next one on. Members that keep the samples
    of a step have a stream a micro-batch in place of one a rank: whoever is there takes over those of who has left, and
    nothing comes twice.

    Args:
        step: optimizer steps done, where a checkpoint does not say how many samples these had.
        clock: gets the seconds of waiting for data.
    """

    def __init__(
        self, recipe: Recipe, task: Task, batch: Batch, device: torch.device, *, step: int, clock: Clock
    ) -> None:
        self._recipe, self._micro = recipe, batch.micro
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._count, self._turn = 1, 0  # streams of this rank; how many of them have given their batch of this turn
        self._own = self._loader = None
        self._task, self._device, self.clock = task, device, clock
        if recipe.data.loader is None:
            self._loader = self._make_loader()
        else:
            self._own = _own_loader(recipe, task.index, self._place(), device)
        self._stream: Iterator[ImageBatch] | None = None
        self._at = 0  # micro-batches of each of this rank's streams that are before where it stands
        self.samples_seen = step * batch.train  # training samples of all ranks, also other ranks before a resumption
        self.skipped: set[str] = set()  # bad samples of this rank

    def _place(self) -> dict[str, int]:
        return {"rank": self._rank, "ranks": self._ranks, "batch_size": self._micro}

    def _make_loader(self) -> TrainLoader:
        data, place = self._recipe.data, self._place()
        return TrainLoader(data.shards, self._task.index, data, seed=self._recipe.seed, streams=self._count, **place)

    @property
    def _together(self) -> int:
        """Samples in a micro-batch of each of all streams."""
        return self._micro * self._ranks

    def take_place(self, part: Part, rank: int) -> None:
        """From the next micro-batch on, which is the first of a step, this rank of a member has its streams of a part:
        they go on as after a resumption with so many of them. A member that fell behind may have had the same ones, at
        an earlier place."""
        place = (part.first + rank * part.count, part.streams, part.count)
        stands = self._stream is None or self._at == self._turns
        if stands and place == (self._rank, self._ranks, self._count):
            return
        self._rank, self._ranks, self._count = place
        self._turn = 0
        self._loader = self._make_loader()
        if self._stream is not None:
            close = getattr(self._stream, "close", None)
            if close is not None:
                close()
            self._stream = None

    @property
    def _turns(self) -> int:
        """Micro-batches that every stream has given when so many samples have been seen."""
        return self.samples_seen // self._together

    def state_dict(self) -> dict[str, Any]:
        state = {"images_seen": self.samples_seen, "skipped_samples": sorted(self.skipped)}
        return state if self._own is None else {**state, "own_loader": self._own.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before the first batch."""
        self.samples_seen = int(state.get("images_seen", self.samples_seen))
        self.skipped = set(state.get("skipped_samples", ()))
        if self._own is not None and self.samples_seen:
            self._own.load_state_dict(state.get("own_loader"))

    def next(self) -> Pair:
        """The next one, as the task makes it."""
        if self._stream is None:
            self._stream = self._begin()
        started = time.perf_counter()
        batch = next(self._stream)
        self.clock.data += time.perf_counter() - started
        warn_of(batch.skipped)
        self.skipped.update(batch.skipped)
        self._turn = (self._turn + 1) % self._count
        if self._turn == 0:
            self.samples_seen += self._together
            self._at += 1
        return self._task.training_batch(batch)

    def _begin(self) -> Iterator[ImageBatch]:
        if self._own is not None:
            return self._own.batches(self._device)
        assert self._loader is not None
        self._at = self._turns
        return self._loader.batches(self._at * self._count, self.skipped, self._device)


def _own_loader(recipe: Recipe, index: Index, place: dict[str, int], device: torch.device) -> OwnLoader:
    """The recipe's own loader, which every rank has, with as many batches.

    Raises:
        DataError, AgreementError: on every rank.
    """
    assert index.class_count is not None
    said: str | int | None
    failed = None
    try:
        own = OwnLoader(recipe.data, classes=index.class_count, seed=recipe.seed, **place)
        said = own.batches_of_a_pass
    except DataError as error:
        said, failed = str(error), error
    check_agreement({"batches of data.loader on every pass": said}, device)
    if failed is not None:
        raise failed
    return own


def warn_of(skipped: Sequence[str]) -> None:
    """Say which bad samples a batch has left out."""
    for text in skipped:
        warnings.warn(f"skipped: {text}", stacklevel=3)  # Python shows the same text once
