"""How far the buckets have moved since they were last averaged, and a way back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qsr_engine.averaging.buckets import PIECE
from qsr_engine.averaging.chunks import sum_of_squares
from qsr_engine.averaging.reducer import without_beginning


class Movement:
    """It keeps what every fragment began with: one more copy of the buckets.

    Args:
        fragments: the buckets, or views of them.
    """

    def __init__(self, fragments: Sequence[Sequence[Tensor]]) -> None:
        self._fragments = fragments
        self._begun_with = [[part.detach().clone() for part in fragment] for fragment in fragments]

    def _pairs(self, fragments: Collection[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(what it began with, bucket), of all fragments by default."""
        for number, (kept, parts) in enumerate(zip(self._begun_with, self._fragments, strict=True)):
            if fragments is None or number in fragments:
                yield from zip(kept, parts, strict=True)

    @torch.no_grad()
    def begin(self, fragments: Collection[int] | None = None) -> None:
        """The movement begins with what the buckets hold now."""
        for kept, part in self._pairs(fragments):
            kept.copy_(part)

    @torch.no_grad()
    def squares(self, fragments: Collection[int] | None = None) -> Tensor:
        """Sum of squares of this rank's movement, an fp64 scalar on the device of the buckets; 0 of none.

        Not finite only if an element is not. On a GPU the host does not wait for it. It takes PIECE bytes.
        """
        found = [
            sum_of_squares(now - then)
            for kept, part in self._pairs(fragments)
            for now, then in zip(*(torch.split(t, PIECE // t.element_size()) for t in (part, kept)), strict=True)
        ]
        return torch.stack([value.to(found[0].device) for value in found]).sum() if found else torch.zeros(()).double()

    @torch.no_grad()
    def hold_back(self, share: float, fragments: Collection[int] | None = None) -> None:
        """Leave the buckets this share of their movement: begun with + share x (bucket - begun with)."""
        for kept, part in self._pairs(fragments):
            part.lerp_(kept, 1 - share)

    def state_dict(self) -> list[Tensor]:
        """What the movement began with; 1-d tensors."""
        return [kept for kept, _ in self._pairs(None)]

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        """Go on from a state_dict(). Raises ValueError: there is none, or it is of other buckets."""
        if state is None:
            raise ValueError(without_beginning("qsr.faults.outlier"))
        found, expected = [tensor.numel() for tensor in state], [kept.numel() for kept, _ in self._pairs(None)]
        if found != expected:
            raise ValueError(
                f"what the round began with was saved for buckets of {found} elements, and this rank has {expected}; "
                "go on with the same model, averaging.bucket_mb and fragments, and workers"
            )
        for kept, value in zip(self.state_dict(), state, strict=True):
            kept.copy_(value)
