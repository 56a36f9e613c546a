"""Which samples a rank reads, and in which order: pure functions of the index, the seed and the epoch.

For every (seed, epoch) the shards are permuted and laid end to end: the epoch's global order of N samples. The ranks
take ranges of it, one after another, that together are all of it. So a rank has one endless stream of samples, epoch
after epoch, and a batch may hold the last samples of one epoch and the first of the next: no sample is left out, every
sample comes exactly once in an epoch, and every rank takes the same number of steps, whatever N is.

Where N is not a multiple of the number of ranks, ranges differ by one sample, and other ranks have the longer one in
the next epoch: after any number of epochs two streams differ by one sample at most.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qsr_engine.config.digest import digest
from qsr_engine.data.index import Shard, Split


class ShardSlice(NamedTuple):
    """Samples [start, stop) of one shard."""

    name: str
    start: int
    stop: int


def seed_for(purpose: str, *numbers: int) -> int:
    """A 63-bit seed from a purpose and numbers such as (seed, epoch, rank)."""
    return digest({"purpose": purpose, "numbers": numbers})


def samples_before(epoch: int, samples: int, rank: int, ranks: int) -> int:
    """How many samples a rank's stream has before an epoch; over all ranks they add up to epoch * samples."""
    return (epoch * samples + rank) // ranks


def epoch_of(position: int, samples: int, rank: int, ranks: int) -> tuple[int, int]:
    """The epoch of a position in a rank's stream, and how many samples of the rank's range are before it."""
    epoch = -((rank - ranks * (position + 1)) // samples) - 1
    return epoch, position - samples_before(epoch, samples, rank, ranks)


def plan_epoch(split: Split, seed: int, epoch: int, rank: int, ranks: int) -> list[ShardSlice]:
    """What a rank reads in an epoch, in order, before the local shuffle."""
    generator = random.Random(seed_for("epoch", seed, epoch))
    shards = generator.sample(split.shards, len(split.shards))
    ends = [samples_before(epoch + 1, split.samples, r, ranks) for r in range(rank + 1)]
    lengths = [end - samples_before(epoch, split.samples, r, ranks) for r, end in enumerate(ends)]
    return slice_shards(shards, sum(lengths[:-1]), sum(lengths))


def plan_samples(samples: int, seed: int, epoch: int, rank: int, ranks: int) -> NDArray[np.int64]:
    """The numbers of the samples that a rank reads in an epoch, where all samples of a split are shuffled.

    Counted in the order of the index. numpy promises that the old generator gives the same for ever.
    """
    seeds = divmod(seed_for("samples", seed, epoch), 1 << 32)
    order = np.random.RandomState(seeds).permutation(samples)
    start = sum(
        samples_before(epoch + 1, samples, r, ranks) - samples_before(epoch, samples, r, ranks) for r in range(rank)
    )
    length = samples_before(epoch + 1, samples, rank, ranks) - samples_before(epoch, samples, rank, ranks)
    return order[start : start + length]


def plan_evaluation(split: Split, rank: int, ranks: int) -> list[ShardSlice]:
    """A rank's part of a split, in the order of the index; parts cover every sample once, sizes differ by one."""
    return slice_shards(split.shards, rank * split.samples // ranks, (rank + 1) * split.samples // ranks)


def slice_shards(shards: Iterable[Shard], start: int, stop: int) -> list[ShardSlice]:
    """The range [start, stop) of shards laid end to end, counted in samples; no slice is empty."""
    slices = []
    for shard in shards:
        if stop <= 0:
            break
        if max(start, 0) < min(stop, shard.samples):
            slices.append(ShardSlice(shard.name, max(start, 0), min(stop, shard.samples)))
        start, stop = start - shard.samples, stop - shard.samples
    return slices
