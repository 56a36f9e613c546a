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
from qsr_engine.averaging.reducer import NOBODY, LeftOut, Reducer, backend_of, piece_name, ring_bytes

STAGING_BUCKETS = 2


class AllReduce(Reducer):
    """The mean by all-reduce: every in-place piece in flight at once, packed ones through two staging buckets.

    NCCL divides on the way (AVG); gloo adds up, and each piece is divided while later ones are still in flight. So
    does NCCL where a rank is left out.

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

    @torch.no_grad()
    def _launch(
        self, index: int, free: dict[tuple[torch.device, torch.dtype], list[Tensor]], divisor: int
    ) -> tuple[Tensor, dist.Work]:
        piece = self.pieces[index]
        if self._is_in_place(piece):
            flat = buffer = piece.tensors[0]
        else:
            buffer = free[piece.device, piece.dtype].pop()
            flat = buffer[: piece.numel]
            torch._foreach_copy_(self._views_of(index, buffer), list(piece.tensors))
        op = dist.ReduceOp.AVG if self._divides_on_the_way(flat, divisor) else dist.ReduceOp.SUM
        with collective(piece_name(self.pieces, index), self.group):
            work = dist.all_reduce(flat, op=op, group=self.group, async_op=True)
        assert work is not None
        return buffer, work

    @torch.no_grad()
    def _finish(self, index: int, buffer: Tensor, work: dist.Work, divisor: int) -> Tensor | None:
        piece = self.pieces[index]
        with collective(piece_name(self.pieces, index), self.group):
            work.wait()
        flat = buffer[: piece.numel]
        if self._give:
            return None
        divided = self._divides_on_the_way(flat, divisor)
        if self._is_in_place(piece):
            return None if divided else divide(flat, flat, divisor)
        views, tensors = self._views_of(index, buffer), list(piece.tensors)
        whole = not (flat.is_cuda or self._difference) and flat.numel() > len(views) * CHUNK
        if whole and all(tensor.is_contiguous() for tensor in tensors):
            parts = [divide(view.view(-1), out.view(-1), divisor) for out, view in zip(tensors, views, strict=True)]
            return torch.stack([squares for squares in parts if squares is not None]).sum()
        if not divided:
            flat.div_(divisor)
        squares = sum_of_squares(flat) if self._difference else None  # of the mean, which nobody sees afterwards
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


def average_packed(
    tensors: Sequence[Tensor],
    group: Group,
    bucket_bytes: int = PIECE,
    left_out: LeftOut = NOBODY,
    *,
    give: bool = False,
) -> int:
    """Replace tensors that must stay where they are by their mean over the group, through two staging buckets.

    Args:
        give: on ranks that are not left out, leave the tensors as they are; those that are get the others' mean.
    Returns:
        Bytes that this rank sent (see ring_bytes).
    """
    give = give and not left_out.here
    return _average(AllReduce(packed_pieces(tensors, bucket_bytes), group, give=give), left_out)


def average_in_place(
    tensors: Sequence[Tensor], group: Group, bucket_bytes: int = PIECE, left_out: LeftOut = NOBODY
) -> int:
    """Replace tensors by their mean over the group: large contiguous ones where they are, others as average_packed().

    Returns:
        Bytes that this rank sent.
    """
    flat = [tensor.detach().view(-1) for tensor in tensors if tensor.is_contiguous()]
    others = packed_pieces([tensor for tensor in tensors if not tensor.is_contiguous()], bucket_bytes)
    return _average(AllReduce(pieces_in_place(flat, bucket_bytes) + others, group), left_out)


def _average(reducer: AllReduce, left_out: LeftOut) -> int:
    for _ in reducer.run(range(len(reducer.pieces)), left_out):
        pass
    return reducer.bytes_sent
