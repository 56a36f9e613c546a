"""Averaging of tensors over the workers, in flat buckets and in place.

What happens at a boundary, in this order:

1. every rank reads its buckets once: their sum of squares says whether they are finite, and gives the distance;
2. all ranks exchange a header (`local_steps.header`); where they disagree, every rank raises and nothing is averaged;
3. the buckets become their mean over the workers, in pieces that are in flight together; a worker that is left out adds
   nothing to the sum, which is then divided by the number of the others, so that it too gets their mean;
4. the sum of squares of the average gives the distance of the workers from it;
5. an outer optimizer, if there is one, moves on from the average.

This package knows tensors, modules and process groups, and no engine. Its files, in the order of their imports:

    errors         a collective that fails says what was under way
    buckets        packing plans; parameters become views of flat buckets, once, so that an averaging copies nothing
    chunks         sums, quotients and squares of large tensors, in chunks that stay in a core's cache
    gloo_threads   what ends a process cleanly after a collective of gloo
    reducer        the interface of what replaces pieces by their mean over a group, and who is left out of it
    exchange       an all-reduce by hand, between few ranks on CPUs
    allreduce      the mean by all-reduce: in place, or packed through at most two staging buckets
    compressed     the mean of differences in bf16, fp16 or int8
    shared_memory  the mean inside one host on CPUs, where every rank sees the buckets of the others
    two_level      the mean inside every host first, then between hosts
    cuda_graph     the mean captured in a CUDA graph
    outer          what becomes of the mean: SGD on the workers' mean movement
    choose         which of these it is, and on which hosts the ranks are
    background     averagings beside their caller, in one thread for good
    gate           a model that waits for each parameter when it reads it
    next_forward   the model whose next forward hides an averaging
    snapshot       the mean of what the buckets held some steps ago
    fragments      parts of the buckets that are averaged at steps of their own
    tentative      the mean over a group that may break, in copies
    mixing         what a worker keeps of its own parameters
    movement       how far the buckets have moved since they were last averaged
    distance       how far the workers were from their average
    averager       all of it for one rank
"""

from qsr_engine.averaging.allreduce import average_tensors
from qsr_engine.averaging.averager import Averager
from qsr_engine.averaging.buckets import bucket_bytes, flat_buckets, place_in
from qsr_engine.averaging.errors import CollectiveError
from qsr_engine.averaging.reducer import NOBODY, LeftOut, all_gather_flat, ring_bytes

__all__ = [
    "NOBODY",
    "Averager",
    "CollectiveError",
    "LeftOut",
    "all_gather_flat",
    "average_tensors",
    "bucket_bytes",
    "flat_buckets",
    "place_in",
    "ring_bytes",
]
