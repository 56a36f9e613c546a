"""What every way to the mean has in common: the interface, who is left out, and what it costs."""

from __future__ import annotations

import abc
import atexit
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import Piece
from qsr_engine.averaging.errors import Group
from qsr_engine.averaging.gloo_threads import await_idle_threads

# At import, so that it runs after the handlers that others register later, which may still average.
atexit.register(await_idle_threads)

# torch 2.14 calls it so, and warns of the name that 2.11 has.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def ring_bytes(payload: int, ranks: int) -> int:
    """Bytes that one rank sends in a ring all-reduce of `payload` bytes: 2 (n - 1) / n times the payload.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
    """
    return 2 * (ranks - 1) * payload // ranks


def backend_of(group: Group, device: torch.device) -> str:
    """The name of the backend that carries the group's tensors on this device: "gloo", "nccl"."""
    made = group if group is not None else dist.group.WORLD
    assert made is not None
    return str(made._get_backend(device).name())


def time_out(group: Group) -> timedelta | None:
    """That of the group now: what is made without it would wait for the half hour that torch has as default."""
    made = group if group is not None else dist.group.WORLD
    assert made is not None
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    options = getattr(made._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


def piece_name(pieces: Sequence[Piece], index: int) -> str:
    return f"averaging bucket {index + 1} of {len(pieces)} ({pieces[index].nbytes / 1e6:.1f} MB)"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """The workers that are left out of a mean over a group, as one of its ranks sees it."""

    workers: tuple[int, ...] = ()  # their numbers
    ranks: int = 0  # how many ranks of the group are theirs
    here: bool = False  # whether this rank is one of them

    def with_all_ranks(self, worker_size: int) -> LeftOut:
        """The same for a mean over all ranks of the workers, where this one is over one rank of each."""
        return dataclasses.replace(self, ranks=len(self.workers) * worker_size)


NOBODY = LeftOut()


def without_beginning(key: str) -> str:
    """What is wrong with a state from inside a round that does not say what the round began with."""
    return (
        f"it is from inside a round, and does not hold what the round began with, which {key} needs now and did not "
        "then; go on with the averaging that it was saved with, or from a checkpoint on a boundary"
    )


class Reducer(abc.ABC):
    """Replaces pieces by their mean over the ranks of a group.

    Args:
        ranks: of the group.
        bytes_sent: by this rank, in one run over all pieces.
    """

    exact = True  # whether the result is the ranks' exact mean, but for the rounding of its type

    def __init__(self, pieces: Sequence[Piece], ranks: int, bytes_sent: int) -> None:
        self.pieces = list(pieces)
        self.ranks = ranks
        self.bytes_sent = bytes_sent

    def run(self, order: Sequence[int], left_out: LeftOut = NOBODY) -> Iterator[tuple[int, Tensor | None]]:
        """Average the pieces, those that come first in `order` first; ranks that are left out get the others' mean.

        What the pieces hold on a rank that is left out is lost when this returns: before the run's first collective,
        for which the others wait before they read this rank's memory.

        Yields:
            (index of a piece that now is the mean, its sum of squares where that was measured on the way, an fp64
            scalar on the device of the piece, whose value is there when the run has ended).
        Raises:
            CollectiveError: a collective failed.
        """
        if left_out.here:
            self._add_nothing()
        return self._run(order, self.ranks - left_out.ranks)

    @abc.abstractmethod
    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        """As run(), of what the pieces hold on all ranks: the sum over the divisor."""

    @torch.no_grad()
    def _add_nothing(self) -> None:
        """Let the pieces hold what adds nothing to the sum."""
        for piece in self.pieces:
            torch._foreach_zero_(list(piece.tensors))

    def bytes_of(self, pieces: Iterable[int]) -> int:
        """Bytes that this rank sends in one run over these pieces."""
        return ring_bytes(sum(self.pieces[index].nbytes for index in pieces), self.ranks)

    @property
    def way(self) -> str:
        """Its name in records and reports."""
        return type(self).__name__

    # Most have nothing to remember from one run to the next, and nothing to free.

    def moved(self, index: int) -> None:  # noqa: B027
        """A piece that run() has yielded was changed, alike on every rank, before the next run begins."""

    def round_lasted(self, units: float) -> None:  # noqa: B027
        """The round that the next run() ends was so long, in units of qsr.outer.unit_steps; without it, 1."""

    def begin_round(self) -> None:  # noqa: B027
        """The pieces hold the same values on every rank, to which no run has brought them: local steps begin."""

    def restart(self) -> None:  # noqa: B027
        """The pieces have been loaded, the same on every rank: forget what earlier runs left."""

    def state_dict(self, *, inside_round: bool = False) -> dict[str, Any]:
        """What this rank carries over from one run to the next; inside a round also what the round began with, where
        the pieces have moved on from it and the next run needs it."""
        return {}

    def load_state_dict(self, state: dict[str, Any], *, inside_round: bool = False) -> None:  # noqa: B027
        """Go on from a state_dict(), after restart(). Raises ValueError if it is of other pieces, or from inside a
        round of a run that averaged in another way and did not keep what this one needs."""

    def close(self) -> None:  # noqa: B027
        """Free what must not outlive the process group. Again is harmless."""
