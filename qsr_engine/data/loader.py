"""Batches of training and evaluation data for one rank, the same for any number of loader processes.

Every loader process walks through all raw samples of its rank and decodes one batch in P: reading an image from a tar
file takes 0.2 ms, decoding it 3 ms or more. DataLoader collects from its processes in turn, which restores the order.
Each process keeps a shuffle buffer of its own: shuffle_buffer encoded images of memory.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from qsr_engine.config import DataConfig
from qsr_engine.data.decoding import Batch, EvalTransform, TrainTransform, Transform, decode_batch
from qsr_engine.data.index import DataError, Index
from qsr_engine.data.order import ShardSlice, plan_epoch, plan_evaluation, seed_for
from qsr_engine.data.shards import Sample, read_slices

RawBatch = tuple[int, list[Sample]]  # the seed of its augmentation, and its samples

# A fork of the training process can deadlock on locks that threads of gloo, NCCL or CUDA hold at that moment. The fork
# server is a fresh process without such threads, and it imports torch once for all loader processes, which then start
# in a tenth of a second: cheap enough for every evaluation. spawn would import torch in each of them.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class TrainLoader:
    """The training batches of one rank, without end, resumable at any batch.

    Args:
        folder: of the shards.
        config: which split, image size, augmentation, shuffle buffer and loader processes.
        batch_size: samples in a micro-batch of this rank.
        batches_per_epoch: micro-batches of this rank in an epoch.
    Raises:
        DataError: the split is unknown, or has too few samples for such an epoch.
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
        batches_per_epoch: int,
        seed: int,
    ) -> None:
        if batch_size < 1 or batches_per_epoch < 1:
            raise DataError(
                f"an epoch has {batches_per_epoch} batches of {batch_size} samples on each rank; at least 1 of 1 is "
                "needed: write a smaller batch or give more data"
            )
        self.folder, self.config = Path(folder), config
        self.class_count = index.class_count
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.seed, self.rank = seed, rank
        per_rank = batch_size * batches_per_epoch
        split = index.split(config.train)
        self._plan = partial(plan_epoch, split, seed, rank=rank, ranks=ranks, per_rank=per_rank)
        self._plan(epoch=0)  # raises now what it would raise in a loader process

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield (images, labels) from micro-batch number `start` on, counted from the start of training.

        Batches before `start` in its epoch are read and not decoded.

        Yields:
            images, float32 [B, 3, S, S], normalised; labels, int64 [B].
        Raises:
            DataError: a shard or a sample cannot be used.
        """
        transform = TrainTransform(self.config.image_size, self.config.augment)
        dataset = _DecodedBatches(partial(self._raw_batches, start), transform)
        yield from _unwrap(_parallel(dataset, self.config.loader_processes))

    def _raw_batches(self, start: int) -> Iterator[RawBatch]:
        first_epoch, skipped = divmod(start, self.batches_per_epoch)
        for epoch in count(first_epoch):
            batches = enumerate(_chunks(self._shuffled(epoch), self.batch_size))
            for number, samples in islice(batches, skipped if epoch == first_epoch else 0, None):
                yield seed_for("augmentation", self.seed, epoch, self.rank, number), samples

    def _shuffled(self, epoch: int) -> Iterator[Sample]:
        buffer = self.config.shuffle_buffer
        generator = random.Random(seed_for("shuffle", self.seed, epoch, self.rank))
        samples = partial(read_slices, self.folder, self._plan(epoch=epoch), self.class_count)
        return iter(wds.DataPipeline(samples, wds.shuffle(buffer, initial=buffer, rng=generator)))


class EvalLoader:
    """One rank's part of the evaluation split, once for each iteration and in the order of the index.

    The parts cover every sample exactly once. Sizes differ by at most one sample, the last batch may be short, and a
    rank may have no batch at all: with more ranks than samples, some parts are empty.
    """

    def __init__(
        self, folder: str | Path, index: Index, config: DataConfig, *, rank: int, ranks: int, batch_size: int
    ) -> None:
        split = index.split(config.eval)
        slices = plan_evaluation(split, rank, ranks)
        self.most_batches = -(-split.samples // (ranks * batch_size))  # of any rank; each has this many, or one fewer
        raw_batches = partial(_evaluation_batches, Path(folder), slices, index.class_count, batch_size)
        dataset = _DecodedBatches(raw_batches, EvalTransform(config.image_size))
        self._batches = _parallel(dataset, config.loader_processes)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images, float32 [B, 3, S, S], and labels, int64 [B]. Raises DataError as TrainLoader.batches()."""
        return _unwrap(self._batches)


def _evaluation_batches(
    folder: Path, slices: list[ShardSlice], classes: int | None, batch_size: int
) -> Iterator[RawBatch]:
    for samples in _chunks(read_slices(folder, slices, classes), batch_size):
        yield 0, samples


def _chunks(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while chunk := list(islice(samples, size)):
        yield chunk


class _DecodedBatches(IterableDataset[Batch | DataError]):
    """Decodes raw batches: all of them, or in loader process p of P the numbers p, p + P, p + 2P, ...

    A DataError is the last item and not raised: DataLoader would bury its message in a traceback.
    """

    def __init__(self, raw_batches: Callable[[], Iterator[RawBatch]], transform: Transform) -> None:
        self.raw_batches, self.transform = raw_batches, transform

    def __iter__(self) -> Iterator[Batch | DataError]:
        process = get_worker_info()
        first, step = (process.id, process.num_workers) if process else (0, 1)
        try:
            for seed, samples in islice(self.raw_batches(), first, None, step):
                yield decode_batch(samples, self.transform, seed)
        except DataError as error:
            yield error


def _parallel(dataset: _DecodedBatches, processes: int) -> Iterable[Batch | DataError]:
    """The dataset's items in order, decoded by so many loader processes, or in this one for 0."""
    if processes == 0:
        return dataset
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_unchanged,  # the default makes a list of a pair
        num_workers=processes,  # DataLoader gives each of them one thread for torch's operators
        multiprocessing_context=_CONTEXT,
        worker_init_fn=_end_with_rank,
        generator=torch.Generator(),  # without one, DataLoader draws from the global generator
    )


def _end_with_rank(_: int) -> None:
    """End this loader process when its rank is gone, killed or not.

    DataLoader looks for that too, but at the parent of the process, which here is the fork server; and the fork
    server lives as long as one of its processes does.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None

    def wait() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _unchanged(item: Any) -> Any:
    return item


def _unwrap(items: Iterable[Batch | DataError]) -> Iterator[Batch]:
    try:
        for item in items:
            if isinstance(item, DataError):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"a loader process ended: {error}; was it killed, perhaps for want of memory?") from None
