"""Batches of training and evaluation data for one rank, the same for any number of loader processes.

order        which samples, in which order: positions, no bytes                  (order.py, webdataset's shuffle)
source       the bytes and labels of the samples of one batch                    (sources.py)
decoding     into one block of memory                                            (views.py, decoding.py, batches.py)
ring         the loader processes, each of which does all of this for one batch in P
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
import webdataset as wds

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.batches import ImageBatch, decode_batch
from qsr_engine.data.decoding import Augment, Decoder, Pixels
from qsr_engine.data.device import on_device
from qsr_engine.data.errors import DataError
from qsr_engine.data.gpu_decoding import GPUDecoder, in_thread
from qsr_engine.data.index import Index
from qsr_engine.data.order import epoch_of, plan_epoch, plan_evaluation, seed_for
from qsr_engine.data.ring import Beside, run_here, run_in_processes
from qsr_engine.data.samples import Item, Sample, bad_sample
from qsr_engine.data.sources import Source, make_source
from qsr_engine.data.views import EvalView, TrainView

CPU = torch.device("cpu")
_AHEAD = 8  # batches of a loader process whose shards are fetched before they are needed


class RawBatch(NamedTuple):
    """A batch that has not been read: the seed of its augmentation, its samples, and samples that come after them."""

    seed: int
    items: list[Item]
    spares: list[Item]


class TrainLoader:
    """The training batches of one rank, without end, resumable at any batch.

    Args:
        folder: of the shards, or its URL.
        config: which split, image size, augmentation, shuffle buffer and loader processes.
        batch_size: samples in a micro-batch of this rank.
    Raises:
        DataError: the split is unknown or empty, or the cache cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        index: Index,
        config: DataConfig,
        *,
        rank: int,
        ranks: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.config, self.batch_size = config, batch_size
        self._split = index.split(config.train)
        self._source = make_source(folder, index, config, config.train)
        self._rank, self._ranks, self._seed = rank, ranks, seed
        augment = config.randaugment
        self._decoder = Decoder(
            config.image_size,
            TrainView(config.image_size, config.augment),
            Augment(augment.operations, augment.magnitude) if augment else None,
        )

    def batches(self, start: int = 0, skipped: Iterable[str] = (), device: torch.device = CPU) -> Iterator[ImageBatch]:
        """Yield batches on a device from micro-batch number `start` on, counted from the start of training.

        What is before `start` is neither read nor decoded (a remote shard without a cache is read).

        Args:
            skipped: bad samples that this rank has skipped before `start`, as batches named them; each counts once.
        Raises:
            DataError: a shard or a sample cannot be used, and no more may be skipped.
        """
        produce = _Decode(
            partial(self._raw_batches, start), self._source, self._decoder, self.config.max_bad_samples > 0, True
        )
        batches: Iterator[ImageBatch]
        if self.config.decoder == "gpu":
            decoder = GPUDecoder(self._decoder, device)
            batches = (
                decoder.batch(samples, seed, spares, skip=produce.skip)
                for seed, samples, spares in in_thread(produce.samples(0, 1))
            )
        else:
            batches = on_device(_batches(produce, self.batch_size, self.config), device)
        return _limited(batches, set(skipped), self.config.max_bad_samples, "this rank")

    def items(self, start: int = 0) -> Iterator[Item]:
        """This rank's samples in order, from number `start` of its stream on."""
        epoch, before = epoch_of(start, self._split.samples, self._rank, self._ranks)
        for number in count(epoch):
            yield from islice(self._shuffled(number), before if number == epoch else 0, None)

    def _shuffled(self, epoch: int) -> Iterator[Item]:
        buffer = self.config.shuffle_buffer
        generator = random.Random(seed_for("shuffle", self._seed, epoch, self._rank))
        slices = plan_epoch(self._split, self._seed, epoch, self._rank, self._ranks)
        items = partial(self._source.items, slices)
        return iter(wds.DataPipeline(items, wds.shuffle(buffer, initial=buffer, rng=generator)))

    def _raw_batches(self, start: int) -> Iterator[RawBatch]:
        items, limit = self.items(start * self.batch_size), self.config.max_bad_samples
        # As many as may be bad in an epoch, at its end, and again at the beginning of the next: then one is good, or
        # the limit is exceeded anyway.
        spares = min(2 * limit + 1, self._source.most_spares) if limit else 0
        ahead: deque[Item] = deque()
        for number in count(start):
            ahead.extend(islice(items, self.batch_size + spares - len(ahead)))
            batch = [ahead.popleft() for _ in range(self.batch_size)]
            yield RawBatch(seed_for("augmentation", self._seed, self._rank, number), batch, list(ahead))


class EvalLoader:
    """One rank's part of the evaluation split, once for each iteration and in the order of the index.

    The parts cover every sample exactly once. Sizes differ by at most one sample, the last batch may be short, and a
    rank may have no batch at all: with more ranks than samples, some parts are empty. A bad sample that may be skipped
    has the label -1.
    """

    def __init__(
        self, folder: str | Path, index: Index, config: DataConfig, *, rank: int, ranks: int, batch_size: int
    ) -> None:
        split = index.split(config.eval)
        self.most_batches = -(-split.samples // (ranks * batch_size))  # of any rank; each has this many, or one fewer
        self.batch_size, self.config = batch_size, config
        source = make_source(folder, index, config, config.eval)
        slices = plan_evaluation(split, rank, ranks)
        decoder = Decoder(config.image_size, EvalView(config.image_size))
        raw_batches = partial(_evaluation_batches, partial(source.items, slices), batch_size)
        self._produce = _Decode(raw_batches, source, decoder, config.max_bad_samples > 0, False)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield batches. Raises DataError as TrainLoader.batches(); the limit is one of each evaluation."""
        batches = _batches(self._produce, self.batch_size, self.config)
        return _limited(batches, set(), self.config.max_bad_samples, "this evaluation on this rank")


def _evaluation_batches(items: Callable[[], Iterator[Item]], batch_size: int) -> Iterator[RawBatch]:
    stream = items()
    while batch := list(islice(stream, batch_size)):
        yield RawBatch(0, batch, [])


LoadedBatch = tuple[int, list[Sample | DataError], Iterator[Sample | DataError]]  # seed, samples, spares


@dataclass
class _Decode:
    """Decodes raw batches: p, p + P, p + 2P, ... of them (see ring.Produce)."""

    raw_batches: Callable[[], Iterator[RawBatch]]
    source: Source
    decoder: Decoder
    skip: bool
    replace: bool

    def __call__(self, process: int, processes: int, room: Callable[[], Pixels]) -> Iterator[Beside]:
        for seed, samples, spares in self.samples(process, processes):
            out = room()
            yield decode_batch(samples, self.decoder, seed, out, spares, skip=self.skip, replace=self.replace)

    def samples(self, process: int, processes: int) -> Iterator[LoadedBatch]:
        """The seed and the samples of these batches, read and not decoded; spares are read when they are asked for."""
        for seed, items, spares in self._announced(islice(self.raw_batches(), process, None, processes)):
            yield seed, [self.source.load(item) for item in items], map(self.source.load, spares)

    def _announced(self, batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
        """The batches, each of them announced to the source before the one that is _AHEAD of it is yielded."""
        ahead: deque[RawBatch] = deque()
        for batch in batches:
            for item in batch.items:
                self.source.announce(item)
            ahead.append(batch)
            if len(ahead) > _AHEAD:
                yield ahead.popleft()
        yield from ahead


def _limited(batches: Iterator[ImageBatch], skipped: set[str], limit: int, where: str) -> Iterator[ImageBatch]:
    """The batches, until more samples than the limit were skipped; one that is met again does not count again."""
    known = {bad_sample(text): text for text in skipped}
    for batch in batches:
        # Of a sample that is met again the first text is given, so that who collects them counts it once too.
        texts = tuple(known.setdefault(bad_sample(text), text) for text in batch.skipped)
        if len(known) > limit:
            raise DataError(
                f"{batch.skipped[-1]}. It is bad sample number {len(known)} of {where}, and data.max_bad_samples is "
                f"{limit}"
            )
        yield batch._replace(skipped=texts)


def _batches(produce: _Decode, batch_size: int, config: DataConfig) -> Iterator[ImageBatch]:
    shape = (batch_size, config.image_size, config.image_size, 3)
    processes = config.loader_processes
    decoded = run_in_processes(produce, shape, processes) if processes else run_here(produce, shape)
    for pixels, (labels, skipped) in decoded:
        images = torch.from_numpy(pixels)[: len(labels)].permute(0, 3, 1, 2)
        del pixels  # or the slot would be held until the next batch is asked for
        yield ImageBatch(images, torch.tensor(labels, dtype=torch.int64), skipped)
        del images
