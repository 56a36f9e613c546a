"""Counting the collectives of this process that cross workers, and what they send."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any


def collectives_across_workers(worker_size: int) -> int:
    """Collectives that this process has issued so far on groups with ranks of more than one worker.

    torch counts the collectives of every process group itself, whoever issues them and by whatever function.
    """
    from torch.distributed import distributed_c10d as c10d

    total = 0
    for group in c10d._world.pg_map:
        workers = {rank // worker_size for rank in c10d.get_process_group_ranks(group)}
        if len(workers) > 1:
            total += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return total


# Passes that a ring makes for a collective, and which argument is its whole payload. All-to-all sends each of n ranks
# its part by itself, which is as much.
_PASSES = {
    "all_reduce": (2, 0),
    "reduce": (1, 0),
    "broadcast": (1, 0),
    "all_gather_into_tensor": (1, 0),
    "all_gather_single": (1, 0),
    "reduce_scatter_tensor": (1, 1),
    "reduce_scatter_single": (1, 1),
    "all_to_all_single": (1, 0),
}
_PAYLOAD = 64  # elements; what is smaller is a flag, a norm or a meeting


@contextlib.contextmanager
def bytes_leaving(worker_size: int) -> Iterator[Counter[str]]:
    """Inside, count by function the payload that this rank's link carries to another worker, in a ring over the ranks
    of each group in their order. Enter it before an engine starts: DeepSpeed keeps functions of torch.distributed."""
    import torch.distributed as dist

    from qsr_engine.averaging import all_gather_flat, compressed

    sent: Counter[str] = Counter()

    def counting(function: Any, name: str) -> Any:
        signature, (passes, place) = inspect.signature(function), _PASSES[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            ranks = dist.get_process_group_ranks(given.get("group") or dist.group.WORLD)
            workers, tensor = [rank // worker_size for rank in ranks], [*given.values()][place]
            own = ranks.index(dist.get_rank())
            if tensor.numel() >= _PAYLOAD and workers[own] != workers[(own + 1) % len(ranks)]:
                sent[name] += passes * tensor.nbytes * (len(ranks) - 1) // len(ranks)
            return function(*args, **kwargs)

        return call

    def counting_sends(function: Any) -> Any:
        """What goes to one rank, whole."""

        def call(tensor: Any, *args: Any, group: Any = None, group_dst: int, **kwargs: Any) -> Any:
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            if tensor.numel() >= _PAYLOAD and ranks[group_dst] // worker_size != dist.get_rank() // worker_size:
                sent["isend"] += tensor.nbytes
            return function(tensor, *args, group=group, group_dst=group_dst, **kwargs)

        return call

    replaced = [(dist, name) for name in _PASSES if hasattr(dist, name)]
    originals = [(module, name, getattr(module, name)) for module, name in replaced]
    originals.append((compressed, "all_gather_flat", all_gather_flat))
    for module, name, function in originals:
        setattr(module, name, counting(function, function.__name__))
    originals.append((dist, "isend", dist.isend))
    dist.isend = counting_sends(dist.isend)
    try:
        yield sent
    finally:
        for module, name, function in originals:
            setattr(module, name, function)
