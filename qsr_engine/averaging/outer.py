"""The outer optimizer: the workers' mean movement as a gradient for SGD with momentum, at every boundary.

With x the parameters that all workers began the round with, x' their mean at its end, lr and mu as configured:

    g = x - x'            the workers' mean movement, turned round
    m = mu m + g
    x = x - lr m          with Nesterov: x = x - lr (g + mu m)

lr 1 and mu 0 give x', the plain average. Sources: SlowMo (Wang et al., ICLR 2020, arXiv 1910.00643) and DiLoCo
(Douillard et al., arXiv 2311.08105, which takes lr 0.7, mu 0.9 and Nesterov). Every rank computes it for the elements
that it holds, from the same numbers, so that workers stay equal bit for bit, and where ZeRO or FSDP shards the
parameters of a worker, this state is sharded alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsr_engine.averaging.buckets import Piece
from qsr_engine.config.qsr import OuterConfig


class Outer:
    """One step of SGD on the averaged parameters.

    Its memory is two copies of the buckets, one where momentum is 0.

    Args:
        buckets: 1-d contiguous tensors, which hold the same values on every worker now.
    """

    def __init__(self, config: OuterConfig, buckets: Sequence[Tensor]) -> None:
        self.config = config
        self._buckets = list(buckets)
        self._begun_with = [bucket.detach().clone() for bucket in buckets]  # x
        self._momentum = [torch.zeros_like(bucket) for bucket in buckets] if config.momentum else []

    @torch.no_grad()
    def begin_round(self) -> None:
        """Take the buckets' present values, the same on every worker, as those that the round begins with."""
        for kept, bucket in zip(self._begun_with, self._buckets, strict=True):
            kept.copy_(bucket)

    def restart(self) -> None:
        """As begin_round(), without momentum."""
        self.begin_round()
        for momentum in self._momentum:
            momentum.zero_()

    @torch.no_grad()
    def step(self, piece: Piece) -> None:
        """Move a piece, which holds the mean, to where the next round begins."""
        for part in piece.tensors:
            index, start = self._place(part)
            mean, stop = part.view(-1), start + part.numel()
            kept = self._begun_with[index][start:stop]
            gradient = kept.sub_(mean)
            step = gradient
            if self._momentum:
                momentum = self._momentum[index][start:stop].mul_(self.config.momentum).add_(gradient)
                step = gradient.add(momentum, alpha=self.config.momentum) if self.config.nesterov else momentum
            # x - lr step, written so that it is exactly the mean where lr is 1 and step is the gradient.
            mean.add_(gradient.sub(step, alpha=self.config.lr))
            kept.copy_(mean)

    def _place(self, part: Tensor) -> tuple[int, int]:
        """The bucket that a part lies in, and its first element there."""
        at = part.data_ptr()
        for index, bucket in enumerate(self._buckets):
            offset, size = at - bucket.data_ptr(), bucket.element_size()
            if 0 <= offset < bucket.numel() * size or (part.numel() == 0 and offset == 0):
                return index, offset // size
        raise ValueError("the piece is not a part of the buckets")

    def state_dict(self) -> dict[str, Any]:
        """The momentum of this rank's buckets; x is what the buckets hold on a boundary."""
        return {"momentum": self._momentum}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), after restart().

        Raises:
            ValueError: it was saved with other buckets.
        """
        saved = state["momentum"]
        found, expected = ([tensor.numel() for tensor in tensors] for tensors in (saved, self._momentum))
        if sum(found) != sum(expected):
            raise ValueError(
                f"the momentum of the outer optimizer was saved for {sum(found)} elements, and this rank has "
                f"{sum(expected)}; go on with the same model, workers and qsr.outer"
            )
        if not expected:
            return
        flat = torch.cat([tensor.view(-1) for tensor in saved])
        for momentum, part in zip(self._momentum, torch.split(flat, expected), strict=True):
            momentum.copy_(part)
