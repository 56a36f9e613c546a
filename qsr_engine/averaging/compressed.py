"""The mean with fewer bits on the wire: of the differences from the last average, in bf16, fp16 or int8.

After an averaging all workers hold the same parameters, and a round moves each of them a little. What travels is that
little, so that the rounding error is relative to the move and not to the parameter. Every rank keeps the last average
(one copy of what is averaged); for one piece of n elements over K ranks:

    encode       difference = parameter - last average, rounded to the wire's type
    all-to-all   rank r receives the r-th part of all K differences
    reduce       the part's mean is computed in fp32, and rounded to the wire's type
    all-gather   every rank receives all parts of the rounded mean
    decode       parameter = last average = last average + mean, the same bits on every rank

It sends as much as a ring all-reduce of the wire's type, and rounds twice whatever K is. fp16 and int8 carry a scale
for every block of at most BLOCK elements. int8 also carries its rounding error into the next averaging, at both
roundings (error feedback: Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; of the mean as well:
Tang et al., "DoubleSqueeze", ICML 2019).

What the ranks send one another lies as one matrix, a row a rank, and is worked on in tiles of it: how many kernels a
piece takes depends on its size, and not on K.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import Piece
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.reducer import Reducer, all_gather_flat, piece_name, without_beginning

WireType = Literal["bf16", "fp16", "int8"]
BLOCK = 512  # elements with one scale, at most
PADDING = 1 << 16  # elements that a piece is padded by at most; up to it blocks, and so roundings, do not depend on K
_TILE = {"cpu": 256 * BLOCK, "cuda": 32768 * BLOCK}  # elements worked on at once: cache of a core, launches of a GPU


@dataclasses.dataclass(frozen=True)
class Format:
    """How the elements of a piece are laid out as bytes, a row for each rank: rounded values, then the blocks' scales.

    Args:
        numel: of the piece. Rows are of one length; what is beyond the piece is zeros.
    """

    wire: WireType
    ranks: int
    numel: int

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}[self.wire]

    @functools.cached_property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.numel // (self.ranks * BLOCK))

    @functools.cached_property
    def block(self) -> int:
        """Elements of a block. Of many workers as few as it can be, where the scales lie at multiples of 4 bytes."""
        if self.ranks * BLOCK <= PADDING:
            return BLOCK
        line = {"bf16": 1, "fp16": 2, "int8": 4}[self.wire]
        return -(-self.numel // (self.ranks * self.blocks * line)) * line

    @property
    def part(self) -> int:
        """Elements of a row."""
        return self.blocks * self.block

    @property
    def nbytes(self) -> int:
        """Of a row."""
        return self.part * self.dtype.itemsize + (0 if self.wire == "bf16" else 4 * self.blocks)

    @property
    def sent(self) -> int:
        """Bytes that one rank sends."""
        return 2 * (self.ranks - 1) * self.nbytes

    def tiles(self, rows: int, size: int) -> Iterator[tuple[slice, slice]]:
        """(rows, blocks of each) of about `size` elements: several whole rows, or a part of one."""
        step = max(1, size // self.part)
        wide = self.blocks if step > 1 else max(1, size // self.block)
        for row in range(0, rows, step):
            for first in range(0, self.blocks, wide):
                yield slice(row, min(row + step, rows)), slice(first, min(first + wide, self.blocks))

    def span(self, rows: slice, blocks: slice) -> tuple[int, int]:
        """First element of a tile in the piece, and how many they are with padding: they follow one another."""
        width = blocks.stop - blocks.start
        return rows.start * self.part + blocks.start * self.block, (rows.stop - rows.start) * width * self.block

    def views(self, matrix: Tensor, rows: slice, blocks: slice) -> tuple[Tensor, Tensor]:
        """(values [rows, blocks, block], scales [rows, blocks, 1]) of a tile in bytes [rows, nbytes]; none of bf16."""
        end = self.part * self.dtype.itemsize
        values = matrix[rows, :end].view(self.dtype).view(-1, self.blocks, self.block)[:, blocks]
        if self.wire == "bf16":
            return values, values
        return values, matrix[rows, end:].view(torch.float32)[:, blocks, None]

    def encode(self, source: Tensor, values: Tensor, scales: Tensor) -> None:
        """Round the fp32 source, 1-d and as large as values, into values and scales; it is used up."""
        blocks = source.view(values.shape)
        if self.wire != "bf16":
            largest = torch.maximum(blocks.amax(2, keepdim=True), blocks.amin(2, keepdim=True).neg_())
            # For fp16 a power of two, so that scaling does not round.
            scale = largest / 127 if self.wire == "int8" else largest.log2().floor().exp2()
            scale = torch.where(largest > 0, scale, 1.0)
            scales.copy_(scale)
            blocks /= scale
            if self.wire == "int8":
                source.round_().clamp_(-127, 127)
        values.copy_(blocks)

    def add(self, target: Tensor, values: Tensor, scales: Tensor) -> None:
        """target, 1-d and as large as values, += the rounded values."""
        blocks = target.view(values.shape)
        if self.wire == "bf16":
            blocks += values
        else:
            blocks.addcmul_(values.float(), scales)

    def add_up(self, values: Tensor, scales: Tensor, scratch: Tensor, total: Tensor) -> None:
        """total, 1-d, as large as a row = the rounded values, summed over the rows; scratch is as large as values."""
        into = total.view(values.shape[1:])
        if self.wire == "bf16":
            torch.sum(values, 0, dtype=torch.float32, out=into)
        else:
            torch.sum(torch.mul(values, scales, out=scratch.view(values.shape)), 0, out=into)


class Compressed(Reducer):
    """The mean of differences in a type of fewer bits. At most two pieces are in flight at a time.

    Args:
        pieces: they hold the same values on every rank of the group now. Up to six of them take memory, as they
            travel, from the first run on.
    """

    exact = False

    def __init__(self, pieces: Sequence[Piece], group: Group, wire: WireType) -> None:
        ranks = dist.get_world_size(group)
        self._formats = [Format(wire, ranks, piece.numel) for piece in pieces]
        super().__init__(pieces, ranks, sum(shape.sent for shape in self._formats))
        self.group = group
        self._anchors = [piece.flat() for piece in self.pieces]
        self._memory: dict[torch.device, Tensor] = {}
        self._packed: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._staging: dict[torch.device, list[_Buffers]] = {}
        self._residuals: list[tuple[Tensor, Tensor]] = []  # of this rank's differences, of the mean of its part
        if wire == "int8":
            self._residuals = [
                (
                    torch.zeros(piece.numel, dtype=torch.float32, device=piece.device),
                    torch.zeros(shape.part, dtype=torch.float32, device=piece.device),
                )
                for piece, shape in zip(self.pieces, self._formats, strict=True)
            ]

    def bytes_of(self, pieces: Iterable[int]) -> int:
        return sum(self._formats[index].sent for index in pieces)

    @torch.no_grad()
    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        if self.ranks == 1:
            yield from ((index, None) for index in order)
            return
        free = {device: list(buffers) for device, buffers in self._made_staging().items()}
        sending: deque[_Exchange] = deque()
        gathering: deque[_Exchange] = deque()
        waiting = deque(order)
        while waiting or sending or gathering:
            if waiting:
                index = waiting.popleft()
                sending.append(self._send(index, free[self.pieces[index].device].pop()))
            if sending and (len(sending) == 2 or not waiting):
                gathering.append(self._reduce(sending.popleft(), divisor))
            if gathering and (len(gathering) == 2 or not (waiting or sending)):
                done = gathering.popleft()
                self._apply(done)
                free[self.pieces[done.index].device].append(done.buffers)
                yield done.index, None

    def _made_staging(self) -> dict[torch.device, list[_Buffers]]:
        """Bytes for the three exchanges that are there at a time, made at the first run and kept."""
        if not self._staging:
            largest: dict[torch.device, int] = {}
            for piece, shape in zip(self.pieces, self._formats, strict=True):
                largest[piece.device] = max(largest.get(piece.device, 0), self.ranks * shape.nbytes)
            for device, size in largest.items():
                pairs = torch.empty(3, 2, size, dtype=torch.uint8, device=device)
                self._staging[device] = [_Buffers(outgoing, incoming) for outgoing, incoming in pairs]
        return self._staging

    def _send(self, index: int, buffers: _Buffers) -> _Exchange:
        """Encode this rank's difference and send to every rank its part."""
        piece, shape = self.pieces[index], self._formats[index]
        outgoing, incoming = buffers.of(self.ranks, shape.nbytes)
        residual = self._residuals[index][0] if self._residuals else None
        flat, anchor = piece.tensors[0] if piece.in_place else self._pack(piece), self._anchors[index]
        for rows, blocks in shape.tiles(self.ranks, self._tile(index)):
            lo, size = shape.span(rows, blocks)
            n = max(0, min(size, piece.numel - lo))
            difference = self._scratch(index, size)
            torch.sub(flat[lo : lo + n], anchor[lo : lo + n], out=difference[:n])
            if n < size:
                difference[n:] = 0
            carried = None if residual is None else residual[lo : lo + n]
            self._encode(shape, difference, shape.views(outgoing, rows, blocks), carried)
        with self._naming(index):
            work = dist.all_to_all_single(incoming, outgoing, group=self.group, async_op=True)
        assert work is not None
        return _Exchange(index, buffers, work)

    def _reduce(self, exchange: _Exchange, divisor: int) -> _Exchange:
        """Average what arrived, this rank's part of all differences, and send it to every rank.

        Encoded where the part of the first rank lay.
        """
        index, shape = exchange.index, self._formats[exchange.index]
        with self._naming(index):
            exchange.work.wait()
        gathered, incoming = exchange.buffers.of(self.ranks, shape.nbytes)  # what was to be sent has arrived everywhere
        residual = self._residuals[index][1] if self._residuals else None
        everybody, mine = slice(0, self.ranks), slice(0, 1)
        for _, blocks in shape.tiles(1, self._tile(index) // self.ranks):
            start, size = shape.span(mine, blocks)
            memory = self._scratch(index, (self.ranks + 1) * size)
            mean = memory[:size]
            shape.add_up(*shape.views(incoming, everybody, blocks), memory[size:], mean)
            mean /= divisor
            carried = None if residual is None else residual[start : start + size]
            self._encode(shape, mean, shape.views(incoming, mine, blocks), carried)
        with self._naming(index):
            work = all_gather_flat(gathered.view(-1), incoming[0], group=self.group, async_op=True)
        assert work is not None
        return _Exchange(index, exchange.buffers, work)

    def _apply(self, exchange: _Exchange) -> None:
        """Add the mean difference to the last average; that is the new average, and the parameter."""
        index, piece, shape = exchange.index, self.pieces[exchange.index], self._formats[exchange.index]
        with self._naming(index):
            exchange.work.wait()
        gathered, _ = exchange.buffers.of(self.ranks, shape.nbytes)
        anchor = self._anchors[index]
        for rows, blocks in shape.tiles(self.ranks, self._tile(index)):
            lo, size = shape.span(rows, blocks)
            n = max(0, min(size, piece.numel - lo))
            views = shape.views(gathered, rows, blocks)
            if n == size and anchor.dtype != torch.float64:
                shape.add(anchor[lo : lo + n], *views)
            else:  # the end of a piece, which padding follows
                mean = self._scratch(index, size).zero_()
                shape.add(mean, *views)
                anchor[lo : lo + n] += mean[:n]
            if piece.in_place:
                piece.tensors[0][lo : lo + n] = anchor[lo : lo + n]
        if not piece.in_place:
            piece.fill(anchor)

    def _encode(self, shape: Format, source: Tensor, into: tuple[Tensor, Tensor], carried: Tensor | None) -> None:
        """Write the source, used up, into the values and scales of a tile, with what the last rounding left.

        carried [at most numel]: added before rounding, and replaced by what this rounding leaves.
        """
        if carried is None:
            shape.encode(source, *into)
            return
        n = carried.numel()
        source[:n] += carried
        carried.copy_(source[:n])
        shape.encode(source, *into)
        rounded = source.zero_()
        shape.add(rounded, *into)
        carried -= rounded[:n]

    def _pack(self, piece: Piece) -> Tensor:
        """The values of a piece of several tensors, one after another, until the next call."""
        kind = piece.device, piece.dtype
        if kind not in self._packed:
            most = max(other.numel for other in self.pieces if not other.in_place and other.dtype == piece.dtype)
            self._packed[kind] = torch.empty(most, dtype=piece.dtype, device=piece.device)
        return piece.flat(self._packed[kind][: piece.numel])

    def _tile(self, index: int) -> int:
        return _TILE["cuda" if self.pieces[index].device.type == "cuda" else "cpu"]

    def _scratch(self, index: int, numel: int) -> Tensor:
        """fp32 memory of one tile, with any content; it grows to the largest that was asked for."""
        device = self.pieces[index].device
        if device not in self._memory or self._memory[device].numel() < numel:
            self._memory[device] = torch.empty(numel, device=device)
        return self._memory[device][:numel]

    def _naming(self, index: int) -> contextlib.AbstractContextManager[None]:
        return collective(piece_name(self.pieces, index), self.group)

    @torch.no_grad()
    def _add_nothing(self) -> None:
        """No difference. What the rounding of earlier ones has left is forgotten too."""
        for piece, anchor in zip(self.pieces, self._anchors, strict=True):
            piece.fill(anchor)
        for of_differences, _ in self._residuals:
            of_differences.zero_()

    @torch.no_grad()
    def moved(self, index: int) -> None:
        """As Reducer.moved: the next differences are those from where the piece is now."""
        self.pieces[index].flat(self._anchors[index])

    @torch.no_grad()
    def restart(self) -> None:
        """Take the pieces' present values, the same on every rank, as the last average; nothing is carried over."""
        for piece, anchor in zip(self.pieces, self._anchors, strict=True):
            piece.flat(anchor)
        for pair in self._residuals:
            for residual in pair:
                residual.zero_()

    def state_dict(self, *, inside_round: bool = False) -> dict[str, Any]:
        """What int8 carries over to the next averaging, of this rank alone; inside a round also the last average."""
        state: dict[str, Any] = {"residuals": [list(pair) for pair in self._residuals]} if self._residuals else {}
        return {**state, "anchors": self._anchors} if inside_round else state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], *, inside_round: bool = False) -> None:
        """Go on from a state_dict(), after restart().

        Raises:
            ValueError: it was saved with other buckets or another number of workers.
        """
        if inside_round and "anchors" not in state:
            raise ValueError(without_beginning("averaging.wire_dtype"))
        if state:
            saved = [residual for pair in state.get("residuals", []) for residual in pair]
            mine = [residual for pair in self._residuals for residual in pair]
            _copy(saved, mine, "rounding errors that int8 carries over were")
        if inside_round:
            _copy(state["anchors"], self._anchors, "last average was")


def _copy(saved: Sequence[Tensor], into: Sequence[Tensor], what: str) -> None:
    found, expected = ([tensor.numel() for tensor in tensors] for tensors in (saved, into))
    if found != expected:
        raise ValueError(
            f"the {what} saved for {len(found)} buckets, and this run has {len(expected)}, or others; go on with the "
            "same model, averaging.wire_dtype, bucket_mb and fragments, and workers"
        )
    for tensor, value in zip(into, saved, strict=True):
        tensor.copy_(value)


@dataclasses.dataclass(frozen=True)
class _Buffers:
    """Bytes on their way out and in, as many as the largest piece has."""

    outgoing: Tensor
    incoming: Tensor

    def of(self, ranks: int, nbytes: int) -> tuple[Tensor, Tensor]:
        """(outgoing, incoming) [ranks, nbytes] of a piece."""
        size = ranks * nbytes
        return self.outgoing[:size].view(ranks, nbytes), self.incoming[:size].view(ranks, nbytes)


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """A piece on its way, and the collective in flight."""

    index: int
    buffers: _Buffers
    work: dist.Work
