"""Counting the collectives of this process that cross workers."""

from __future__ import annotations


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
