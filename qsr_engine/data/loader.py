"""Batches of training and evaluation data for one rank, the same for any number of loader processes.

order        which samples, in which order: positions, no bytes                  (order.py, webdataset's shuffle)
source       the bytes and labels of the samples of one batch                    (sources.py)
decoding     into one block of memory                                            (views.py, decoding.py, batches.py)
ring         the loader processes, each of which does all of this for one batch in P
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.batches import Decodes, ImageBatch, decode_batch
from qsr_engine.data.blocks import BlockDecoder
from qsr_engine.data.decoding import NO_REGIONS, REGIONS, Decoder, Pixels
from qsr_engine.data.device import on_device
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index
from qsr_engine.data.order import epoch_of, plan_epoch, plan_evaluation, plan_samples, seed_for
from qsr_engine.data.places import Places
from qsr_engine.data.randaugment import make_augment
from qsr_engine.data.ring import Beside, run_here, run_in_processes
from qsr_engine.data.samples import Loaded, Position, bad_sample
from qsr_engine.data.shuffling import shuffled
from qsr_engine.data.sources import Source, make_source
from qsr_engine.data.views import EvalView, TrainView

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
_DRAWN = 4096  # samples whose shards are looked up at once
_SPARES = 1 << 14  # positions that may be held beside a batch, to stand in for bad samples
_AHEAD = 8  # batches of a loader process whose shards are fetched before they are needed


class RawBatch(NamedTuple):
    """A batch that has not been read: the seed of its augmentation, its samples, and samples that come after them."""

    seed: int
    items: list[Position]
    spares: list[Position]


class TrainLoader:
    """The training batches of one rank, without end, resumable at any batch.

    Every rank has as many: iterate over it in a loop of your own, and keep its state_dict() with a checkpoint.

    A rank has one stream of samples of as many as there are ranks. Where members divide a step unevenly there are as
    many streams as micro-batches in a step instead, and a rank has several, a batch of one after a batch of another.

    Args:
        folder: of the shards, or its URL; or several, as read_index() takes them.
        config: which split, image size, augmentation, shuffle buffer and loader processes.
        rank, ranks: number of its stream, and how many there are in all.
        batch_size: samples in a micro-batch of this rank.
        streams: that this rank has, of which `rank` is the first.
    Raises:
        DataError: the split is unknown or empty, or the cache cannot be used.
    """

    def __init__(
        self,
        folder: Places,
        index: Index,
        config: DataConfig,
        *,
        rank: int,
        ranks: int,
        batch_size: int,
        seed: int,
        streams: int = 1,
    ) -> None:
        self.config, self.batch_size = config, batch_size
        self._split = index.split(config.train)
        self._source = make_source(folder, index, config, config.train)
        if config.shuffle == "samples" and not self._source.any_order:
            raise DataError(
                f"data.shuffle is 'samples', and {folder} is behind a URL, where a sample at a time is slow; copy it "
                "to a folder, or write shuffle: buffer"
            )
        self._ranks, self._seed = ranks, seed
        self._streams = range(rank, rank + streams)
        self._next, self._bad = 0, set[str]()
        self._decoder = _decoder(index, config, training=True)
        if not REGIONS and rank == 0 and index.text is None:
            log.warning("pictures are decoded by Pillow, at half the speed: %s", NO_REGIONS)

    def batches(self, start: int = 0, skipped: Iterable[str] = (), device: torch.device = CPU) -> Iterator[ImageBatch]:
        """Yield batches on a device from this rank's micro-batch number `start` on, counted from the start of training.

        What is before `start` is neither read nor decoded.

        Args:
            skipped: bad samples that this rank has skipped before `start`, as batches named them; each counts once.
        Raises:
            DataError: a shard or a sample cannot be used, and no more may be skipped.
        """
        produce = _Decode(
            partial(self.raw_batches, start), self._source, self._decoder, self.config.max_bad_samples > 0, True
        )
        batches = on_device(_batches(produce, self.batch_size, self.config, device.type == "cuda"), device)
        return _limited(batches, set(skipped), self.config.max_bad_samples, "this rank")

    def __iter__(self) -> Iterator[ImageBatch]:
        """Batches on the CPU, from where load_state_dict() or the last iteration has left it."""
        for batch in self.batches(self._next, self._bad):
            self._next += 1
            self._bad.update(batch.skipped)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where an iteration stands: batches that were given, and bad samples that were skipped."""
        return {"batches": self._next, "skipped_samples": sorted(self._bad)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before an iteration begins."""
        self._next, self._bad = int(state["batches"]), set(state["skipped_samples"])

    def items(self, start: int = 0, stream: int = 0) -> Iterator[Position]:
        """The samples of one of this rank's streams in order, from its number `start` on."""
        rank = self._streams[stream]
        epoch, before = epoch_of(start, self._split.samples, rank, self._ranks)
        for number in count(epoch):
            first = before if number == epoch else 0
            if self.config.shuffle == "samples":
                yield from self._drawn(number, first, rank)
            else:
                items = self._shuffled(number, rank)
                for item in islice(items, first):
                    self._source.pass_over(item)
                yield from items

    def _drawn(self, epoch: int, first: int, rank: int) -> Iterator[Position]:
        """The samples of a stream in an epoch from the first one on, drawn from all samples of the split."""
        numbers = plan_samples(self._split.samples, self._seed, epoch, rank, self._ranks)[first:]
        names = [shard.name for shard in self._split.shards]
        ends = np.cumsum([shard.samples for shard in self._split.shards])
        for start in range(0, len(numbers), _DRAWN):
            part = numbers[start : start + _DRAWN]
            shards = np.searchsorted(ends, part, side="right")
            starts = np.concatenate(([0], ends))[shards]
            for shard, number in zip(shards.tolist(), (part - starts).tolist(), strict=True):
                yield Position(names[shard], number)

    def _shuffled(self, epoch: int, rank: int) -> Iterator[Position]:
        slices = plan_epoch(self._split, self._seed, epoch, rank, self._ranks)
        seed = seed_for("shuffle", self._seed, epoch, rank)
        return shuffled(partial(self._source.items, slices), self.config.shuffle_buffer, seed)

    def raw_batches(self, start: int = 0) -> Iterator[RawBatch]:
        """What batches() reads and decodes, from this rank's micro-batch number `start` on."""
        turns = len(self._streams)
        each = [self._of_stream(stream, -((stream - start) // turns)) for stream in range(turns)]
        for number in count(start):
            yield next(each[number % turns])

    def _of_stream(self, stream: int, start: int) -> Iterator[RawBatch]:
        """From the stream's batch number `start` on."""
        items, limit = self.items(start * self.batch_size, stream), self.config.max_bad_samples
        # As many as may be bad in an epoch, at its end, and again at the beginning of the next: then one is good, or
        # the limit is exceeded anyway.
        spares = min(2 * limit + 1, _SPARES) if limit else 0
        ahead: deque[Position] = deque()
        for number in count(start):
            ahead.extend(islice(items, self.batch_size + spares - len(ahead)))
            batch = [ahead.popleft() for _ in range(self.batch_size)]
            seed = seed_for("augmentation", self._seed, self._streams[stream], number)
            yield RawBatch(seed, batch, list(ahead))


class EvalLoader:
    """One rank's part of the evaluation split, once for each iteration and in the order of the index.

    The parts cover every sample exactly once. Sizes differ by at most one sample, the last batch may be short, and a
    rank may have no batch at all: with more ranks than samples, some parts are empty. A bad sample that may be skipped
    has the label -1.
    """

    def __init__(
        self, folder: Places, index: Index, config: DataConfig, *, rank: int, ranks: int, batch_size: int
    ) -> None:
        split = index.split(config.eval)
        self.most_batches = -(-split.samples // (ranks * batch_size))  # of any rank; each has this many, or one fewer
        self.batch_size, self.config = batch_size, config
        source = make_source(folder, index, config, config.eval)
        slices = plan_evaluation(split, rank, ranks)
        decoder = _decoder(index, config, training=False)
        raw_batches = partial(_evaluation_batches, partial(source.items, slices), batch_size)
        self._produce = _Decode(raw_batches, source, decoder, config.max_bad_samples > 0, False)

    def __iter__(self) -> Iterator[ImageBatch]:
        """Yield batches. Raises DataError as TrainLoader.batches(); the limit is one of each evaluation."""
        batches = _batches(self._produce, self.batch_size, self.config)
        return _limited(batches, set(), self.config.max_bad_samples, "this evaluation on this rank")


def _evaluation_batches(items: Callable[[], Iterator[Position]], batch_size: int) -> Iterator[RawBatch]:
    stream = items()
    while batch := list(islice(stream, batch_size)):
        yield RawBatch(0, batch, [])


def _decoder(index: Index, config: DataConfig, *, training: bool) -> Decodes:
    """What decodes the samples of an index. Raises DataError: it is not said how large pictures become."""
    if index.text is not None:
        return BlockDecoder(index.text)
    size = config.image_size
    if not size:
        raise DataError("data.image_size is missing, and the shards hold pictures; write it, in pixels")
    if training:
        view, augment = TrainView(size, config.augment), make_augment(config.randaugment)
        return Decoder(size, view, augment, config.loader_threads)
    return Decoder(size, EvalView(size), None, config.loader_threads)


LoadedBatch = tuple[int, list[Loaded], Iterator[Loaded]]  # seed, samples, spares


@dataclass
class _Decode:
    """Decodes raw batches: p, p + P, p + 2P, ... of them (see ring.Produce)."""

    raw_batches: Callable[[], Iterator[RawBatch]]
    source: Source
    decoder: Decodes
    skip: bool
    replace: bool

    def __call__(self, process: int, processes: int, room: Callable[[], Pixels]) -> Iterator[Beside]:
        for seed, samples, spares in self.samples(process, processes):
            out = room()
            yield decode_batch(samples, self.decoder, seed, out, spares, skip=self.skip, replace=self.replace)

    def samples(self, process: int, processes: int) -> Iterator[LoadedBatch]:
        """The seed and the samples of these batches, read and not decoded; spares are read when they are asked for."""
        for seed, items, spares in self._announced(self._own(process, processes)):
            yield seed, [self.source.load(item) for item in items], map(self.source.load, spares)

    def _own(self, process: int, processes: int) -> Iterator[RawBatch]:
        for number, batch in enumerate(self.raw_batches()):
            if number % processes == process:
                yield batch
            else:
                for item in batch.items:
                    self.source.pass_over(item)

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


def _batches(produce: _Decode, batch_size: int, config: DataConfig, pinned: bool = False) -> Iterator[ImageBatch]:
    shape = (batch_size, *produce.decoder.shape)
    processes = config.loader_processes
    decoded = run_in_processes(produce, shape, processes, pinned=pinned) if processes else run_here(produce, shape)
    for pixels, (labels, skipped) in decoded:
        images = torch.from_numpy(pixels)[: len(labels)]
        if images.ndim == 4:
            images = images.permute(0, 3, 1, 2)
        del pixels  # or the slot would be held until the next batch is asked for
        yield ImageBatch(images, torch.tensor(labels, dtype=torch.int64), skipped)
        del images
