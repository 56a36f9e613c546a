"""Copies of the buckets at one moment, whose average takes effect when the buckets have moved on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qsr_engine.averaging.allreduce import AllReduce
from qsr_engine.averaging.buckets import pieces_in_place
from qsr_engine.averaging.errors import Group


class Snapshot:
    """It takes as much memory as the buckets, and two staging buckets.

    Args:
        fragments: the buckets, or views of them.
        capacity: bytes of a piece.
    """

    def __init__(self, fragments: Sequence[Sequence[Tensor]], group: Group, capacity: int) -> None:
        self._fragments = [list(fragment) for fragment in fragments]
        self._copies = [[torch.empty_like(bucket) for bucket in fragment] for fragment in fragments]
        of_each = [[piece for copy in copies for piece in pieces_in_place([copy], capacity)] for copies in self._copies]
        self._fragment_of = [number for number, pieces in enumerate(of_each) for _ in pieces]
        self._reducer = AllReduce([piece for pieces in of_each for piece in pieces], group, difference=True)
        self._taken: list[int] = []

    def take(self, fragments: Collection[int]) -> tuple[Iterator[tuple[int, Tensor | None]], list[int]]:
        """Copy these fragments.

        Returns:
            What averages the copies, as Reducer.run, and the indices that it will give; until its end, take no other.
        """
        self._taken = sorted(fragments)
        for copy, bucket in self._pairs():
            copy.copy_(bucket)
        order = [index for index, fragment in enumerate(self._fragment_of) if fragment in fragments]
        return self._reducer.run(order), order

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(copy, bucket) of what was taken last."""
        for fragment in self._taken:
            yield from zip(self._copies[fragment], self._fragments[fragment], strict=True)

    @torch.no_grad()
    def apply(self, share: float = 1.0) -> None:
        """Add to the buckets what the averaging would have changed then, or a share of it: average - copy."""
        for difference, bucket in self._pairs():
            bucket.add_(difference, alpha=share)

    def state_dict(self) -> dict[str, Any]:
        """What apply() will add, once the averaging has ended."""
        return {"fragments": self._taken, "differences": [copy for copy, _ in self._pairs()]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """apply() adds what a state_dict() holds. Raises ValueError if it is of other buckets."""
        self._taken = [number for number in state.get("fragments", [0]) if number < len(self._fragments)]
        copies = [copy for copy, _ in self._pairs()]
        found, expected = ([tensor.numel() for tensor in tensors] for tensors in (state["differences"], copies))
        if found != expected:
            raise ValueError(
                f"an averaging under way was saved for buckets of {found} elements, and this rank has {expected}; go "
                "on with the same model, averaging.bucket_mb and fragments, and workers"
            )
        for copy, value in zip(copies, state["differences"], strict=True):
            copy.copy_(value)
