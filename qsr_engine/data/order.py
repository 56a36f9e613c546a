"""Which samples a rank reads, and in which order: pure functions of the index, the seed and the epoch.

For every (seed, epoch) the shards are permuted, laid end to end and rotated by a random number of samples: that is
the epoch's global order of N samples. Rank r takes the range [r * n, (r + 1) * n) of it. Ranks so read disjoint
ranges of equal length without talking to one another, and the N - ranks * n samples at the end, which no rank reads,
are others in every epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from qsr_engine.config import digest
from qsr_engine.data.index import DataError, Shard, Split


class ShardSlice(NamedTuple):
    """Samples [start, stop) of one shard."""

    name: str
    start: int
    stop: int


def seed_for(purpose: str, *numbers: int) -> int:
    """A 63-bit seed from a purpose and numbers such as (seed, epoch, rank)."""
    return digest({"purpose": purpose, "numbers": numbers})


def plan_epoch(split: Split, seed: int, epoch: int, rank: int, ranks: int, per_rank: int) -> list[ShardSlice]:
    """What a rank reads in an epoch, in order, before the local shuffle.

    Args:
        per_rank: samples that every rank reads, batches_per_epoch * batch_size.
    Raises:
        DataError: the split has fewer samples than ranks * per_rank.
    """
    if ranks * per_rank > split.samples:
        raise DataError(
            f"an epoch of {per_rank} samples for each of {ranks} ranks needs {ranks * per_rank} samples, and the "
            f"split has {split.samples}; write a smaller batch or give more data"
        )
    generator = random.Random(seed_for("epoch", seed, epoch))
    shards = generator.sample(split.shards, len(split.shards))
    start = generator.randrange(split.samples) + rank * per_rank
    return slice_shards(shards * 2, start, start + per_rank)


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
