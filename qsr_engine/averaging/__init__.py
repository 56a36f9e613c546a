"""Averaging of tensors over the workers, in flat buckets and in place.

What happens at a boundary, in this order:

1. every rank reads its buckets once: their sum of squares says whether they are finite, and gives the distance;
2. all ranks exchange a header (`agreement`); where they disagree, every rank raises and nothing is averaged;
3. the buckets become their mean over the workers, in pieces that are in flight together; a worker that is left out adds
   nothing to the sum, which is then divided by the number of the others, so that it too gets their mean;
4. the sum of squares of the average gives the distance of the workers from it;
5. an outer optimizer, if there is one, moves on from the average.

This package knows tensors, modules and process groups, and no engine. Its files, in the order of their imports:

    gloo_threads   what ends a process cleanly after a collective of gloo
    buckets        packing plans; parameters become views of flat buckets, once, so that an averaging copies nothing
    collectives    the mean of pieces over a group: in place, or packed through at most two staging buckets
    shared_memory  the mean inside one host on CPUs, where every rank sees the buckets of the others
    two_level      the mean inside every host first, then between hosts
    wire           the mean of differences in bf16, fp16 or int8
    cuda_graph     the mean captured in a CUDA graph
    outer          what becomes of the mean: SGD on the workers' mean movement
    overlap        the mean in the background: behind the next forward, or behind whole steps
    averager       all of it for one rank
"""

from qsr_engine.averaging.averager import Averager
from qsr_engine.averaging.buckets import flat_buckets, place_in
from qsr_engine.averaging.collectives import (
    CollectiveError,
    LeftOut,
    all_gather_flat,
    average_in_place,
    average_packed,
    bucket_bytes,
    ring_bytes,
)

__all__ = [
    "Averager",
    "CollectiveError",
    "LeftOut",
    "all_gather_flat",
    "average_in_place",
    "average_packed",
    "bucket_bytes",
    "flat_buckets",
    "place_in",
    "ring_bytes",
]
