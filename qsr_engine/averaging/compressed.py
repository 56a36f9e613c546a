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
for every BLOCK elements. int8 also carries its rounding error into the next averaging, at both roundings (error
feedback: Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; of the mean as well: Tang et al.,
"DoubleSqueeze", ICML 2019).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import Piece
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.reducer import Reducer, all_gather_flat, piece_name

WireType = Literal["bf16", "fp16", "int8"]
BLOCK = 512  # elements with one scale
_STEP = {"cpu": 256 * BLOCK, "cuda": 32768 * BLOCK}  # elements worked on at once: cache of a core, launches of a GPU


@dataclasses.dataclass(frozen=True)
class Format:
    """How fp32 values are laid out as bytes: the rounded values of a part, then the scales of its blocks."""

    name: WireType

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}[self.name]

    def nbytes(self, numel: int) -> int:
        """Bytes of a part of numel elements, a multiple of BLOCK."""
        scales = 0 if self.name == "bf16" else numel // BLOCK * 4
        return numel * self.dtype.itemsize + scales

    def views(self, part: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """(values [numel], scales [blocks]) in the bytes of a part."""
        end = numel * self.dtype.itemsize
        return part[:end].view(self.dtype), part[end:].view(torch.float32)

    def encode(self, source: Tensor, values: Tensor, scales: Tensor) -> None:
        """Round the fp32 source [numel], a multiple of BLOCK, into values and scales; the source is used up."""
        if self.name != "bf16":
            blocks = source.view(-1, BLOCK)
            largest = torch.maximum(blocks.amax(1), -blocks.amin(1))
            # For fp16 a power of two, so that scaling does not round.
            scale = largest / 127 if self.name == "int8" else largest.log2().floor().exp2()
            scales.copy_(torch.where(largest > 0, scale, 1.0))
            blocks /= scales[:, None]
            if self.name == "int8":
                source.round_().clamp_(-127, 127)
        values.copy_(source)

    def add(self, target: Tensor, values: Tensor, scales: Tensor) -> None:
        """target [numel] += the rounded values."""
        if self.name == "bf16":
            target += values
        else:
            target.view(-1, BLOCK).addcmul_(values.view(-1, BLOCK).float(), scales[:, None])


class Compressed(Reducer):
    """The mean of differences in a type of fewer bits. At most two pieces are in flight at a time.

    Args:
        pieces: in-place pieces, which hold the same values on every rank of the group now. Up to four of them take
            memory at a time.
    """

    exact = False

    def __init__(self, pieces: Sequence[Piece], group: Group, wire: WireType) -> None:
        ranks = dist.get_world_size(group)
        self._format = Format(wire)
        self._parts = [-(-piece.numel // (ranks * BLOCK)) * BLOCK for piece in pieces]  # elements
        super().__init__(pieces, ranks, 2 * (ranks - 1) * sum(self._format.nbytes(part) for part in self._parts))
        self.group = group
        self._anchors = [piece.tensors[0].clone() for piece in self.pieces]
        self._memory: dict[torch.device, Tensor] = {}
        self._residuals: list[tuple[Tensor, Tensor]] = []  # of this rank's differences, of the mean of its part
        if wire == "int8":
            self._residuals = [
                (
                    torch.zeros(piece.numel, dtype=torch.float32, device=piece.device),
                    torch.zeros(part, dtype=torch.float32, device=piece.device),
                )
                for piece, part in zip(self.pieces, self._parts, strict=True)
            ]

    @torch.no_grad()
    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        if self.ranks == 1:
            yield from ((index, None) for index in order)
            return
        sending: deque[_Exchange] = deque()
        gathering: deque[_Exchange] = deque()
        waiting = deque(order)
        while waiting or sending or gathering:
            if waiting:
                sending.append(self._send(waiting.popleft()))
            if sending and (len(sending) == 2 or not waiting):
                gathering.append(self._reduce(sending.popleft(), divisor))
            if gathering and (len(gathering) == 2 or not (waiting or sending)):
                done = gathering.popleft()
                self._apply(done)
                yield done.index, None

    def _send(self, index: int) -> _Exchange:
        """Encode this rank's difference and send to every rank its part."""
        piece, size = self.pieces[index], self._format.nbytes(self._parts[index])
        outgoing = torch.empty(self.ranks, size, dtype=torch.uint8, device=piece.device)
        residual = self._residuals[index][0] if self._residuals else None
        flat, anchor = piece.tensors[0], self._anchors[index]
        for rank, start, stop in self._steps(index, range(self.ranks)):
            lo = rank * self._parts[index] + start
            n = max(0, min(stop - start, piece.numel - lo))
            difference = self._scratch(index, stop - start)
            torch.sub(flat[lo : lo + n], anchor[lo : lo + n], out=difference[:n])
            difference[n:] = 0
            carried = None if residual is None else residual[lo : lo + n]
            self._encode(difference, outgoing[rank], index, start, carried)
        incoming = torch.empty_like(outgoing)
        with self._naming(index):
            work = dist.all_to_all_single(incoming, outgoing, group=self.group, async_op=True)
        assert work is not None
        return _Exchange(index, outgoing, incoming, work)

    def _reduce(self, exchange: _Exchange, divisor: int) -> _Exchange:
        """Average what arrived, this rank's part of all differences, and send it to every rank."""
        index = exchange.index
        with self._naming(index):
            exchange.work.wait()
        device = self.pieces[index].device
        part = torch.empty(self._format.nbytes(self._parts[index]), dtype=torch.uint8, device=device)
        residual = self._residuals[index][1] if self._residuals else None
        for _, start, stop in self._steps(index, range(1)):
            mean = self._scratch(index, stop - start).zero_()
            for rank in range(self.ranks):
                self._format.add(mean, *self._views(exchange.incoming[rank], index, start, stop))
            mean /= divisor
            self._encode(mean, part, index, start, None if residual is None else residual[start:stop])
        gathered = exchange.outgoing.view(-1)  # its content has arrived everywhere that it was sent to
        with self._naming(index):
            work = all_gather_flat(gathered, part, group=self.group, async_op=True)
        assert work is not None
        return _Exchange(index, part, exchange.outgoing, work)

    def _apply(self, exchange: _Exchange) -> None:
        """Add the mean difference to the last average; that is the new average, and the parameter."""
        index = exchange.index
        with self._naming(index):
            exchange.work.wait()
        flat, anchor = self.pieces[index].tensors[0], self._anchors[index]
        for rank, start, stop in self._steps(index, range(self.ranks)):
            lo = rank * self._parts[index] + start
            n = max(0, min(stop - start, flat.numel() - lo))
            views = self._views(exchange.incoming[rank], index, start, stop)
            if n == stop - start and anchor.dtype != torch.float64:
                self._format.add(anchor[lo : lo + n], *views)
            else:  # the end of a piece, which padding follows
                mean = self._scratch(index, stop - start).zero_()
                self._format.add(mean, *views)
                anchor[lo : lo + n] += mean[:n]
            flat[lo : lo + n] = anchor[lo : lo + n]

    def _steps(self, index: int, ranks: range) -> Iterator[tuple[int, int, int]]:
        """(rank, start, stop) of what is worked on at once; start and stop count elements within the rank's part."""
        part, step = self._parts[index], _STEP["cuda" if self.pieces[index].device.type == "cuda" else "cpu"]
        for rank in ranks:
            for start in range(0, part, step):
                yield rank, start, min(start + step, part)

    def _encode(self, source: Tensor, part: Tensor, index: int, start: int, carried: Tensor | None) -> None:
        """Write the source, used up, into a part from element `start` on, with what the last rounding left.

        carried [at most numel]: added before rounding, and replaced by what this rounding leaves.
        """
        values, scales = self._views(part, index, start, start + source.numel())
        if carried is None:
            self._format.encode(source, values, scales)
            return
        n = carried.numel()
        source[:n] += carried
        carried.copy_(source[:n])
        self._format.encode(source, values, scales)
        rounded = source.zero_()
        self._format.add(rounded, values, scales)
        carried -= rounded[:n]

    def _views(self, part: Tensor, index: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The values and the scales of elements start .. stop in a part."""
        values, scales = self._format.views(part, self._parts[index])
        return values[start:stop], scales[start // BLOCK : stop // BLOCK]

    def _scratch(self, index: int, numel: int) -> Tensor:
        """fp32 memory of one step, with any content."""
        device = self.pieces[index].device
        if device not in self._memory:
            self._memory[device] = torch.empty(_STEP["cuda" if device.type == "cuda" else "cpu"], device=device)
        return self._memory[device][:numel]

    def _naming(self, index: int) -> contextlib.AbstractContextManager[None]:
        return collective(piece_name(self.pieces, index), self.group)

    @torch.no_grad()
    def _add_nothing(self) -> None:
        """No difference. What the rounding of earlier ones has left is forgotten too."""
        for piece, anchor in zip(self.pieces, self._anchors, strict=True):
            piece.tensors[0].copy_(anchor)
        for of_differences, _ in self._residuals:
            of_differences.zero_()

    @torch.no_grad()
    def moved(self, index: int) -> None:
        """As Reducer.moved: the next differences are those from where the piece is now."""
        self._anchors[index].copy_(self.pieces[index].tensors[0])

    @torch.no_grad()
    def restart(self) -> None:
        """Take the pieces' present values, the same on every rank, as the last average; nothing is carried over."""
        for piece, anchor in zip(self.pieces, self._anchors, strict=True):
            anchor.copy_(piece.tensors[0])
        for pair in self._residuals:
            for residual in pair:
                residual.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What int8 carries over to the next averaging, of this rank alone; empty for the other types."""
        return {"residuals": [list(pair) for pair in self._residuals]} if self._residuals else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), after restart().

        Raises:
            ValueError: it was saved with other buckets or another number of workers.
        """
        found = [[r.numel() for r in pair] for pair in state.get("residuals", [])]
        expected = [[r.numel() for r in pair] for pair in self._residuals]
        if found != expected:
            raise ValueError(
                f"the rounding errors that int8 carries over were saved for {len(found)} buckets, and this run has "
                f"{len(expected)}, or others; go on with the same model, averaging.wire_dtype, bucket_mb and workers"
            )
        for mine, saved in zip(self._residuals, state.get("residuals", []), strict=True):
            for residual, value in zip(mine, saved, strict=True):
                residual.copy_(value)


@dataclasses.dataclass
class _Exchange:
    """A piece on its way: its bytes [ranks, part] out and in, and the collective in flight."""

    index: int
    outgoing: Tensor
    incoming: Tensor
    work: dist.Work
