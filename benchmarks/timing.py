"""Clocks and intervals for variants that take turns in every repetition: load from elsewhere slows all of them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def timed(way: Callable[[], object]) -> float:
    """Seconds on the slowest rank; all begin together."""
    dist.barrier()
    started = time.perf_counter()
    way()
    seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """A collection of garbage would fall on whichever variant runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def bootstrap(statistic: Callable[[Tensor], Tensor], repetitions: int, draws: int = 4000) -> tuple[float, list[float]]:
    """The statistic over all repetitions, and its 95 % interval.

    Args:
        statistic: of indices of repetitions, (draws, repetitions), for every draw: (draws,).
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(repetitions, (draws, repetitions), generator=generator)
    chosen[0] = torch.arange(repetitions)
    found = statistic(chosen)
    return found[0].item(), found[1:].quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
