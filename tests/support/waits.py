"""How often the host waits for the device inside the boundaries of a run."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.support import training

WAITS = {"item", "tolist", "cpu", "numpy", "nonzero"}


class Waits(TorchFunctionMode):
    """Counts the calls by which a host reads what is on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Waits]:
    """By the calls that wait on a GPU; there torch's own count of what has waited is "warned" beside them."""

    def synchronize(*_: Any) -> None:
        waits.seen.update(["synchronize"])

    with Waits() as waits, mock.patch.object(torch.cuda, "synchronize", synchronize):
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            yield waits
            return
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.seen["warned"] = sum("synchronizing CUDA operation" in str(warning.message) for warning in warned)


def normed() -> nn.Module:
    """With batch norm, whose buffers are looked at and averaged."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(training.FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, training.OUTPUTS))


@contextlib.contextmanager
def at_boundaries() -> Iterator[list[Counter[str]]]:
    """Inside, the waits of every boundary that an engine comes to, by name."""
    from qsr_engine.local_steps.boundary import Boundary

    found: list[Counter[str]] = []
    average = Boundary.average

    def watched(boundary: Boundary, *args: Any, **named: Any) -> None:
        with counted() as waits:
            average(boundary, *args, **named)
        found.append(waits.seen)

    with mock.patch.object(Boundary, "average", watched):
        yield found
