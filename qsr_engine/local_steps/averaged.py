"""What local steps ask of the replica that an engine holds, and what they do with its optimizer state and buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import NOBODY, LeftOut, average_in_place, average_packed, bucket_bytes
from qsr_engine.averaging.errors import Group
from qsr_engine.config.qsr import AveragingConfig


class Averaged:
    """One rank's part of a replica, beside the parameters, which an averager has in its buckets.

    As it stands it is that of parameters that no module and no optimizer holds; engines have `engines.replica.Replica`.
    """

    def largest_rate(self) -> float:
        """The learning rate in the optimizer; of several the largest, which gives the smallest H."""
        raise RuntimeError("there is no optimizer whose learning rate could be read; write qsr.lr")

    def buffers(self) -> list[Tensor]:
        """The module's floating-point buffers; there may be others at every boundary."""
        return []

    def state(self, name: str) -> list[Tensor | None]:
        """The optimizer's state of this name, for each master; None where it has none (yet)."""
        return []

    def state_to_average(self, name: str) -> list[Tensor]:
        """The same with zeros in place of None: another worker may have some."""
        return []

    def state_names(self) -> list[str]:
        """Names of all state that the optimizer has."""
        return []

    def state_tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        """(number of the master, name, value) of the state that has a master's shape, which workers can average."""
        return iter(())

    def refresh(self) -> None:
        """The masters have changed: bring what derives from them up to date. Collective inside the worker."""
        return


class OptimizerState:
    """Averages the optimizer's state that `averaging.state` names, and mends that of workers that were left out."""

    def __init__(self, replica: Averaged, options: AveragingConfig, group: Group) -> None:
        self._replica, self._names, self._group = replica, options.state, group
        self._bucket_mb = options.bucket_mb

    def average(self, left_out: LeftOut) -> int:
        """Every rank calls it. Returns the bytes that this rank sent."""
        tensors = [tensor for name in self._names for tensor in self._replica.state_to_average(name)]
        capacity = bucket_bytes(self._bucket_mb, self._group)
        sent = average_in_place(tensors, self._group, capacity, left_out) if tensors else 0
        return sent + self._give_mean(capacity, left_out) if left_out.ranks else sent

    @torch.no_grad()
    def _give_mean(self, capacity: int, left_out: LeftOut) -> int:
        """Give the workers that are left out of an averaging the mean of the others' optimizer state.

        What is not finite in their parameters has been in their moments first, and has made others huge. Zeros would
        not do: Adam corrects its moments by a count of steps, and with zeros late in a run its steps are six times too
        large. The others' state stays as it is, and so do counts and averaging.state, which are averaged by themselves.
        What has not a master's shape (Adafactor's) becomes zero where it is not finite.
        """
        replica, sent = self._replica, 0
        names: list[set[str]] = [set()] * dist.get_world_size(self._group)
        dist.all_gather_object(names, {name for _, name, _ in replica.state_tensors()}, group=self._group)
        for name in sorted(set().union(*names) - set(self._names)):
            sent += average_packed(replica.state_to_average(name), self._group, capacity, left_out, give=True)
        if left_out.here:
            for value in (value for name in replica.state_names() for value in replica.state(name)):
                if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                    value.zero_()
        return sent


class Buffers:
    """A module's floating-point buffers (batch norm's statistics), of which every rank has seen batches of its own.

    Args:
        average: whether they are averaged; otherwise every rank keeps its own.
        worker_size: ranks of a worker.
    """

    def __init__(self, replica: Averaged, *, average: bool, worker_size: int) -> None:
        self._replica, self._average, self._worker_size = replica, average, worker_size
        self._differ = False
        self._infinite = _elements_not_finite(self._tensors())  # when they were the same everywhere (a mask)

    def _tensors(self) -> list[Tensor]:
        return self._replica.buffers() if self._average else []

    def changed(self) -> None:
        """A step has been taken."""
        self._differ = True

    def same_everywhere(self) -> None:
        """What is not finite in them now is meant so."""
        self._infinite = _elements_not_finite(self._tensors())

    def have_diverged(self) -> bool:
        """Whether more elements are not finite than when they were the same everywhere."""
        return _elements_not_finite(self._tensors()) > self._infinite

    def average(self, left_out: LeftOut = NOBODY) -> int:
        """Average them over all ranks.

        Also inside a worker: its ranks average gradients, and each has seen batches of its own. In fp64, so that a
        buffer that is the same everywhere keeps its bits, also one that holds the largest number of its type (a mask).

        Args:
            left_out: of the averager's group; the ranks of these workers get the mean of the others'.
        Returns:
            Bytes that this rank sent.
        """
        buffers = self._tensors() if self._differ else []
        self._differ = False
        if not buffers:
            return 0
        exact = [buffer.to(torch.float64, copy=True) for buffer in buffers]
        everywhere = left_out.with_all_ranks(self._worker_size)
        sent = average_packed(exact, None, left_out=everywhere)
        for buffer, mean in zip(buffers, exact, strict=True):
            buffer.copy_(mean)
        return sent

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, they are the average; afterwards they are as they were. Every rank must enter."""
        differ, buffers = self._differ, self._tensors()
        before = [buffer.clone() for buffer in buffers]
        self.average()
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            self._differ = differ


def _elements_not_finite(tensors: list[Tensor]) -> int:
    """Elements that are NaN or infinite; the host waits once for each device."""
    found: dict[torch.device, torch.Tensor] = {}
    for tensor in tensors:
        count = (~tensor.detach().isfinite()).sum()
        found[tensor.device] = found[tensor.device] + count if tensor.device in found else count
    return sum(int(count) for count in found.values())
