"""What ranks say to one another at a boundary, before anything is averaged.

Where they disagree, or one of them holds parameters that are not finite, every rank raises the same error and nothing
is averaged; or the worker of such a rank is left out of the averaging.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import struct
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import all_gather_flat
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.config.digest import digest
from qsr_engine.local_steps.rounds import SAME_RATE
from qsr_engine.membership.facts import different, ranks_by_value
from qsr_engine.membership.spelling import first_lines, spell_ranks


class BoundaryError(RuntimeError):
    """The ranks met at a boundary and cannot average; every rank raises it, and no parameter was changed."""


class Purpose(enum.IntEnum):
    """What ranks meet for."""

    BOUNDARY = 0
    AVERAGED = 1  # engine.averaged(), which every checkpoint enters too
    END_ROUND = 2


_SPELLED = {
    Purpose.BOUNDARY: "at the end of a round",
    Purpose.AVERAGED: "in engine.averaged() or save_checkpoint()",
    Purpose.END_ROUND: "in engine.end_round()",
}


@dataclasses.dataclass(frozen=True)
class Header:
    """What every rank says of itself where ranks meet.

    The first four and the purpose must be the same on all ranks, and moved 0; sum_of_squares finite, or the worker is
    left out; skipped is for the record. Learning rates may differ by what two hosts' mathematics differ by (a cosine's
    last bit); then that of rank 0 sets the next period.
    """

    step: int  # optimizer steps done
    period: int  # H of the round that ends here
    lr: float  # learning rate of the next round's first step, from which the next H follows
    digest: int  # of the configuration (config.digest), below 2^63
    sum_of_squares: float | Tensor  # of the parameters of this rank, fp64; not finite if any is not, or a buffer
    moved: int = 0  # tensors that have left the buckets on this rank (Averager.moved)
    skipped: int = 0  # steps whose update this rank's worker skipped because its gradients overflowed
    stop: int = 0  # 1 where this rank was asked to stop
    purpose: int = Purpose.BOUNDARY
    buffers: int = 0  # digest of the layout of those that are averaged, below 2^31; exchange_headers() fills it in

    _FORMAT = struct.Struct("<qqdqdqqhhi")
    _ALIKE = struct.Struct("<qqdqhi")

    def encode(self) -> Tensor:
        alone = dataclasses.replace(self, sum_of_squares=float(self.sum_of_squares))
        raw = self._FORMAT.pack(*(getattr(alone, field.name) for field in dataclasses.fields(alone)))
        return torch.frombuffer(bytearray(raw), dtype=torch.int64)

    @classmethod
    def decode(cls, words: Tensor) -> Header:
        return cls(*cls._FORMAT.unpack(words.contiguous().numpy().tobytes()))

    def alike(self) -> Tensor:
        """What must be the same on all ranks, as whole numbers below 2^16 in fp64."""
        raw = self._ALIKE.pack(self.step, self.period, self.lr, self.digest, self.purpose, self.buffers)
        return torch.frombuffer(bytearray(raw), dtype=torch.uint16).double()


@dataclasses.dataclass(frozen=True)
class Met:
    """What all ranks know after they have met and agree.

    lr: rank 0's. squares: the sum of squares of the parameters of all ranks whose workers are not left out, before the
    averaging. ranks: how many these ranks are. skipped: steps that workers skipped, added up over the ranks. stop:
    whether some rank was asked to. left_out: the numbers of the workers whose parameters are not finite. movements: of
    every worker, the sum of squares that its ranks told of their movement, 0 where it is not finite; empty where none
    was told.
    """

    lr: float
    squares: float
    ranks: int
    skipped: int
    stop: bool
    left_out: list[int]
    movements: Sequence[float] = ()


def exchange_headers(
    header: Header,
    device: torch.device,
    group: Group = None,
    *,
    buffers: Mapping[str, str] | None = None,
    leave_out: bool = False,
    worker_size: int = 1,
    movement: Tensor | None = None,
) -> Met:
    """Meet all ranks of the group, and check that they agree.

    One all-reduce of 344 bytes, whatever the number of ranks, which the host reads once; where movements are told, of 8
    more for each worker. Whole headers travel only where it shows that something is not as it should be.

    Args:
        buffers: layout of the buffers that are averaged here (Buffers.layout()). It travels where it is not the same on
            all ranks.
        leave_out: parameters that are not finite are an error only where all workers have some.
        movement: sum of squares of this rank's movement, an fp64 scalar; on every rank, or on none.
    Raises:
        BoundaryError: on every rank, if the ranks disagree, also in their buffers, or if parameters of one of them are
            not finite or have left the buckets.
        CollectiveError: a rank did not come.
    """
    header = dataclasses.replace(header, buffers=digest(buffers) % 2**31 if buffers else 0)
    ranks = dist.get_world_size(group)
    numbers = header.alike()
    counts = torch.tensor([min(header.moved, 1), header.skipped, header.stop], dtype=torch.float64)
    squares = torch.as_tensor(header.sum_of_squares, dtype=torch.float64, device=device)
    finite = squares.isfinite()
    known = torch.cat([numbers, numbers.square(), counts]).to(device, non_blocking=True)
    movements = _slot_of_this_worker(movement, device, ranks, worker_size, group)
    told = torch.cat([movements, known, (~finite).double().view(1), torch.where(finite, squares, 0.0).view(1)])
    with collective("exchanging the boundary's headers", group):
        dist.all_reduce(told, group=group)
        values = told.tolist()  # the one wait of the host
    moves, (*sums, moved, skipped, stop, not_finite, squares_of_all) = (
        values[: len(movements)],
        values[len(movements) :],
    )
    if are_alike(sums, ranks) and not moved and not not_finite:
        return Met(header.lr, squares_of_all, ranks, round(skipped), stop > 0, [], tuple(moves))
    met = _meet_again(header, device, group, buffers or {}, leave_out=leave_out, worker_size=worker_size)
    return dataclasses.replace(met, movements=tuple(moves))


def _slot_of_this_worker(
    movement: Tensor | None, device: torch.device, ranks: int, worker_size: int, group: Group
) -> Tensor:
    """A number a worker, of which this rank knows its own; nothing where there is no movement to tell."""
    if movement is None:
        return torch.zeros(0, dtype=torch.float64, device=device)
    slots = torch.zeros(ranks // worker_size, dtype=torch.float64, device=device)
    own = movement.to(device, torch.float64)
    slots[dist.get_rank(group) // worker_size] = torch.where(own.isfinite(), own, 0.0)
    return slots


def are_alike(sums: Sequence[float], ranks: int) -> bool:
    """Whether all ranks have told the same numbers x, by the sums of all x, and then those of their squares.

    n * sum(x^2) = sum(x)^2 holds for equal ones alone (Cauchy and Schwarz). In fp64 both sums are exact for whole
    numbers below 2^16 on up to 2^21 ranks.
    """
    half = len(sums) // 2
    return all(ranks * int(squares) == int(x) ** 2 for x, squares in zip(sums[:half], sums[half:], strict=True))


def _meet_again(
    header: Header,
    device: torch.device,
    group: Group,
    buffers: Mapping[str, str],
    *,
    leave_out: bool,
    worker_size: int,
) -> Met:
    """Gather the headers of all ranks (64 bytes each), and find out whose are not as they should be."""
    mine, ranks = header.encode().to(device), dist.get_world_size(group)
    gathered = torch.empty(ranks * mine.numel(), dtype=mine.dtype, device=device)
    with collective("exchanging the boundary's headers", group):
        all_gather_flat(gathered, mine, group=group)
    headers = [Header.decode(words) for words in gathered.cpu().view(ranks, -1)]
    _check_headers(headers)
    if len({found.buffers for found in headers}) > 1:
        _name_buffers(header.step, buffers, group)
    bad = not_finite(headers, worker_size)
    if not leave_out or len(bad) == ranks // worker_size:
        _check_finite(headers)
    good = [found for rank, found in enumerate(headers) if rank // worker_size not in bad]
    return Met(
        lr=headers[0].lr,
        squares=sum(float(found.sum_of_squares) for found in good),
        ranks=len(good),
        skipped=sum(found.skipped for found in headers),
        stop=any(found.stop for found in headers),
        left_out=bad,
    )


def not_finite(headers: Sequence[Header], worker_size: int) -> list[int]:
    """The workers with a rank whose parameters, or buffers, are not finite, from the headers of all ranks."""
    ranks = [rank for rank, header in enumerate(headers) if not math.isfinite(header.sum_of_squares)]
    return sorted({rank // worker_size for rank in ranks})


def _check_headers(headers: Sequence[Header]) -> None:
    names = {
        "step": "step",
        "period": "period H",
        "lr": "learning rate",
        "digest": "digest of the configuration",
    }

    if all(math.isclose(header.lr, headers[0].lr, rel_tol=SAME_RATE) for header in headers):
        del names["lr"]
    wrong = []
    for field, name in names.items():
        found = ranks_by_value([struct.pack("<d", h.lr) if field == "lr" else getattr(h, field) for h in headers])
        if len(found) > 1:
            values = "; ".join(f"{getattr(headers[r[0]], field)} on {spell_ranks(r)}" for r in found.values())
            wrong.append(f"  {name}: {values}")
    purposes = ranks_by_value([header.purpose for header in headers])
    if len(purposes) > 1:
        values = "; ".join(f"{_SPELLED[Purpose(headers[r[0]].purpose)]} on {spell_ranks(r)}" for r in purposes.values())
        wrong.append(f"  where they are: {values}; all ranks must enter it")
    if wrong:
        raise BoundaryError(
            "the ranks disagree where they meet, so nothing was averaged:\n" + "\n".join(wrong) + "\n"
            "Every rank must run the same configuration and take the same number of steps, with a learning rate that "
            "depends on the step alone."
        )
    moved = [rank for rank, header in enumerate(headers) if header.moved]
    if moved:
        raise BoundaryError(
            f"after step {headers[0].step}, {headers[moved[0]].moved} of the parameters are no longer where they are "
            f"averaged, on {spell_ranks(moved)}: they were given new storage (model.to(...), p.data = ...), or the "
            "optimizer was given others. Change layout, type and parameter groups before initialize()"
        )


def _name_buffers(step: int, layout: Mapping[str, str], group: Group) -> None:
    """Raises BoundaryError, naming the buffers that are not the same on all ranks."""
    with collective("comparing the ranks' buffers", group):
        lines = different(layout, group)
    raise BoundaryError(
        f"after step {step} the ranks have different buffers, so nothing was averaged:\n" + first_lines(lines) + "\n"
        "A buffer that is averaged must be there on every rank, in one shape and type. Register it with "
        "persistent=False, which leaves it alone, or write qsr.averaging.buffers 'local'"
    )


def _check_finite(headers: Sequence[Header]) -> None:
    bad = not_finite(headers, 1)
    if bad:
        raise BoundaryError(
            f"after step {headers[0].step} the parameters are not finite (NaN or infinity) on {spell_ranks(bad)}, "
            "or the buffers that are averaged with them have become so, and nothing was averaged: the parameters of "
            "the others are unharmed. A lower learning rate, a longer warm-up or gradient clipping helps against "
            "divergence"
        )
