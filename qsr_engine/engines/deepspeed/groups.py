"""The process groups of a rank: its worker, itself, and its counterparts in the other workers."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch.distributed as dist


@dataclasses.dataclass(frozen=True)
class WorkerGroups:
    """The process groups of this rank, with the interface that DeepSpeed expects of its mpu.

    worker: the ranks of this rank's worker. alone: this rank. across: the ranks that hold the same part of the
    parameters, one from each worker; averaging goes over them.
    """

    worker: dist.ProcessGroup
    alone: dist.ProcessGroup
    across: dist.ProcessGroup
    worker_index: int

    @classmethod
    def make(cls, worker_size: int, *, worker: dist.ProcessGroup | None = None, on_cpu: bool = False) -> WorkerGroups:
        """Make the groups; every rank must call it.

        Args:
            worker: the group of this rank's worker, where there is one already.
            on_cpu: whether what is averaged lies on the CPU (offload), where NCCL cannot reach it.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        index, place = divmod(rank, worker_size)

        # Made by their members alone, so that starting does not slow down with the square of the number of ranks.
        def group(ranks: range, backend: str | None = None) -> dist.ProcessGroup:
            made = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
            return cast(dist.ProcessGroup, made)

        alone = group(range(rank, rank + 1))
        first = index * worker_size
        if worker is None:
            worker = alone if worker_size == 1 else group(range(first, first + worker_size))
        across = alone
        if worker_size < world_size:
            across = group(range(place, world_size, worker_size), "gloo" if on_cpu else None)
        return cls(worker, alone, across, index)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.worker

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.worker)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.worker)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1
