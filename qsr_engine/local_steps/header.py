"""What ranks say to one another at a boundary, before anything is averaged.

Where they disagree, or one of them holds parameters that are not finite, every rank raises the same error and nothing
is averaged; or the worker of such a rank is left out of the averaging.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import all_gather_flat
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.membership.facts import ranks_by_value
from qsr_engine.membership.spelling import spell_ranks


class BoundaryError(RuntimeError):
    """The ranks met at a boundary and cannot average; every rank raises it, and no parameter was changed."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What every rank says of itself at a boundary.

    The first four must be the same on all ranks, and moved 0; sum_of_squares finite, or the worker is left out; skipped
    is for the record.
    """

    step: int  # optimizer steps done
    period: int  # H of the round that ends here
    lr: float  # learning rate of the next round's first step, from which the next H follows
    digest: int  # of the configuration (config.digest), below 2^63
    sum_of_squares: float  # of the parameters that this rank holds; not finite if any is not, or one of its buffers
    moved: int = 0  # tensors that have left the buckets on this rank (Averager.moved)
    skipped: int = 0  # steps whose update this rank's worker skipped because its gradients overflowed
    stop: int = 0  # 1 where this rank was asked to stop

    _FORMAT = struct.Struct("<qqdqdqqq")

    def encode(self) -> Tensor:
        raw = self._FORMAT.pack(*dataclasses.astuple(self))
        return torch.frombuffer(bytearray(raw), dtype=torch.int64)

    @classmethod
    def decode(cls, words: Tensor) -> Header:
        return cls(*cls._FORMAT.unpack(words.contiguous().numpy().tobytes()))


def exchange_headers(
    header: Header, device: torch.device, group: Group = None, *, leave_out: bool = False, worker_size: int = 1
) -> list[Header]:
    """Gather the headers of all ranks of the group (64 bytes each) and check that they agree.

    Args:
        leave_out: parameters that are not finite are an error only where all workers have some; see not_finite().
    Raises:
        BoundaryError: on every rank, if the ranks disagree, or if parameters of one of them are not finite or have
            left the buckets.
        CollectiveError: a rank did not come.
    """
    mine = header.encode().to(device)
    ranks = dist.get_world_size(group)
    gathered = torch.empty(ranks * mine.numel(), dtype=mine.dtype, device=device)
    with collective("exchanging the boundary's headers", group):
        all_gather_flat(gathered, mine, group=group)
    headers = [Header.decode(words) for words in gathered.cpu().view(ranks, -1)]
    _check_headers(headers)
    if not leave_out or len(not_finite(headers, worker_size)) == ranks // worker_size:
        _check_finite(headers)
    return headers


def not_finite(headers: Sequence[Header], worker_size: int) -> list[int]:
    """The workers with a rank whose parameters are not finite, from the headers of all ranks."""
    ranks = [rank for rank, header in enumerate(headers) if not math.isfinite(header.sum_of_squares)]
    return sorted({rank // worker_size for rank in ranks})


def _check_headers(headers: Sequence[Header]) -> None:
    names = {
        "step": "step",
        "period": "period H",
        "lr": "learning rate",
        "digest": "digest of the configuration",
    }

    wrong = []
    for field, name in names.items():
        found = ranks_by_value([struct.pack("<d", h.lr) if field == "lr" else getattr(h, field) for h in headers])
        if len(found) > 1:
            values = "; ".join(f"{getattr(headers[r[0]], field)} on {spell_ranks(r)}" for r in found.values())
            wrong.append(f"  {name}: {values}")
    if wrong:
        raise BoundaryError(
            "the ranks disagree at a boundary, so nothing was averaged:\n" + "\n".join(wrong) + "\n"
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


def _check_finite(headers: Sequence[Header]) -> None:
    bad = [rank for rank, header in enumerate(headers) if not math.isfinite(header.sum_of_squares)]
    if bad:
        raise BoundaryError(
            f"after step {headers[0].step} the parameters are not finite (NaN or infinity) on {spell_ranks(bad)}, "
            "or the buffers that are averaged with them have become so, and nothing was averaged: the parameters of "
            "the others are unharmed. A lower learning rate, a longer warm-up or gradient clipping helps against "
            "divergence"
        )
