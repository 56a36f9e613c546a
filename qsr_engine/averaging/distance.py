"""Sums of squares of what is averaged, and how far the workers were from their average, which these tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import Piece
from qsr_engine.averaging.chunks import squares_of_piece
from qsr_engine.averaging.errors import Group
from qsr_engine.averaging.reducer import LeftOut


class Squares:
    """Sums of squares of pieces, in fp64.

    Args:
        workers: ranks that average with one another.
        shard_group: the ranks of one worker, where each holds a part of the parameters.
        device: where the collectives of shard_group run.
    """

    def __init__(self, pieces: Sequence[Piece], workers: int, shard_group: Group, device: torch.device) -> None:
        self._pieces = pieces
        self._workers = workers
        self._shard_group = shard_group if shard_group and dist.get_world_size(shard_group) > 1 else None
        self._device = device
        self._averages: dict[int, Tensor] = {}  # where they were measured on the way

    def now(self) -> Tensor:
        return _total([squares_of_piece(piece) for piece in self._pieces])

    def noted(self, averaged: Iterator[tuple[int, Tensor | None]]) -> Iterator[int]:
        """The indices of pieces that become their average; what a Reducer measures of these on the way is kept."""
        self._averages.clear()
        for index, squares in averaged:
            if squares is not None:
                self._averages[index] = squares
            yield index

    def relative_distance(self, before: Sequence[float], left_out: LeftOut) -> Tensor:
        """sqrt(mean_k |x_k - x|^2) / |x|, with x the average of the workers' x_k and |.| the L2 norm.

        Called when the averaging has ended, before the pieces change otherwise, with the sums of squares of all ranks
        before it. Over the workers that were not left out. Uses sum_k |x_k - x|^2 = sum_k |x_k|^2 - K |x|^2, so that
        no copy of the parameters is needed. Below about 1e-4 the rounding of fp32 sums drowns it.
        """
        after = _total(list(self._averages.values())) if self._averages else self.now()
        if left_out.workers:
            size = len(before) // self._workers  # ranks of a worker, which are neighbours
            before = [squares for rank, squares in enumerate(before) if rank // size not in left_out.workers]
        copies = len(before)
        if self._shard_group is not None:
            after = after.to(self._device)
            dist.all_reduce(after, group=self._shard_group)
            copies = self._workers - left_out.ranks
        return torch.where(after > 0, (sum(before) / (after * copies) - 1).clamp(min=0).sqrt(), 0.0)


def _total(squares: Sequence[Tensor]) -> Tensor:
    """On the device of the first; 0 of none, as on a rank whose part of a small model is empty."""
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([value.to(squares[0].device) for value in squares]).sum()
