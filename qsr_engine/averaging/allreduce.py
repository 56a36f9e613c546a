"""The mean by all-reduce, in place or packed through at most two staging buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import PIECE, Piece, packed_pieces, pieces_in_place
from qsr_engine.averaging.chunks import CHUNK, divide, squares_of_piece, sum_of_squares
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.exchange import MOST_RANKS, Exchange, part_size
from qsr_engine.averaging.reducer import NOBODY, LeftOut, Reducer, backend_of, piece_name, ring_bytes, time_out

STAGING_BUCKETS = 2
IN_FLIGHT = 2  # pieces in each half of an exchange
MOST_IN_FLIGHT = 3  # in both halves: more do not stay in the cache


class AllReduce(Reducer):
    """The mean by all-reduce: every in-place piece in flight at once, packed ones through two staging buckets.

    NCCL divides on the way (AVG), unless a rank is left out. Gloo adds up, and each piece is divided while later ones
    are still in flight; between few ranks with all pieces on CPUs it is done by hand instead (see Exchange), with at
    most three pieces on their way. What that needs to receive into is freed after each run.

    Args:
        difference: leave (mean - own value) in the pieces instead of the mean; all pieces are packed then.
        give: leave the pieces as they are, so that only those ranks get the mean that do not say so; they are packed.
    """

    def __init__(self, pieces: Sequence[Piece], group: Group, *, difference: bool = False, give: bool = False) -> None:
        ranks = dist.get_world_size(group)
        super().__init__(pieces, ranks, ring_bytes(sum(piece.nbytes for piece in pieces), ranks))
        self.group = group
        self._difference = difference
        self._give = give
        on_cpus = {piece.device.type for piece in pieces} == {"cpu"}
        self._by_hand = on_cpus and 1 < ranks <= MOST_RANKS and backend_of(group, torch.device("cpu")) == "gloo"
        self._staging: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # of a piece's tensors in a staging bucket

    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        if self.ranks == 1:
            for index in order:
                squares = None
                if self._difference:
                    squares = squares_of_piece(self.pieces[index])
                    torch._foreach_zero_(list(self.pieces[index].tensors))
                yield index, squares
            return
        if self._by_hand:
            yield from self._exchange(order, divisor)
            return
        in_flight: deque[tuple[int, Tensor, dist.Work]] = deque()
        staged = 0
        free = self._free_staging()
        for index in order:
            piece = self.pieces[index]
            if not self._is_in_place(piece):
                while staged == STAGING_BUCKETS:
                    done, flat, work = in_flight.popleft()
                    squares = self._finish(done, flat, work, divisor)
                    if not self._is_in_place(self.pieces[done]):
                        staged -= 1
                        free[self.pieces[done].device, self.pieces[done].dtype].append(flat)
                    yield done, squares
                staged += 1
            in_flight.append((index, *self._launch(index, free, divisor)))
        while in_flight:
            done, flat, work = in_flight.popleft()
            yield done, self._finish(done, flat, work, divisor)

    def _exchange(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        """As _run(), by hand. At the end a tiny all-reduce makes the sums of squares those of whole pieces."""
        squares = torch.zeros(len(order), dtype=torch.float64)
        free, incoming, limit = self._free_staging(), self._room_to_receive(order), time_out(self.group)
        begun: deque[tuple[int, int, Tensor, Exchange]] = deque()
        given: deque[tuple[int, int, Tensor, Exchange]] = deque()
        waiting = deque(enumerate(order))
        while waiting or begun or given:
            staged = sum(not self._is_in_place(self.pieces[index]) for _, index, *_ in (*begun, *given))
            room_left = len(begun) < IN_FLIGHT and len(begun) + len(given) < MOST_IN_FLIGHT
            if waiting and room_left and staged < STAGING_BUCKETS:
                number, index = waiting.popleft()
                buffer = self._buffer(index, free)
                room = incoming[self.pieces[index].dtype][number % IN_FLIGHT]
                with collective(piece_name(self.pieces, index), self.group):
                    exchange = Exchange(self._flat(index, buffer), room, self.group, number, limit)
                begun.append((number, index, buffer, exchange))
            elif begun and len(given) < IN_FLIGHT:
                number, index, buffer, exchange = begun.popleft()
                with collective(piece_name(self.pieces, index), self.group):
                    squares[number] = exchange.add_up(divisor)
                given.append((number, index, buffer, exchange))
            else:
                number, index, buffer, exchange = given.popleft()
                self._finish(index, buffer, exchange, divisor)
                if not self._is_in_place(self.pieces[index]):
                    free[self.pieces[index].device, self.pieces[index].dtype].append(buffer)
                yield index, squares[number]
        with collective("adding up squares", self.group):
            dist.all_reduce(squares, group=self.group)

    def _room_to_receive(self, order: Sequence[int]) -> dict[torch.dtype, list[Tensor]]:
        """Of each type, where the others' values of this rank's part of a piece arrive, of IN_FLIGHT pieces."""
        sizes: dict[torch.dtype, int] = {}
        for piece in (self.pieces[index] for index in order):
            size = (self.ranks - 1) * part_size(piece.numel, piece.dtype.itemsize, self.ranks)
            sizes[piece.dtype] = max(sizes.get(piece.dtype, 0), size)
        return {dtype: [torch.empty(size, dtype=dtype) for _ in range(IN_FLIGHT)] for dtype, size in sizes.items()}

    def _is_in_place(self, piece: Piece) -> bool:
        return piece.in_place and not (self._difference or self._give)

    def _divides_on_the_way(self, flat: Tensor, divisor: int) -> bool:
        return divisor == self.ranks and backend_of(self.group, flat.device) == "nccl"

    def _free_staging(self) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
        """Two buckets for each kind of tensor that is packed, made at the first run and kept."""
        sizes: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for piece in self.pieces:
            if not self._is_in_place(piece):
                sizes.setdefault((piece.device, piece.dtype), []).append(piece.numel)
        for (device, dtype), numels in sizes.items():
            if (device, dtype) not in self._staging:
                count = min(STAGING_BUCKETS, len(numels))
                self._staging[device, dtype] = [
                    torch.empty(max(numels), dtype=dtype, device=device) for _ in range(count)
                ]
        return {kind: list(buffers) for kind, buffers in self._staging.items()}

    def _flat(self, index: int, buffer: Tensor) -> Tensor:
        return buffer[: self.pieces[index].numel]

    @torch.no_grad()
    def _buffer(self, index: int, free: dict[tuple[torch.device, torch.dtype], list[Tensor]]) -> Tensor:
        """What a piece travels in: itself, or a staging bucket into which it is packed."""
        piece = self.pieces[index]
        if self._is_in_place(piece):
            return piece.tensors[0]
        buffer = free[piece.device, piece.dtype].pop()
        torch._foreach_copy_(self._views_of(index, buffer), list(piece.tensors))
        return buffer

    @torch.no_grad()
    def _launch(
        self, index: int, free: dict[tuple[torch.device, torch.dtype], list[Tensor]], divisor: int
    ) -> tuple[Tensor, dist.Work]:
        buffer = self._buffer(index, free)
        flat = self._flat(index, buffer)
        op = dist.ReduceOp.AVG if self._divides_on_the_way(flat, divisor) else dist.ReduceOp.SUM
        with collective(piece_name(self.pieces, index), self.group):
            work = dist.all_reduce(flat, op=op, group=self.group, async_op=True)
        assert work is not None
        return buffer, work

    @torch.no_grad()
    def _finish(self, index: int, buffer: Tensor, work: dist.Work | Exchange, divisor: int) -> Tensor | None:
        """Wait, divide, and unpack. Gives the sum of squares where that costs little."""
        piece = self.pieces[index]
        with collective(piece_name(self.pieces, index), self.group):
            work.wait()
        flat = self._flat(index, buffer)
        if self._give:
            return None
        divided = isinstance(work, Exchange) or self._divides_on_the_way(flat, divisor)
        if self._is_in_place(piece):
            return None if divided else divide(flat, flat, divisor)
        views, tensors = self._views_of(index, buffer), list(piece.tensors)
        whole = not (divided or flat.is_cuda or self._difference) and flat.numel() > len(views) * CHUNK
        if whole and all(tensor.is_contiguous() for tensor in tensors):
            parts = [divide(view.view(-1), out.view(-1), divisor) for out, view in zip(tensors, views, strict=True)]
            return torch.stack([squares for squares in parts if squares is not None]).sum()
        if not divided:
            flat.div_(divisor)
        known = isinstance(work, Exchange) or not self._difference  # or nobody sees the mean afterwards
        squares = None if known else sum_of_squares(flat)
        if self._difference:
            torch._foreach_sub_(views, tensors)
        torch._foreach_copy_(tensors, views)
        return squares

    def _views_of(self, index: int, buffer: Tensor) -> list[Tensor]:
        """The places of a piece's tensors in a staging bucket, made once: for 1,000 tensors it takes longer than all
        else."""
        key = index, buffer.data_ptr()
        if key not in self._views:
            sizes = [tensor.numel() for tensor in self.pieces[index].tensors]
            parts = torch.split(buffer[: sum(sizes)], sizes)
            self._views[key] = [p.view(t.shape) for p, t in zip(parts, self.pieces[index].tensors, strict=True)]
        return self._views[key]


def average_tensors(
    tensors: Sequence[Tensor],
    group: Group,
    bucket_bytes: int = PIECE,
    left_out: LeftOut = NOBODY,
    *,
    give: bool = False,
) -> int:
    """Replace tensors by their mean over the group; they stay where they are, and no two may share memory.

    Large contiguous ones are averaged in place, the others through two staging buckets.

    Args:
        give: on ranks that are not left out, leave the tensors as they are; those that are get the others' mean. All
            travel through the staging buckets then.
    Returns:
        Bytes that this rank sent (see ring_bytes).
    """
    if give:
        reducer = AllReduce(packed_pieces(tensors, bucket_bytes), group, give=not left_out.here)
    else:
        flat = [tensor.detach().view(-1) for tensor in tensors if tensor.is_contiguous()]
        others = packed_pieces([tensor for tensor in tensors if not tensor.is_contiguous()], bucket_bytes)
        reducer = AllReduce(pieces_in_place(flat, bucket_bytes) + others, group)
    for _ in reducer.run(range(len(reducer.pieces)), left_out):
        pass
    return reducer.bytes_sent
