"""The mean of pieces over a process group, and what it costs."""

from __future__ import annotations

import abc
import atexit
import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import Piece, packed_pieces, pieces_in_place
from qsr_engine.averaging.gloo_threads import await_idle_threads

Group = dist.ProcessGroup | None  # None is the group of all ranks

# Size of a bucket in MB (1e6 bytes) where the configuration gives none, for the backend of the group. Measured for
# gloo (benchmarks/averaging --bucket-sizes): from 16 MB on the size hardly matters, and a forward that waits for its
# first bucket begins the sooner, the smaller it is. For NCCL it is not measured.
BUCKET_MB = {"gloo": 16.0, "nccl": 64.0}

# At import, so that it runs after the handlers that others register later, which may still average.
atexit.register(await_idle_threads)


class CollectiveError(RuntimeError):
    """A collective failed or timed out; the message names what was averaged and over which ranks."""


@contextlib.contextmanager
def collective(what: str, group: Group) -> Iterator[None]:
    """Turn a failure of torch.distributed into a CollectiveError that says what was under way."""
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:  # torch raises DistBackendError, which is one, and plain RuntimeErrors
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        raise CollectiveError(
            f"{what} over the ranks {ranks} failed on rank {dist.get_rank()}: {error}. A rank has died, hangs, or was "
            "not reached within the time-out of the process group; look at the output of the others"
        ) from error


# torch 2.14 calls it so, and warns of the name that 2.11 has.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def bucket_bytes(bucket_mb: float | None, group: Group) -> int:
    """Size of a bucket in bytes: as configured, or the default of the group's backend."""
    if bucket_mb is None:
        bucket_mb = BUCKET_MB.get(dist.get_backend(group), 64.0)
    return int(bucket_mb * 1e6)


def ring_bytes(payload: int, ranks: int) -> int:
    """Bytes that one rank sends in a ring all-reduce of `payload` bytes: 2 (n - 1) / n times the payload.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
    """
    return 2 * (ranks - 1) * payload // ranks


class Mean(abc.ABC):
    """Replaces pieces by their mean over a group.

    Where some of its ranks are left out, `divisor` is the number of the others, and those called `add_nothing()`.
    """

    pieces: list[Piece]
    bytes_sent: int  # by this rank, in one run over all pieces
    divisor: int  # of the sum over the group; at first the ranks of the group

    @abc.abstractmethod
    def run(self, order: Sequence[int]) -> Iterator[tuple[int, Tensor | float | None]]:
        """Average the pieces, those that come first in `order` first.

        Yields:
            (index of a piece that now is the mean, its sum of squares where that was measured on the way).
        Raises:
            CollectiveError: a collective failed.
        """

    @torch.no_grad()
    def add_nothing(self) -> None:
        """Leave this rank out of the next run, which will put the mean of the others into its pieces.

        Before that run's first collective, for which the others wait before they read this rank's memory.
        """
        for piece in self.pieces:
            torch._foreach_zero_(list(piece.tensors))

    def moved(self, index: int) -> None:  # noqa: B027  # most have nothing to remember
        """A piece that run() has yielded was changed, alike on every rank, before the next averaging begins."""


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """The ranks of a group that are left out of a mean, as one of its ranks sees it."""

    ranks: int = 0  # how many
    here: bool = False  # whether this rank is one of them

    def take_effect(self, mean: Mean, ranks: int) -> None:
        """Before a run of a mean over so many ranks."""
        mean.divisor = ranks - self.ranks
        if self.here:
            mean.add_nothing()


STAGING_BUCKETS = 2


class AllReduce(Mean):
    """The mean by all-reduce: every in-place piece in flight at once, packed ones through two staging buckets.

    NCCL divides on the way (AVG); gloo adds up, and each piece is divided while later ones are still in flight. So
    does NCCL where a rank is left out.

    Args:
        difference: leave (mean - own value) in the pieces instead of the mean; all pieces are packed then.
        give: leave the pieces as they are, so that only those ranks get the mean that do not say so; they are packed.
    """

    def __init__(self, pieces: Sequence[Piece], group: Group, *, difference: bool = False, give: bool = False) -> None:
        self.pieces = list(pieces)
        self.group = group
        self.ranks = self.divisor = dist.get_world_size(group)
        self.bytes_sent = sum(ring_bytes(piece.nbytes, self.ranks) for piece in self.pieces)
        self._difference = difference
        self._give = give
        self._staging: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._views: dict[tuple[int, int], list[Tensor]] = {}  # of a piece's tensors in a staging bucket

    def run(self, order: Sequence[int]) -> Iterator[tuple[int, Tensor | float | None]]:
        if self.ranks == 1:
            for index in order:
                squares = None
                if self._difference:
                    squares = torch.stack([sum_of_squares(t.view(-1)) for t in self.pieces[index].tensors]).sum()
                    torch._foreach_zero_(list(self.pieces[index].tensors))
                yield index, squares
            return
        in_flight: deque[tuple[int, Tensor, dist.Work]] = deque()
        staged = 0
        free = self._free_staging(order)
        for index in order:
            piece = self.pieces[index]
            if not self._is_in_place(piece):
                while staged == STAGING_BUCKETS:
                    done, flat, work = in_flight.popleft()
                    squares = self._finish(done, flat, work)
                    if not self._is_in_place(self.pieces[done]):
                        staged -= 1
                        free[self.pieces[done].device, self.pieces[done].dtype].append(flat)
                    yield done, squares
                staged += 1
            in_flight.append((index, *self._launch(index, free)))
        while in_flight:
            done, flat, work = in_flight.popleft()
            yield done, self._finish(done, flat, work)

    def _is_in_place(self, piece: Piece) -> bool:
        return piece.in_place and not (self._difference or self._give)

    def _divides_on_the_way(self, flat: Tensor) -> bool:
        return flat.is_cuda and self.divisor == self.ranks

    def _free_staging(self, order: Sequence[int]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
        """Two buckets for each kind of tensor that is packed, made at the first run and kept."""
        sizes: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for piece in (self.pieces[index] for index in order):
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
        self, index: int, free: dict[tuple[torch.device, torch.dtype], list[Tensor]]
    ) -> tuple[Tensor, dist.Work]:
        piece = self.pieces[index]
        if self._is_in_place(piece):
            flat = buffer = piece.tensors[0]
        else:
            buffer = free[piece.device, piece.dtype].pop()
            flat = buffer[: piece.numel]
            torch._foreach_copy_(self._views_of(index, buffer), list(piece.tensors))
        op = dist.ReduceOp.AVG if self._divides_on_the_way(flat) else dist.ReduceOp.SUM
        with collective(self._name(index), self.group):
            work = dist.all_reduce(flat, op=op, group=self.group, async_op=True)
        assert work is not None
        return buffer, work

    @torch.no_grad()
    def _finish(self, index: int, buffer: Tensor, work: dist.Work) -> Tensor | None:
        piece = self.pieces[index]
        with collective(self._name(index), self.group):
            work.wait()
        flat = buffer[: piece.numel]
        if self._give:
            return None
        divided = self._divides_on_the_way(flat)
        if self._is_in_place(piece):
            if not divided:
                flat.div_(self.divisor)
            return None
        views, tensors = self._views_of(index, buffer), list(piece.tensors)
        if not (flat.is_cuda or self._difference) and flat.numel() > len(views) * CHUNK:
            for tensor, view in zip(tensors, views, strict=True):
                torch.div(view, self.divisor, out=tensor)  # divided on the way back: one pass over memory less
            return None
        if not divided:
            flat.div_(self.divisor)
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

    def _name(self, index: int) -> str:
        return piece_name(self.pieces, index)


def piece_name(pieces: Sequence[Piece], index: int) -> str:
    return f"averaging bucket {index + 1} of {len(pieces)} ({pieces[index].nbytes / 1e6:.1f} MB)"


def average_packed(
    tensors: Sequence[Tensor], group: Group, bucket_bytes: int, left_out: LeftOut | None = None, *, give: bool = False
) -> int:
    """Replace tensors that must stay where they are by their mean over the group, through two staging buckets.

    Args:
        give: on ranks that are not left out, leave the tensors as they are; those that are get the others' mean.
    Returns:
        Bytes that this rank sent (see ring_bytes).
    """
    left_out = left_out or LeftOut()
    mean = AllReduce(packed_pieces(tensors, bucket_bytes), group, give=give and not left_out.here)
    return _run(mean, left_out)


def average_in_place(
    tensors: Sequence[Tensor], group: Group, bucket_bytes: int, left_out: LeftOut | None = None
) -> int:
    """Replace tensors by their mean over the group: large contiguous ones where they are, others as average_packed().

    Returns:
        Bytes that this rank sent.
    """
    flat = [tensor.detach().view(-1) for tensor in tensors if tensor.is_contiguous()]
    others = packed_pieces([tensor for tensor in tensors if not tensor.is_contiguous()], bucket_bytes)
    return _run(AllReduce(pieces_in_place(flat, bucket_bytes) + others, group), left_out or LeftOut())


def _run(mean: AllReduce, left_out: LeftOut) -> int:
    left_out.take_effect(mean, mean.ranks)
    for _ in mean.run(range(len(mean.pieces))):
        pass
    return mean.bytes_sent


CHUNK = 1 << 16  # elements that stay in a core's cache
EXACT = 1 << 20  # elements up to which squares are added up in fp64, which takes up to 2 ms


@torch.no_grad()
def sum_of_squares(flat: Tensor) -> Tensor:
    """Sum of squares of a 1-d tensor, as an fp64 scalar on its device; not finite if and only if an element is not.

    On a CPU, chunks of a tensor beyond EXACT elements are added up in its own type (in fp32 below it) and their sums
    in fp64: 2e-7 relative in fp32, and a tenth of the time of vector_norm in fp64.
    """
    if flat.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=flat.device)
    if flat.is_cuda:
        norm: Tensor = torch.linalg.vector_norm(flat, dtype=torch.float64)
        return norm.square()
    total = torch.stack([chunk_of_squares(chunk, flat.numel() <= EXACT) for chunk in torch.split(flat, CHUNK)]).sum()
    if not total.isfinite():  # or squares beyond fp32
        total = torch.stack([chunk.double().square().sum() for chunk in torch.split(flat, CHUNK)]).sum()
    return total


def chunk_of_squares(chunk: Tensor, exact: bool) -> Tensor:
    """Sum of squares of a 1-d tensor on a CPU, as an fp64 scalar; not exact: added up in fp32."""
    if exact:
        chunk = chunk.double()
    elif chunk.dtype not in (torch.float32, torch.float64):
        chunk = chunk.float()
    return torch.dot(chunk, chunk).double()
