"""The process groups of a rank that DeepSpeed uses: its worker, and itself."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist

from qsr_engine.engines.groups import new_group


@dataclasses.dataclass(frozen=True)
class WorkerGroups:
    """The process groups of this rank, with the interface that DeepSpeed expects of its mpu.

    worker: the ranks of this rank's worker. alone: this rank.
    """

    worker: dist.ProcessGroup
    alone: dist.ProcessGroup
    worker_index: int

    @classmethod
    def make(cls, worker_size: int, *, worker: dist.ProcessGroup | None = None) -> WorkerGroups:
        """Make the groups; every rank must call it.

        Args:
            worker: the group of this rank's worker, where there is one already.
        """
        rank = dist.get_rank()
        index = rank // worker_size
        alone = new_group([rank])
        first = index * worker_size
        if worker is None:
            worker = alone if worker_size == 1 else new_group(range(first, first + worker_size))
        return cls(worker, alone, index)

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
