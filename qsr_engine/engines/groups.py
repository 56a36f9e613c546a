"""The process groups that belong to the averaging alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch.distributed as dist


def new_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """A group that no other call returns; made by its members alone, so that starting does not slow down with the
    square of the number of ranks."""
    made = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
    return cast(dist.ProcessGroup, made)


@dataclasses.dataclass(frozen=True)
class OwnGroups:
    """Groups of this rank that neither a user nor a framework can reach: their collectives would meet those of an
    averaging out of order, which runs beside whatever a loop does, and comes when a round ends.

    A device mesh has the group of all ranks wherever a dimension spans them, and gives its groups to everybody.

    across: the ranks that hold the same part of the parameters, one from each worker; parameters, gradients and
    optimizer state are averaged over them. inside: the ranks of this rank's worker. everybody: all ranks, for headers
    and buffers.
    """

    across: dist.ProcessGroup
    inside: dist.ProcessGroup
    everybody: dist.ProcessGroup

    @classmethod
    def make(cls, worker_size: int, *, on_cpu: bool = False) -> OwnGroups:
        """Make the groups; every rank must call it.

        Args:
            on_cpu: whether what is averaged lies on the CPU (offload), where NCCL cannot reach it.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        index, place = divmod(rank, worker_size)
        everybody = new_group(range(ranks))
        inside = everybody if worker_size == ranks else new_group(range(index * worker_size, (index + 1) * worker_size))
        across = everybody
        if worker_size > 1 or on_cpu:
            across = new_group(range(place, ranks, worker_size), "gloo" if on_cpu else None)
        return cls(across, inside, everybody)
