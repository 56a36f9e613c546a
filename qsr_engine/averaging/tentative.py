"""The mean over a group that may break: in copies on the host, so that a failure leaves everything as it was.

The groups are those of members (`membership.quorum`): gloo's, which no other process group of torch knows of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import PIECE
from qsr_engine.averaging.chunks import divide, sum_of_squares
from qsr_engine.averaging.errors import CollectiveError


class Tentative:
    """Copies of tensors, which become their mean over the ranks of a group, and are put in their place afterwards.

    One copy of the tensors, on the CPU and in their types, flat; it is kept for the next time.

    Args:
        tensors: of the same sizes, types and order on every rank of the group.
        movement: whether begin() keeps what a movement begins with: one more copy.
    """

    def __init__(self, tensors: Sequence[Tensor], *, movement: bool = False) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._flat = {
            dtype: torch.empty(sum(t.numel() for t in self._tensors if t.dtype == dtype), dtype=dtype)
            for dtype in dict.fromkeys(tensor.dtype for tensor in self._tensors)
        }
        self._begun_with = {dtype: flat.clone() for dtype, flat in self._flat.items()} if movement else {}

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat.values())

    def _copies(self, flat: dict[torch.dtype, Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(tensor, its copy), or its part of other such flat tensors."""
        flat = self._flat if flat is None else flat
        starts = dict.fromkeys(flat, 0)
        for tensor in self._tensors:
            start = starts[tensor.dtype]
            starts[tensor.dtype] = stop = start + tensor.numel()
            yield tensor, flat[tensor.dtype][start:stop].view(tensor.shape)

    @torch.no_grad()
    def begin(self) -> None:
        """A movement begins with what the tensors hold now."""
        for tensor, kept in self._copies(self._begun_with):
            kept.copy_(tensor)

    @torch.no_grad()
    def average(self, group: dist.ProcessGroup, giving: int, *, gives: bool, late: bool = False, adds: int = 0) -> None:
        """Let the copies become the mean of what some ranks hold. Every rank of the group calls it.

        One that is late gives what those who are not began with, and its movement from what it began with itself. It
        has not the former: another rank adds it.

        Args:
            giving: how many ranks give what they hold, those who are late among them.
            gives: whether this one does; the others get the mean too. late: whether it gives its movement.
            adds: for how many ranks that are late this one adds what it began with; it gives too.
        Raises:
            CollectiveError: a rank is lost, or nothing came within the time-out of the group. The tensors are as they
                were, and average() may be called again.
        """
        for tensor, copy in self._copies():
            copy.copy_(tensor) if gives or late else copy.zero_()
        for dtype, flat in self._flat.items() if late or adds else ():
            flat.add_(self._begun_with[dtype], alpha=-1 if late else adds)
        add_up(list(self._flat.values()), group)
        for flat in self._flat.values() if giving > 1 else ():
            for part in _pieces(flat):
                divide(part, part, giving)

    @torch.no_grad()
    def put(self) -> None:
        """Put the copies in the place of the tensors."""
        for tensor, copy in self._copies():
            tensor.copy_(copy)

    def sum_of_squares(self) -> Tensor:
        """Of the copies, an fp64 scalar."""
        nothing = torch.zeros((), dtype=torch.float64)
        return torch.stack([nothing, *(sum_of_squares(part) for f in self._flat.values() for part in _pieces(f))]).sum()


def _pieces(flat: Tensor) -> Sequence[Tensor]:
    return torch.split(flat, max(1, PIECE // flat.element_size())) if flat.numel() else ()


def add_up(flat: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace contiguous 1-d tensors on the CPU by their sum over the ranks of a group.

    All pieces are on their way at once; where one fails, this returns when nothing writes into them any more.

    Raises:
        CollectiveError: a collective failed; the tensors hold anything.
    """
    if group.size() == 1:
        return
    works: list[dist.Work] = []
    failed: RuntimeError | None = None
    try:
        for tensor in flat:
            works += [group.allreduce([part]) for part in _pieces(tensor)]
    except RuntimeError as error:
        failed = error
    for work in works:
        try:
            work.wait()
        except RuntimeError as error:
            failed = failed or error
    if failed is not None:
        raise CollectiveError(f"an averaging over {group.size()} members failed: {failed}") from failed


@torch.no_grad()
def give_mean(tensors: Sequence[Tensor], group: dist.ProcessGroup, giving: int, *, gives: bool, takes: bool) -> None:
    """Give some ranks of a group the mean of what others hold, who keep what they have; a piece after another.

    Args:
        giving: how many ranks give; this one `gives`, or `takes`, or only passes on.
    Raises:
        CollectiveError: a collective failed; those who take hold anything.
    """
    for tensor in tensors:
        for part in _pieces(tensor.view(-1)):
            there = part.to("cpu", copy=True) if gives else torch.zeros(part.shape, dtype=part.dtype)
            add_up([there], group)
            if takes:
                part.copy_(there / giving if giving > 1 else there)


@torch.no_grad()
def give(tensor: Tensor, source: int, group: dist.ProcessGroup, *, takes: bool) -> None:
    """Give some ranks of a group a tensor of one of them, bit for bit; the others keep what they have.

    Raises:
        CollectiveError: a collective failed; those who take hold anything.
    """
    if group.size() == 1 or not tensor.numel():
        return
    there = tensor.detach().to("cpu", copy=True).contiguous()
    try:
        for part in _pieces(there.view(-1)):
            group.broadcast(part, source).wait()
    except RuntimeError as error:
        raise CollectiveError(f"sending to members that join failed: {error}") from error
    if takes:
        tensor.copy_(there)
