"""Copies of the buckets at one moment, whose average takes effect when the buckets have moved on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qsr_engine.averaging.allreduce import AllReduce
from qsr_engine.averaging.buckets import pieces_in_place
from qsr_engine.averaging.errors import Group


class Snapshot:
    """It takes as much memory as the buckets, and two staging buckets.

    Args:
        capacity: bytes of a piece.
    """

    def __init__(self, buckets: Sequence[Tensor], group: Group, capacity: int) -> None:
        self._buckets = list(buckets)
        self._copies = [torch.empty_like(bucket) for bucket in buckets]
        pieces = [piece for copy in self._copies for piece in pieces_in_place([copy], capacity)]
        self._reducer = AllReduce(pieces, group, difference=True)
        self.pieces = self._reducer.pieces

    def take(self) -> Iterator[tuple[int, Tensor | None]]:
        """Copy the buckets. What is returned averages the copies, as Reducer.run; until its end, take no other."""
        for copy, bucket in zip(self._copies, self._buckets, strict=True):
            copy.copy_(bucket)
        return self._reducer.run(range(len(self.pieces)))

    @torch.no_grad()
    def apply(self) -> None:
        """Add to the buckets what the averaging would have changed then: average - copy."""
        for bucket, difference in zip(self._buckets, self._copies, strict=True):
            bucket.add_(difference)
