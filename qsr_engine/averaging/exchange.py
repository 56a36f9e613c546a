"""An all-reduce by hand on CPUs: every rank averages a part of each piece, and gives it to the others.

After an all-reduce of gloo's every rank would divide all of the sum, and pass over it again for its squares. Here the
rank that adds up a part divides and squares it while it is in the cache, and nobody else does. It sends as much as a
ring, 2 (n - 1) / n of a piece, in 2 (n - 1) messages, so it is for few ranks and pieces of several MB.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import ALIGNMENT
from qsr_engine.averaging.chunks import add_up, squares_of_chunks, sum_of_squares
from qsr_engine.averaging.errors import Group

MOST_RANKS = 8  # measured up to 4 (python -m benchmarks.averaging); beyond, messages are small and many


def part_size(numel: int, itemsize: int, ranks: int) -> int:
    """Elements of every rank's part but the last ones: parts begin on cache lines, where copies are fastest."""
    line = max(1, ALIGNMENT // itemsize)
    return -(-numel // (ranks * line)) * line


def part_of(flat: Tensor, rank: int, ranks: int) -> Tensor:
    """Which part of a 1-d tensor a rank averages; it may be empty."""
    size = part_size(flat.numel(), flat.element_size(), ranks)
    start = min(rank * size, flat.numel())
    return flat[start : start + size]


class Exchange:
    """A piece on its way; the first messages leave when it is made.

    Args:
        flat: 1-d and contiguous, on a CPU; when all is done, the sum over the group over the divisor.
        incoming: 1-d, of the type of flat, with room for this rank's part of n - 1 ranks; it lies there until add_up().
        number: the same on every rank, and of no other piece that is on its way.
        limit: how long to wait for a message; None for as long as when the group began.
    """

    def __init__(self, flat: Tensor, incoming: Tensor, group: Group, number: int, limit: timedelta | None) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._tag, self._numel = group, 2 * number, flat.numel()
        self._limit = limit
        self._others = [other for other in range(ranks) if other != rank]
        self._parts = [part_of(flat, other, ranks) for other in range(ranks)]
        self._mine = self._parts[rank]
        size = self._mine.numel()
        self._rows = [incoming[size * row : size * (row + 1)] for row in range(len(self._others))]
        self._arriving = self._receive(self._rows)
        self._leaving = self._send([self._parts[other] for other in self._others])

    @torch.no_grad()
    def add_up(self, divisor: int) -> Tensor:
        """Average this rank's part, and give it to the others.

        Returns:
            The part's sum of squares, an fp64 scalar.
        """
        self._wait(self._arriving)
        mine = self._mine
        squares = squares_of_chunks(add_up([mine, *self._rows], [mine], divisor), self._numel) if len(mine) else None
        if squares is None or not squares.isfinite():  # or squares beyond fp32
            squares = sum_of_squares(mine) if len(mine) else torch.zeros((), dtype=torch.float64)
        self._wait(self._leaving)  # the parts of others are overwritten now
        self._tag += 1
        self._arriving = self._receive([self._parts[other] for other in self._others])
        self._leaving = self._send([mine] * len(self._others))
        return squares

    def wait(self) -> None:
        """Wait for the parts that others average, after add_up()."""
        self._wait(self._arriving)
        self._wait(self._leaving)

    def _send(self, parts: list[Tensor]) -> list[dist.Work | None]:
        return [
            dist.isend(part, group=self._group, tag=self._tag, group_dst=other)
            for part, other in zip(parts, self._others, strict=True)
            if part.numel()
        ]

    def _receive(self, parts: list[Tensor]) -> list[dist.Work | None]:
        return [
            dist.irecv(part, group=self._group, tag=self._tag, group_src=other)
            for part, other in zip(parts, self._others, strict=True)
            if part.numel()
        ]

    def _wait(self, works: list[dist.Work | None]) -> None:
        for work in works:
            assert work is not None
            work.wait() if self._limit is None else work.wait(self._limit)
