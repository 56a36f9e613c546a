"""The loaders of `engine.deepspeed_io` and of `training_data=`: every pass in another order, resumed where it was.

DeepSpeed's own gives every epoch the order of the first, and begins at its start after a resume.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from torch.utils.data import DistributedSampler


class DividedSampler(DistributedSampler[Any]):
    """The samples of this rank, in another order in every pass where they are shuffled.

    `pass_` is the number of the next pass, `skip` the samples of this rank that it leaves out at its start.
    """

    def __init__(self, dataset: Any, *, shuffle: bool) -> None:
        super().__init__(dataset, dist.get_world_size(), dist.get_rank(), shuffle=shuffle)
        self.pass_ = self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        self.set_epoch(self.pass_)
        indices = list(super().__iter__())[self.skip :]
        self.pass_, self.skip = self.pass_ + 1, 0
        return iter(indices)


class ResumableLoader(DeepSpeedDataLoader):  # type: ignore[misc]  # deepspeed has no types
    """DeepSpeed's loader, which begins a pass when its first batch is asked for."""

    data_sampler: Any
    data: Any

    @classmethod
    def taking_over(cls, loader: DeepSpeedDataLoader) -> ResumableLoader:
        """Turn a loader of DeepSpeed's, which has a DividedSampler, into one of these."""
        loader.__class__ = cls
        taken: ResumableLoader = loader
        return taken

    def __iter__(self) -> ResumableLoader:
        self.data = None
        return self

    def __next__(self) -> Any:
        if self.data is None:
            self._create_dataloader()
        return super().__next__()

    def _create_dataloader(self) -> Any:
        """torch draws a seed for the loader's processes; here it is the pass's own, so that training, whose random
        numbers are those of the process, does not depend on how often it was resumed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed() + self.data_sampler.pass_)
            return super()._create_dataloader()

    def go_to(self, micro_batches: int) -> None:
        """So many have been read since the start of the run, one at every micro-batch."""
        sampler = self.data_sampler
        sampler.pass_, batches = divmod(micro_batches, max(1, len(self)))
        sampler.skip = batches * self.batch_size
        self.data = None


class Loaders:
    """The loaders that one engine has made, for as long as somebody holds them."""

    def __init__(self) -> None:
        self._made: weakref.WeakSet[ResumableLoader] = weakref.WeakSet()
        self._loaded_at = 0  # micro-batches

    def add(self, loader: DeepSpeedDataLoader, micro_batches: int) -> ResumableLoader:
        """A training loader that is made when so many micro-batches have been seen."""
        resumable = ResumableLoader.taking_over(loader)
        if micro_batches == self._loaded_at:  # else it is for what begins now
            resumable.go_to(micro_batches)
        self._made.add(resumable)
        return resumable

    def go_to(self, micro_batches: int) -> None:
        """A checkpoint was loaded."""
        self._loaded_at = micro_batches
        for loader in self._made:
            loader.go_to(micro_batches)
