"""Flat buckets: where every element of many tensors lies, and which pieces of them one collective carries."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.errors import Group

ALIGNMENT = 64  # bytes; segments of a bucket start on a cache line, where vector instructions are fastest
SMALL = 1_000_000  # bytes; smaller tensors travel together, since a collective of their own costs as much as 1 MB does
FIRST = 1 << 20  # bytes of the first pieces; a power of two, so that on the wire whole blocks need no padding
PIECE = 16_000_000  # bytes that are on their way as one; beyond it, the size hardly matters to gloo

# Size of a bucket in MB (1e6 bytes) where the configuration gives none, for the backend of the group. Measured for
# gloo (python -m benchmarks.averaging --bucket-sizes): a forward that waits for its first bucket begins the sooner,
# the smaller it is. For NCCL it is not measured.
BUCKET_MB = {"gloo": PIECE / 1e6, "nccl": 64.0}


def bucket_bytes(bucket_mb: float | None, group: Group) -> int:
    """Size of a bucket in bytes: as configured, or the default of the group's backend."""
    if bucket_mb is None:
        bucket_mb = BUCKET_MB.get(dist.get_backend(group), BUCKET_MB["nccl"])
    return int(bucket_mb * 1e6)


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
        The buckets, 1-d and contiguous, each of one data type and device. Gaps between segments are zero. On a CPU
        they are views of one storage, so that another process needs one mapping to see them.
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
    planned = []
    for (device, dtype), same in by_kind.items():
        segments = _segments(same)
        sizes = [segment.stop - segment.start for segment in segments]
        for plan in plan_buckets(sizes, bucket_bytes // dtype.itemsize, max(1, ALIGNMENT // dtype.itemsize)):
            planned.append((plan.numel * dtype.itemsize, device, dtype, [(segments[i], at) for i, at in plan.slots]))
    room = iter(torch.split(*_arena([nbytes for nbytes, device, *_ in planned if device.type == "cpu"])))
    buckets = []
    for nbytes, device, dtype, slots in planned:
        memory = next(room)[:nbytes] if device.type == "cpu" else torch.zeros(nbytes, dtype=torch.uint8, device=device)
        buckets.append(memory.view(dtype))
        for segment, offset in slots:
            _move(segment, buckets[-1], offset)
    return buckets


def _arena(sizes: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Zeros, as bytes, with room for parts of so many bytes, and the lengths of these, which end on cache lines.

    Nothing is taken from the system before it is written to.
    """
    lengths = [math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes]
    return torch.zeros(sum(lengths), dtype=torch.uint8), lengths


@torch.no_grad()
def _move(segment: _Segment, flat: Tensor, offset: int) -> None:
    size = segment.stop - segment.start
    source = torch.as_strided(segment.tensors[0].detach(), (size,), (1,), segment.start)
    flat[offset : offset + size].copy_(source)
    for tensor in segment.tensors:
        start = flat.storage_offset() + offset + tensor.storage_offset() - segment.start
        tensor.data = torch.as_strided(flat, tensor.shape, tensor.stride(), start)


def place_in(tensor: Tensor, buckets: Sequence[Tensor]) -> tuple[int, int, int]:
    """(number of the bucket, start, stop) in elements, of the memory that a dense tensor covers."""
    for number, bucket in enumerate(buckets):
        start, rest = divmod(tensor.data_ptr() - bucket.data_ptr(), bucket.element_size())
        if rest == 0 and 0 <= start < bucket.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            return number, start, start + last + 1
    raise RuntimeError(f"a parameter of shape {tuple(tensor.shape)} is in none of the buckets")


class Places:
    """Where tensors lie in memory.

    Args:
        tensors: gives them, always the same ones.
    """

    def __init__(self, tensors: Callable[[], Sequence[Tensor]]) -> None:
        self._tensors = tensors
        self._before = self._now()

    def _now(self) -> list[tuple[int, torch.Size, tuple[int, ...], torch.dtype]]:
        return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in self._tensors()]

    def changed(self) -> int:
        """How many tensors were given new storage, added or taken away since this object was made."""
        now = self._now()
        moved = sum(place != before for place, before in zip(now, self._before, strict=False))
        return moved + abs(len(now) - len(self._before))


# ----------------------------------------------------------------------------------------------------- pieces


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one collective carries: one flat tensor, in place, or several tensors that are packed for it."""

    tensors: tuple[Tensor, ...]
    in_place: bool

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @torch.no_grad()
    def flat(self, into: Tensor | None = None) -> Tensor:
        """A copy of its values, 1-d: the tensors one after another."""
        made = torch.empty(self.numel, dtype=self.dtype, device=self.device) if into is None else into
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors], out=made)

    @torch.no_grad()
    def fill(self, values: Tensor) -> None:
        """Copy what flat() gives back into the tensors."""
        parts = torch.split(values, [tensor.numel() for tensor in self.tensors])
        torch._foreach_copy_(list(self.tensors), [p.view(t.shape) for p, t in zip(parts, self.tensors, strict=True)])


def pieces_in_place(buckets: Sequence[Tensor], capacity: int) -> list[Piece]:
    """Pieces of about `capacity` bytes of flat buckets. Every element is in exactly one piece.

    A bucket that is larger is split evenly. Buckets below SMALL bytes are packed together, where there are several.
    """
    small = [bucket for bucket in buckets if 0 < _nbytes(bucket) < min(SMALL, capacity)]
    packed = packed_pieces(small, capacity) if len(small) > 1 else []
    together = {id(tensor) for piece in packed if len(piece.tensors) > 1 for tensor in piece.tensors}
    alone = [
        Piece((part,), in_place=True)
        for bucket in buckets
        if bucket.numel() and id(bucket) not in together
        for part in _split(bucket, capacity)
    ]
    return alone + [piece for piece in packed if len(piece.tensors) > 1]


def joined(buckets: Sequence[Tensor]) -> list[Tensor]:
    """The same elements in fewer 1-d views: those that follow one another in memory without a gap become one."""
    found: list[Tensor] = []
    for bucket in buckets:
        last = found[-1] if found else None
        if (
            last is not None
            and last.dtype == bucket.dtype
            and last.untyped_storage().data_ptr() == bucket.untyped_storage().data_ptr()
            and last.storage_offset() + last.numel() == bucket.storage_offset()
        ):
            size = last.numel() + bucket.numel()
            found[-1] = torch.as_strided(last, (size,), (1,), last.storage_offset())
        else:
            found.append(bucket)
    return found


def parts_within(flat: Tensor, buckets: Iterable[Tensor]) -> list[Tensor]:
    """Views of a 1-d tensor, each of what lies in one of the buckets."""
    (start, stop), found = _span(flat), []
    for first, end in map(_span, buckets):
        lo, hi = max(start, first), min(stop, end)
        if lo < hi:
            found.append(flat[(lo - start) // flat.element_size() : (hi - start) // flat.element_size()])
    return found


def small_first(buckets: Sequence[Tensor], capacity: int) -> list[Tensor]:
    """Views of flat buckets that together are all of their elements, cut so that the first pieces are small.

    Four of FIRST bytes, four of twice as many, and so on up to `capacity`. gloo has two on their way at a time, which
    share the network: a forward that waits for its first parameters waits for a few MB, and later on for little more
    than it has read. No rest below FIRST is cut off.
    """
    cut: list[Tensor] = []
    cuts = 0
    for bucket in buckets:
        rest = bucket
        while (size := FIRST << cuts // 4) < capacity and _nbytes(rest) >= size + FIRST:
            numel = size // bucket.element_size()
            cut.append(rest[:numel])
            rest = rest[numel:]
            cuts += 1
        cut.append(rest)
    return cut


def packed_pieces(tensors: Sequence[Tensor], capacity: int) -> list[Piece]:
    """Pieces of at most `capacity` bytes of tensors that must stay where they are.

    A contiguous tensor that is larger is split; one that is not contiguous is packed whole.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        parts = _split(tensor.detach().view(-1), capacity) if tensor.is_contiguous() else [tensor.detach()]
        whole = len(parts) == 1
        by_kind[tensor.device, tensor.dtype] += [tensor] if whole else parts
    return [
        Piece(tuple(same[index] for index, _ in plan.slots), in_place=False)
        for (_, dtype), same in by_kind.items()
        for plan in plan_buckets([tensor.numel() for tensor in same], capacity // dtype.itemsize)
    ]


def _split(flat: Tensor, capacity: int) -> list[Tensor]:
    """Equal parts of at most about capacity bytes, cut on cache lines; a tensor that fits stays the same object."""
    parts = math.ceil(_nbytes(flat) / capacity)
    if parts <= 1:
        return [flat]
    line = max(1, ALIGNMENT // flat.element_size())
    return list(torch.split(flat, math.ceil(flat.numel() / parts / line) * line))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def pieces_of(
    places: Sequence[tuple[Tensor, int, int, int]], buckets: Sequence[Tensor], pieces: Sequence[Piece]
) -> dict[Tensor, tuple[int, ...]]:
    """Which pieces each tensor lies in, given (tensor, bucket, start, stop) in elements of the bucket."""
    spans = [(index, *_span(part)) for index, piece in enumerate(pieces) for part in piece.tensors]
    found = {}
    for tensor, bucket, start, stop in places:
        lo, hi = _span(buckets[bucket][start:stop])
        found[tensor] = tuple(dict.fromkeys(index for index, first, end in spans if first < hi and lo < end))
    return found


def _span(flat: Tensor) -> tuple[int, int]:
    """First and last address of a 1-d tensor's bytes, the last one excluded."""
    return flat.data_ptr(), flat.data_ptr() + _nbytes(flat)
