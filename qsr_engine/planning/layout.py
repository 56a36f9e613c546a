"""Which flat tensors a rank averages, before there is an engine: in fewer bits their pieces travel in whole blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shapes = tuple[tuple[int, ...], ...]


def averaged_tensors(groups: Sequence[Shapes], stage: int | None, worker_size: int, bucket: int) -> list[list[int]]:
    """Elements of each flat tensor that is averaged, for every rank of a worker.

        stage 0, a worker of one rank under FSDP    parameters in buckets
        stages 1 and 2                              a part of each group, whose end DeepSpeed pads to equal parts of an
                                                    even number of elements
        stage 3                                     a part of each group, made of a part of every parameter
        FSDP                                        rows of every parameter, fewer on the last ranks

    Source: engines/replica.py, DeepSpeed 0.19.8 (stage_1_and_2.py, stage3.py; its sub-groups are of 1e9 elements, and
    taken for whole groups here), torch.chunk.

    Args:
        groups: shapes of the trained parameters, by group of the optimizer.
        stage: of ZeRO; None for FSDP.
        bucket: bytes of a bucket.
    """
    return [_together(tensors, bucket) for tensors in _tensors(groups, stage, worker_size, bucket)]


def _tensors(groups: Sequence[Shapes], stage: int | None, worker_size: int, bucket: int) -> list[list[int]]:
    sizes = [[math.prod(shape) for shape in shapes] for shapes in groups]
    if stage == 0 or (stage is None and worker_size == 1):
        return [_buckets([size for group in sizes for size in group], bucket)] * worker_size
    if stage is None:
        return [
            [elements for shapes in groups for shape in shapes if (elements := _rows(shape, rank, worker_size))]
            for rank in range(worker_size)
        ]
    if stage == 3:
        return [[sum(-(-size // worker_size) for size in group) for group in sizes if group]] * worker_size
    even = 2 * worker_size
    return [[-(-sum(group) // even) * 2 for group in sizes if group]] * worker_size


def _buckets(sizes: Sequence[int], bucket: int) -> list[int]:
    from qsr_engine.averaging.buckets import ALIGNMENT, plan_buckets

    return [plan.numel for plan in plan_buckets(sizes, bucket // 4, ALIGNMENT // 4)]


def _together(tensors: Sequence[int], bucket: int) -> list[int]:
    """As averaging.buckets packs flat tensors that are small, where there are several."""
    from qsr_engine.averaging.buckets import SMALL, plan_buckets

    limit = min(SMALL, bucket) / 4
    small = [tensor for tensor in tensors if tensor < limit]
    packed = [plan.numel for plan in plan_buckets(small, bucket // 4)] if len(small) > 1 else small
    return [tensor for tensor in tensors if tensor >= limit] + packed


def _rows(shape: Sequence[int], rank: int, worker_size: int) -> int:
    each = -(-shape[0] // worker_size)
    return max(0, min(each, shape[0] - rank * each)) * math.prod(shape[1:])
