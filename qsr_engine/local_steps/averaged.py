"""What local steps ask of the replica that an engine holds, and what they do with its optimizer state and buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import NOBODY, LeftOut, average_tensors, bucket_bytes
from qsr_engine.averaging.buckets import PIECE
from qsr_engine.averaging.errors import Group
from qsr_engine.config.averaging import AveragingConfig


class Averaged:
    """One rank's part of a replica, beside the parameters, which an averager has in its buckets.

    As it stands it is that of parameters that no module and no optimizer holds; engines have `engines.replica.Replica`.
    """

    def largest_rate(self) -> float:
        """The learning rate in the optimizer, without factors of single groups; of several the largest."""
        raise RuntimeError("there is no optimizer whose learning rate could be read; write qsr.lr")

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent floating-point buffers by name; there may be others at every boundary."""
        return {}

    def all_buffers(self) -> list[Tensor]:
        """Every buffer of the module, also those that are not floating point."""
        return []

    def state(self, name: str) -> list[Any]:
        """The optimizer's state of this name, for each master: a tensor or a number; None where it has none (yet)."""
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

    def masters(self) -> list[Tensor]:
        """What the optimizer updates."""
        return []

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters, with their options."""
        return []

    def put_state(self, place: int, name: str, value: Any) -> None:
        """Let the optimizer have this state for a master, of the shape that the master has here, or a number."""

    def frozen(self) -> list[Tensor]:
        """This rank's part of the parameters that are not trained."""
        return []

    def refresh(self) -> None:
        """The masters have changed: bring what derives from them up to date. Collective inside the worker."""
        return


class OptimizerState:
    """Averages the optimizer's state that `averaging.state` names, and mends that of workers that were left out."""

    def __init__(self, replica: Averaged, options: AveragingConfig, group: Group) -> None:
        self._replica, self._options, self._group = replica, options, group
        self._bucket_mb = options.bucket_mb

    def average(self, left_out: LeftOut, number: int) -> int:
        """At the end of round `number`; every rank calls it.

        With periods of its own a state is averaged at the ends of the rounds whose count they divide, as DES-LOC has it
        (Iacob et al., arXiv 2505.22549): moments change more slowly than parameters, and may be averaged less often.

        Returns:
            How many states were averaged; each is as large as the masters.
        """
        names = self._options.states_due(number)
        tensors = [tensor for name in names for tensor in self._replica.state_to_average(name)]
        capacity = bucket_bytes(self._bucket_mb, self._group)
        if tensors:
            average_tensors(tensors, self._group, capacity, left_out)
        return len(names) + (self._give_mean(capacity, left_out, names) if left_out.ranks else 0)

    @torch.no_grad()
    def _give_mean(self, capacity: int, left_out: LeftOut, averaged: list[str]) -> int:
        """Give the workers that are left out of an averaging the mean of the others' optimizer state.

        What is not finite in their parameters has been in their moments first, and has made others huge. Zeros would
        not do: Adam corrects its moments by a count of steps, and with zeros late in a run its steps are six times too
        large. The others' state stays as it is, and so do counts and the states that are averaged by themselves.
        What has not a master's shape (Adafactor's) becomes zero where it is not finite.
        """
        replica = self._replica
        names: list[set[str]] = [set()] * dist.get_world_size(self._group)
        dist.all_gather_object(names, {name for _, name, _ in replica.state_tensors()}, group=self._group)
        others = sorted(set().union(*names) - set(averaged))
        for name in others:
            average_tensors(replica.state_to_average(name), self._group, capacity, left_out, give=True)
        if left_out.here:
            for value in (value for name in replica.state_names() for value in replica.state(name)):
                if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                    value.zero_()
        return len(others)


class Buffers:
    """A module's persistent floating-point buffers (batch norm's statistics), of which every rank has seen batches of
    its own.

    Those that are not persistent (rotary tables, masks) are no part of a model's state: the module computes them, and
    they are left alone. A buffer may appear in a forward, or be made anew in another shape.

    Args:
        average: whether they are averaged; otherwise every rank keeps its own.
        worker_size: ranks of a worker.
        everybody: a group of all ranks.
    """

    def __init__(self, replica: Averaged, *, average: bool, worker_size: int, everybody: Group) -> None:
        self._replica, self._average, self._worker_size, self._everybody = replica, average, worker_size, everybody
        self._differ = False
        self._meant = self._not_finite()  # when they were the same everywhere (a mask)

    def _named(self) -> dict[str, Tensor]:
        return self._replica.buffers() if self._average else {}

    def _tensors(self) -> list[Tensor]:
        return list(self._named().values())

    def layout(self) -> dict[str, str]:
        """Name, type and shape of those that are averaged, which must be the same on all ranks."""
        return {
            name: f"{str(buffer.dtype).removeprefix('torch.')} {list(buffer.shape)}"
            for name, buffer in self._named().items()
        }

    def changed(self) -> None:
        """A step has been taken."""
        self._differ = True

    def same_everywhere(self) -> None:
        """What is not finite in them now is meant so."""
        self._meant = self._not_finite()

    def have_diverged(self) -> Tensor | None:
        """Whether more elements of a buffer are not finite than when it was the same everywhere; None of no buffers.

        In one that was not there then, or had another shape, infinities are meant, as in a mask, and NaN are not. On a
        GPU the host does not wait for it.
        """
        now = self._not_finite()
        more = [
            count[0] > 0 if key not in self._meant else count.sum() > self._meant[key].to(count.device).sum()
            for key, count in now.items()
        ]
        return torch.stack([value.to(more[0].device) for value in more]).any() if more else None

    def _not_finite(self) -> dict[tuple[str, torch.Size], Tensor]:
        """For each buffer, its elements that are NaN and those that are infinite: int64 [2], where it is."""
        named = {name: buffer.detach() for name, buffer in self._named().items()}
        return {(name, b.shape): torch.stack([b.isnan().sum(), b.isinf().sum()]) for name, b in named.items()}

    @torch.no_grad()
    def average(self, left_out: LeftOut = NOBODY) -> int:
        """Average them over all ranks, which have the same ones (layout()).

        Also inside a worker: its ranks average gradients, and each has seen batches of its own. In fp64, so that a
        buffer that is the same everywhere keeps its bits, also one that holds the largest number of its type (a mask);
        a piece after another, so that the copies take little memory.

        Args:
            left_out: of the averager's group; the ranks of these workers get the mean of the others'.
        Returns:
            Bytes that left this rank's worker: in a ring over all ranks, as much as one rank sends.
        """
        buffers = self._tensors() if self._differ else []
        self._differ = False
        everywhere, sent = left_out.with_all_ranks(self._worker_size), 0
        for tensors in _of_some_bytes(buffers):
            exact = [tensor.to(torch.float64, copy=True) for tensor in tensors]
            sent += average_tensors(exact, self._everybody, left_out=everywhere)
            for tensor, mean in zip(tensors, exact, strict=True):
                tensor.copy_(mean)
        return sent if buffers and dist.get_world_size(self._everybody) > self._worker_size else 0

    @torch.no_grad()
    def inside_mean(self) -> list[tuple[Tensor, Tensor]]:
        """(its mean over the ranks of this worker alone, in fp64 on the CPU; the buffer) of those that are averaged."""
        buffers, found = self._tensors(), []
        ranks = dist.get_world_size(self._everybody)
        for buffer in buffers:
            exact = buffer.to(torch.float64, copy=True).contiguous()
            if ranks > 1:
                dist.all_reduce(exact, group=self._everybody)
                exact /= ranks
            found.append((exact.cpu(), buffer))
        return found

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, they are the average; afterwards all buffers are as they were. Every rank must enter."""
        differ, before = self._differ, [(buffer, buffer.clone()) for buffer in self._replica.all_buffers()]
        try:
            self.average()
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
            self._differ = differ


def _of_some_bytes(buffers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The buffers in their order, so many at a time that in fp64 they take about PIECE bytes; large ones in parts."""
    most, parts, elements = PIECE // torch.float64.itemsize, list[Tensor](), 0
    for buffer in buffers:
        whole = not buffer.is_contiguous()
        for part in [buffer] if whole else torch.split(buffer.detach().view(-1), most):
            if parts and elements + part.numel() > most:
                yield parts
                parts, elements = [], 0
            parts.append(part)
            elements += part.numel()
    if parts:
        yield parts
