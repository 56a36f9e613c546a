"""A model whose next forward hides an averaging, in an order that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.gate import Gate


class NextForward:
    """Its first forward is recorded.

    Args:
        module: the model; its reads of a parameter wait for that parameter.
        needs: for every parameter that is averaged, the pieces that it lies in.
        pieces: how many there are.
        group: the ranks that average with one another.
    """

    def __init__(self, module: nn.Module, needs: Mapping[Tensor, Sequence[int]], pieces: int, group: Group) -> None:
        self._gate = Gate(module, needs)
        self._pieces = pieces
        self._group = group
        self._order: list[int] | None = None
        self._gate.record()

    def order(self) -> list[int] | None:
        """All pieces in the order in which the first forward of the group's first rank read the parameters.

        Everybody takes that one, once, since collectives must match. None where it has seen no forward of the whole
        model: nobody knows then what may be read when.
        """
        if self._order is None:
            known = self._gate.recorded or self._gate.compiled()
            told: list[Any] = [self._gate.order(self._pieces) if known else None]
            if dist.get_world_size(self._group) > 1:
                first = dist.get_global_rank(self._group, 0) if self._group is not None else 0
                with collective("agreeing on the order of the buckets", self._group):
                    dist.broadcast_object_list(told, src=first, group=self._group)
            self._order = told[0]
        return self._order

    def guard(self, wait: Callable[[int], None]) -> None:
        """From now on, a read of a parameter waits for its pieces."""
        self._gate.guard(wait)

    def begin(self, wait_for_all: Callable[[], None]) -> None:
        """A forward begins. What is compiled reads without asking, so it waits for everything."""
        if self._gate.compiled():
            wait_for_all()
            self._gate.remove()

    def end(self) -> None:
        """Reads wait no longer. Again is harmless."""
        if self._order is not None:
            self._gate.remove()
