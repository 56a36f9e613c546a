"""Averaging of tensors over the workers, in flat buckets and in place.

What happens at a boundary, in this order:

1. every rank reads its buckets once: their sum of squares says whether they are finite, and gives the distance;
2. all ranks exchange a header (`exchange_headers`); where they disagree, every rank raises and nothing is averaged;
3. all buckets are all-reduced in flight together, in place, and divided by the number of workers;
4. the averaged buckets are read once, for the distance of the workers from their average.

This file knows tensors and process groups, and no engine. Parameters that may move become views of the buckets once
(`flat_buckets`), so that an averaging copies nothing; flat tensors that exist already, such as ZeRO's masters, are
buckets as they are; tensors that must stay where they are go through one staging bucket (`average_packed`).
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.config import digest

ALIGNMENT = 64  # bytes; segments of a bucket start on a cache line, where vector instructions are fastest
Group = dist.ProcessGroup | None  # None is the group of all ranks


class BoundaryError(RuntimeError):
    """The ranks met at a boundary and cannot average; every rank raises it, and no parameter was changed."""


class AgreementError(RuntimeError):
    """The ranks were started with different facts (configuration, data, model); every rank raises it."""


# ---------------------------------------------------------------------------------------------------- buckets


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Placement of segments in one flat buffer: (index of the segment, offset), both in elements."""

    numel: int
    slots: tuple[tuple[int, int], ...]


def plan_buckets(sizes: Sequence[int], capacity: int, alignment: int = 1) -> list[Bucket]:
    """Pack segments of `sizes` elements into buckets of about `capacity` elements, in their order.

    Every segment is in exactly one bucket, whole; one that is larger than a bucket gets a bucket of its own. Offsets
    are multiples of `alignment` elements. Empty segments are left out.
    """
    buckets: list[Bucket] = []
    slots: list[tuple[int, int]] = []
    end = 0
    for index, size in enumerate(sizes):
        if size == 0:
            continue
        offset = math.ceil(end / alignment) * alignment
        if slots and offset + size > capacity:
            buckets.append(Bucket(end, tuple(slots)))
            slots, offset = [], 0
        slots.append((index, offset))
        end = offset + size
    if slots:
        buckets.append(Bucket(end, tuple(slots)))
    return buckets


@dataclasses.dataclass
class _Segment:
    """A run of elements in one storage, start .. stop, and the tensors that lie in it."""

    start: int
    stop: int
    tensors: list[Tensor]


def _segments(tensors: Iterable[Tensor]) -> list[_Segment]:
    """Runs of elements that the tensors occupy; tensors that overlap in memory share one."""
    by_storage: dict[int, list[_Segment]] = defaultdict(list)
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = int(tensor.storage_offset())
            by_storage[tensor.untyped_storage().data_ptr()].append(_Segment(start, start + int(last) + 1, [tensor]))
    merged: list[_Segment] = []
    for found in by_storage.values():
        found.sort(key=lambda segment: segment.start)
        current = found[0]
        merged.append(current)
        for segment in found[1:]:
            if segment.start < current.stop:
                current.stop = max(current.stop, segment.stop)
                current.tensors += segment.tensors
            else:
                current = segment
                merged.append(current)
    return merged


def flat_buckets(tensors: Iterable[Tensor], bucket_bytes: int) -> list[Tensor]:
    """Move tensors into flat buckets; each keeps its shape, strides and values and becomes a view of its bucket.

    Tensors that overlap in memory (shared weights) still overlap afterwards. A tensor given twice is moved once.

    Args:
        tensors: floating-point tensors; their `.data` is replaced, once.
        bucket_bytes: size of a bucket; a larger tensor has a bucket of its own.
    Returns:
        The buckets, 1-d and contiguous, each of one data type and device. Gaps between segments are zero.
    Raises:
        TypeError: a tensor is not a dense floating-point tensor.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise TypeError(
                f"a tensor of dtype {tensor.dtype}, layout {tensor.layout} and shape {tuple(tensor.shape)} cannot be "
                "averaged; only dense floating-point tensors can"
            )
        by_kind[tensor.device, tensor.dtype].append(tensor)
    buckets = []
    for (device, dtype), same in by_kind.items():
        segments = _segments(same)
        sizes = [segment.stop - segment.start for segment in segments]
        for plan in plan_buckets(sizes, bucket_bytes // dtype.itemsize, max(1, ALIGNMENT // dtype.itemsize)):
            flat = torch.zeros(plan.numel, dtype=dtype, device=device)
            for index, offset in plan.slots:
                _move(segments[index], flat, offset)
            buckets.append(flat)
    return buckets


@torch.no_grad()
def _move(segment: _Segment, flat: Tensor, offset: int) -> None:
    size = segment.stop - segment.start
    source = torch.as_strided(segment.tensors[0].detach(), (size,), (1,), segment.start)
    flat[offset : offset + size].copy_(source)
    for tensor in segment.tensors:
        start = offset + tensor.storage_offset() - segment.start
        tensor.data = torch.as_strided(flat, tensor.shape, tensor.stride(), start)


# -------------------------------------------------------------------------------------------------- averaging


class Averager:
    """Averages buckets over the ranks of a group, in place, with no extra memory.

    Args:
        buckets: 1-d contiguous floating-point tensors, of the same sizes and order on every rank of the group.
        group: the ranks that average with one another, one from each worker.
        shard_group: the ranks of one worker where each holds a part of the parameters (ZeRO); None where every rank
            holds them all.
        tensors: gives the tensors whose values the buckets hold, always the same ones; `moved()` looks at them.
    """

    def __init__(
        self,
        buckets: Sequence[Tensor],
        group: Group,
        shard_group: Group = None,
        tensors: Callable[[], Sequence[Tensor]] = lambda: (),
    ) -> None:
        self.buckets = list(buckets)
        self._tensors = tensors
        self._places = [_place(tensor) for tensor in tensors()]
        self.group = group
        self.workers = dist.get_world_size(group)
        self._shard_group = shard_group if shard_group and dist.get_world_size(shard_group) > 1 else None
        payload = sum(bucket.numel() * bucket.element_size() for bucket in self.buckets)
        self.bytes_per_averaging = ring_bytes(payload, self.workers)

    def average(self) -> None:
        """Replace every bucket by its mean over the group."""
        all_reduce_mean(self.buckets, self.group)

    def moved(self) -> int:
        """How many tensors have left the buckets since they were made: were given new storage, added or taken away.

        Averaging the buckets would not reach them.
        """
        places = [_place(tensor) for tensor in self._tensors()]
        changed = sum(now != before for now, before in zip(places, self._places, strict=False))
        return changed + abs(len(places) - len(self._places))

    def sum_of_squares(self) -> float:
        """Sum of squares of all elements, added up in double precision; not finite if any element is not."""
        return sum(_sum_of_squares(bucket) for bucket in self.buckets)

    def relative_distance(self, headers: Sequence[Header]) -> float:
        """Distance of the workers from their average, relative to it: sqrt(mean_k |x_k - x|^2) / |x|, |.| the L2 norm.

        Called after average(), with the headers exchanged before it. Uses sum_k |x_k - x|^2 = sum_k |x_k|^2 - K |x|^2,
        so that no copy of the parameters is needed. Below about 1e-5 the rounding of fp32 parameters drowns it.
        """
        after = torch.tensor(self.sum_of_squares(), dtype=torch.float64)
        copies = len(headers)
        if self._shard_group is not None:
            after = after.to(self.buckets[0].device)
            dist.all_reduce(after, group=self._shard_group)
            copies = self.workers
        total = after.item() * copies
        before = sum(header.sum_of_squares for header in headers)
        return math.sqrt(max(0.0, before / total - 1)) if total > 0 else 0.0


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def ring_bytes(payload: int, ranks: int) -> int:
    """Bytes that one rank sends in a ring all-reduce of `payload` bytes: 2 (n - 1) / n times the payload.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
    """
    return 2 * (ranks - 1) * payload // ranks


@torch.no_grad()
def all_reduce_mean(tensors: Sequence[Tensor], group: Group) -> None:
    """Replace each contiguous tensor by its mean over the group; all of them are in flight together."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return
    works = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in tensors]
    for tensor, work in zip(tensors, works, strict=True):
        work.wait()
        tensor.div_(ranks)


@torch.no_grad()
def average_packed(tensors: Sequence[Tensor], group: Group, bucket_bytes: int) -> int:
    """Average tensors that must stay where they are, through one staging bucket at a time.

    Returns:
        Bytes that this rank sent (see ring_bytes).
    """
    sent = 0
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_kind[tensor.device, tensor.dtype].append(tensor)
    for (device, dtype), same in by_kind.items():
        for plan in plan_buckets([tensor.numel() for tensor in same], bucket_bytes // dtype.itemsize):
            staging = torch.empty(plan.numel, dtype=dtype, device=device)
            views = [staging[at : at + same[index].numel()].view(same[index].shape) for index, at in plan.slots]
            here = [same[index] for index, _ in plan.slots]
            torch._foreach_copy_(views, here)
            all_reduce_mean([staging], group)
            torch._foreach_copy_(here, views)
            sent += ring_bytes(staging.numel() * staging.element_size(), dist.get_world_size(group))
    return sent


def _sum_of_squares(flat: Tensor) -> float:
    if flat.is_cuda:
        return float(torch.linalg.vector_norm(flat, dtype=torch.float64).item() ** 2)
    # Chunks that stay in cache: on a CPU, vector_norm in double precision takes ten times as long.
    total = 0.0
    for chunk in torch.split(flat.detach(), 1 << 16):
        double = chunk.double()
        total += torch.dot(double, double).item()
    return total


# ------------------------------------------------------------------------------------- agreement between ranks


@dataclasses.dataclass(frozen=True)
class Header:
    """What every rank says of itself at a boundary.

    The first four must be the same on all ranks, sum_of_squares finite and moved 0.
    """

    step: int  # optimizer steps done
    period: int  # H of the round that ends here
    lr: float  # learning rate of the next round's first step, from which the next H follows
    digest: int  # of the configuration (config.digest), below 2^63
    sum_of_squares: float  # of the parameters that this rank holds; not finite if any of them is not
    moved: int = 0  # tensors that have left the buckets on this rank (Averager.moved)

    _FORMAT = struct.Struct("<qqdqdq")

    def encode(self) -> Tensor:
        raw = self._FORMAT.pack(self.step, self.period, self.lr, self.digest, self.sum_of_squares, self.moved)
        return torch.frombuffer(bytearray(raw), dtype=torch.int64)

    @classmethod
    def decode(cls, words: Tensor) -> Header:
        return cls(*cls._FORMAT.unpack(words.contiguous().numpy().tobytes()))


def exchange_headers(header: Header, device: torch.device, group: Group = None) -> list[Header]:
    """Gather the headers of all ranks of the group (48 bytes each) and check that they agree.

    Raises:
        BoundaryError: on every rank, if the ranks disagree, or if parameters of one of them are not finite or have
            left the buckets.
    """
    mine = header.encode().to(device)
    ranks = dist.get_world_size(group)
    gathered = torch.empty(ranks * mine.numel(), dtype=mine.dtype, device=device)
    dist.all_gather_into_tensor(gathered, mine, group=group)
    headers = [Header.decode(words) for words in gathered.cpu().view(ranks, -1)]
    _check_headers(headers)
    return headers


def _check_headers(headers: Sequence[Header]) -> None:
    names = {"step": "step", "period": "period H", "lr": "learning rate", "digest": "digest of the configuration"}
    wrong = []
    for field, name in names.items():
        found = _ranks_by_value([struct.pack("<d", h.lr) if field == "lr" else getattr(h, field) for h in headers])
        if len(found) > 1:
            values = "; ".join(f"{getattr(headers[r[0]], field)} on {_ranks(r)}" for r in found.values())
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
            f"averaged, on {_ranks(moved)}: they were given new storage (model.to(...), p.data = ...), or the "
            "optimizer was given others. Change layout, type and parameter groups before initialize()"
        )
    bad = [rank for rank, header in enumerate(headers) if not math.isfinite(header.sum_of_squares)]
    if bad:
        raise BoundaryError(
            f"after step {headers[0].step} the parameters are not finite (NaN or infinity) on {_ranks(bad)}, so "
            "nothing was averaged and the parameters of the other ranks are unharmed; a lower learning rate, a longer "
            "warm-up or gradient clipping helps against divergence"
        )


_LINES = 20  # differences that an error spells out


def check_agreement(facts: Mapping[str, Any], device: torch.device, group: Group = None) -> None:
    """Compare facts (nested mappings of plain values) between all ranks of the group.

    Digests are compared first, so that facts travel only where they differ.

    Raises:
        AgreementError: on every rank, naming each fact that differs, its values, and the ranks.
    """
    ranks = dist.get_world_size(group)
    digests = torch.empty(ranks, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(digests, torch.tensor([digest(facts)], device=device), group=group)
    if bool((digests == digests[0]).all()):
        return
    gathered: list[dict[str, Any]] = [{} for _ in range(ranks)]
    dist.all_gather_object(gathered, dict(_flatten(facts)), group=group)
    lines = []
    for key in sorted(set().union(*gathered)):
        found = _ranks_by_value([repr(ranks_facts.get(key, "nothing")) for ranks_facts in gathered])
        if len(found) > 1:
            lines.append(f"  {key}: " + "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in found.items()))
    if lines:
        more = [f"  ... and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        raise AgreementError(
            "the ranks were not started alike:\n"
            + "\n".join(lines[:_LINES] + more)
            + "\nStart every rank with the same configuration."
        )


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _ranks_by_value(values: Sequence[Any]) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
