"""One rank that averages as if a second one beside it held zeros, so that a mean over one rank changes values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import Averager


@contextlib.contextmanager
def of_zeros(*averagers: Averager) -> Iterator[None]:
    """Inside, these averagers of one rank launch their collectives and halve what they hold.

    NCCL multiplies for its own mean (AVG) by 1 / ranks on the way. Over one rank that is 1, so it is given 1/2.
    """
    all_reduce = dist.all_reduce

    def halved(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op == dist.ReduceOp.AVG:
            op = dist._make_nccl_premul_sum(0.5)  # type: ignore[attr-defined]
        return all_reduce(tensor, op, group, async_op)

    for averager in averagers:
        reducer: Any = averager._reducer
        while reducer is not None:  # a captured one has another inside
            reducer.ranks = 2
            reducer = getattr(reducer, "_reducer", None)
    with mock.patch.object(dist, "all_reduce", halved):
        yield
