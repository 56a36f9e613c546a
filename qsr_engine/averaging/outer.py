"""The outer optimizer: the workers' mean movement as a gradient for SGD with momentum, at every boundary.

With x the parameters that all workers began the round with, x' their mean at its end, lr and mu as configured:

    g = x - x'            the workers' mean movement, turned round
    m = mu m + g
    x = x - lr m          with Nesterov: x = x - lr (g + mu m)

Where rounds differ in length (outer.unit_steps), lr and mu are those of a round of one unit. A round of p units, p
counted in the learning rates that its steps add up to, has

    mu_p = mu^p           lr_p = 1 - (1 - lr)^p

Both follow from one demand: two rounds of p and q units shall leave of the momentum, and without momentum of the
distance to a mean that stands still, what one of p + q leaves. So long rounds end at their plain average (lr_p -> 1,
mu_p -> 0), where a fixed lr and mu would carry the parameters lr / (1 - mu) times as far as the workers went. AutoLoCo
(arXiv 2609.36662) is reported to take mu^p with the rate accumulated in a round; lr_p is derived here.

lr 1 and mu 0 give x', the plain average. Sources: SlowMo (Wang et al., ICLR 2020, arXiv 1910.00643) and DiLoCo
(Douillard et al., arXiv 2311.08105, which takes lr 0.7, mu 0.9 and Nesterov). Every rank computes it for the elements
that it holds, from the same numbers, so that workers stay equal bit for bit, and where ZeRO or FSDP shards the
parameters of a worker, this state is sharded alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qsr_engine.averaging.buckets import Piece, place_in
from qsr_engine.averaging.chunks import squares_of_piece
from qsr_engine.averaging.reducer import Reducer, without_beginning
from qsr_engine.config.averaging import OuterConfig


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
        self._lr, self._mu = config.lr, config.momentum  # of this round

    def round_lasted(self, units: float) -> None:
        """The round whose end step() takes was so many units long."""
        if self.config.unit_steps is not None:
            # Two hosts may round a power or a cosine otherwise in the last digit, and all workers must get the same.
            self._lr = float(f"{1 - (1 - self.config.lr) ** units:.9g}")
            self._mu = float(f"{self.config.momentum**units:.9g}")

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
            index, start, stop = place_in(part, self._buckets)
            mean = part.view(-1)
            kept = self._begun_with[index][start:stop]
            gradient = kept.sub_(mean)
            step = gradient
            if self._momentum:
                momentum = self._momentum[index][start:stop].mul_(self._mu).add_(gradient)
                step = gradient.add(momentum, alpha=self._mu) if self.config.nesterov else momentum
            # x - lr step, written so that it is exactly the mean where lr is 1 and step is the gradient.
            mean.add_(gradient.sub(step, alpha=self._lr))
            kept.copy_(mean)

    def state_dict(self, *, inside_round: bool = False) -> dict[str, Any]:
        """The momentum of this rank's buckets; and x, which on a boundary is what the buckets hold."""
        return {"momentum": self._momentum, **({"begun_with": self._begun_with} if inside_round else {})}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], *, inside_round: bool = False) -> None:
        """Go on from a state_dict(), after restart().

        Raises:
            ValueError: it was saved with other buckets, or inside a round without an outer optimizer.
        """
        if inside_round and "begun_with" not in state:
            raise ValueError(without_beginning("qsr.outer"))
        if state:
            _copy(state["momentum"], self._momentum)
        if inside_round:
            _copy(state["begun_with"], self._begun_with)


def _copy(saved: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """The same elements in order, perhaps in other buckets."""
    found, expected = ([tensor.numel() for tensor in tensors] for tensors in (saved, into))
    if sum(found) != sum(expected):
        raise ValueError(
            f"the outer optimizer's state was saved for {sum(found)} elements, and this rank has {sum(expected)}; go "
            "on with the same model, workers and qsr.outer"
        )
    if expected:
        flat = torch.cat([tensor.view(-1) for tensor in saved])
        for tensor, part in zip(into, torch.split(flat, expected), strict=True):
            tensor.copy_(part)


class OuterStep(Reducer):
    """A reducer from whose mean an outer optimizer moves on; the squares that it yields are those of the mean."""

    def __init__(self, reducer: Reducer, outer: Outer) -> None:
        super().__init__(reducer.pieces, reducer.ranks, reducer.bytes_sent)
        self.exact = reducer.exact
        self._reducer = reducer
        self._outer = outer

    def bytes_of(self, pieces: Iterable[int]) -> int:
        return self._reducer.bytes_of(pieces)

    @property
    def way(self) -> str:
        return self._reducer.way

    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        for index, squares in self._reducer._run(order, divisor):
            of_mean = squares_of_piece(self.pieces[index]) if squares is None else squares
            self._outer.step(self.pieces[index])
            self._reducer.moved(index)
            yield index, of_mean

    def _add_nothing(self) -> None:
        self._reducer._add_nothing()

    def round_lasted(self, units: float) -> None:
        self._outer.round_lasted(units)

    def begin_round(self) -> None:
        self._outer.begin_round()

    def restart(self) -> None:
        self._reducer.restart()
        self._outer.restart()

    def state_dict(self, *, inside_round: bool = False) -> dict[str, Any]:
        inner = self._reducer.state_dict(inside_round=inside_round)
        return {**inner, "outer": self._outer.state_dict(inside_round=inside_round)}

    def load_state_dict(self, state: dict[str, Any], *, inside_round: bool = False) -> None:
        self._reducer.load_state_dict(state, inside_round=inside_round)
        self._outer.load_state_dict(state.get("outer", {}), inside_round=inside_round)

    def close(self) -> None:
        self._reducer.close()
