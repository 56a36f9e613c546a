"""Sums of squares of what is averaged, and how far the workers were from their average, which these tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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
        self._averages: list[Tensor] = []  # measured on the way, perhaps of other pieces of the same buckets
        self._unmeasured: list[int] = []  # the other pieces

    def now(self, indices: Iterable[int]) -> Tensor:
        return _total([squares_of_piece(self._pieces[index]) for index in indices])

    def noted(self, averaged: Iterator[tuple[int, Tensor | None]]) -> Iterator[int]:
        """The indices of pieces that become their average; what a Reducer measures of these on the way is kept."""
        self._averages, self._unmeasured = [], []
        for index, squares in averaged:
            if squares is None:
                self._unmeasured.append(index)
            else:
                self._averages.append(squares)
            yield index

    def relative_distance(self, before: float, ranks: int, left_out: LeftOut, indices: Iterable[int]) -> Tensor:
        """sqrt(mean_k |x_k - x|^2) / |x|, with x the average of the workers' x_k and |.| the L2 norm.

        Called when the averaging has ended, before the pieces change otherwise. Uses
        sum_k |x_k - x|^2 = sum_k |x_k|^2 - K |x|^2, so that no copy of the parameters is needed. Below about 1e-4 the
        rounding of fp32 sums drowns it.

        Args:
            before: sum of squares of what all ranks of the run held before it whose workers were not left out.
            ranks: how many these ranks are.
            indices: of the pieces that were averaged.
        """
        measured = [*self._averages, *(squares_of_piece(self._pieces[index]) for index in self._unmeasured)]
        after = _total(measured) if measured else self.now(indices)
        copies = ranks
        if self._shard_group is not None:
            after = after.to(self._device)
            dist.all_reduce(after, group=self._shard_group)
            copies = self._workers - left_out.ranks
        return torch.where(after > 0, (before / (after * copies) - 1).clamp(min=0).sqrt(), 0.0)


def _total(squares: Sequence[Tensor]) -> Tensor:
    """On the device of the first; 0 of none, as on a rank whose part of a small model is empty."""
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([value.to(squares[0].device) for value in squares]).sum()
