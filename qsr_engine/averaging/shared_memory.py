"""The mean inside one host, on CPUs: every rank maps the buckets of the others and computes its share of the mean.

The buckets' storages, as a rule one a rank, move into shared memory once, in place: views of them stay views. At a
boundary rank r of n reads the r-th part of every piece in all n buckets, and writes the mean of it into all of them.
Nothing is copied, and each byte crosses the memory bus about as often as in one copy. The order of summation is that of
the ranks.

DeepSpeed ships a shared-memory all-reduce for CPUs (`deepspeed.comm.inference_all_reduce`). It is compiled at the first
start, works over all ranks only, stages every byte through buffers of its own, and waits for a dead rank for ever;
this one needs torch's own shared storages, any group, and waits in gloo, which has a time-out.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import PIECE, Piece
from qsr_engine.averaging.chunks import add_up, squares_of_chunks
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.exchange import part_of
from qsr_engine.averaging.reducer import Reducer, piece_name, ring_bytes


@dataclasses.dataclass(frozen=True)
class Offer:
    """Memory of one process that others can map.

    files: the file descriptor and the bytes of each storage; of flat_buckets() there is one.
    places: for every piece the number of its file, and the byte where it begins.
    """

    process: int
    files: list[tuple[int, int]]
    places: list[tuple[int, int]]


def offer(pieces: Sequence[Piece]) -> Offer:
    """Move the storages of in-place pieces into shared memory, for other processes to map().

    The files have no names, so that the memory is free again when the last process that maps it is gone, however it
    ends.

    Raises:
        OSError, RuntimeError: it cannot be done; some storages may have moved.
    """
    numbers: dict[int, int] = {}
    files: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    for piece in pieces:
        tensor = piece.tensors[0]
        storage = tensor.untyped_storage()
        if storage._cdata not in numbers:
            numbers[storage._cdata] = len(files)
            descriptor, _ = storage._share_fd_cpu_()
            files.append((descriptor, storage.nbytes()))
        places.append((numbers[storage._cdata], int(tensor.storage_offset()) * tensor.element_size()))
    return Offer(os.getpid(), files, places)


def map_offered(offered: Offer, pieces: Sequence[Piece]) -> list[Tensor]:
    """The elements of each piece in the memory of the process that offers them. Raises as offer()."""
    files = [
        torch.from_file(f"/proc/{offered.process}/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
        for descriptor, size in offered.files
    ]
    return [
        files[number][start : start + piece.nbytes].view(piece.dtype)
        for (number, start), piece in zip(offered.places, pieces, strict=True)
    ]


class HostMemory:
    """Pieces of all ranks of a group on one host, in the memory of each. Every rank works on a part of its own.

    Args:
        everywhere: [piece][rank of the group], views of the same elements; see `choose.see_one_another`.
    """

    def __init__(self, everywhere: list[list[Tensor]], group: Group) -> None:
        self._everywhere = everywhere
        self._group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    def part(self, index: int) -> list[Tensor]:
        """This rank's part of a piece, in the memory of every rank."""
        return [part_of(copy, self._rank, self._ranks) for copy in self._everywhere[index]]

    def meet(self, values: Tensor, what: str) -> Callable[[], None]:
        """Tell every rank that this one has come. What is returned waits for all; the values are their sum then."""
        with collective(what, self._group):
            work = dist.all_reduce(values, group=self._group, async_op=True)

        def wait() -> None:
            assert work is not None
            with collective(what, self._group):
                work.wait()

        return wait


class SharedMemory(Reducer):
    """The mean of in-place pieces that all ranks of the group can see. Takes what HostMemory takes."""

    def __init__(self, pieces: Sequence[Piece], group: Group, everywhere: list[list[Tensor]]) -> None:
        ranks = dist.get_world_size(group)
        # What it reads from the others' memory and writes into it, which is as much as a ring all-reduce would send.
        super().__init__(pieces, ranks, ring_bytes(sum(piece.nbytes for piece in pieces), ranks))
        self._memory = HostMemory(everywhere, group)

    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        """The mean of a piece is there when all ranks have computed their parts, which a tiny all-reduce tells; it
        carries the sums of squares. Meanwhile this rank goes on with its parts of the next pieces."""
        self._memory.meet(torch.zeros(1, dtype=torch.float64), "meeting before the averaging")()
        met: deque[tuple[list[int], Tensor, Callable[[], None]]] = deque()
        for batch in batches(self.pieces, order):
            squares = torch.stack([self._average_part(index, divisor) for index in batch])
            met.append((batch, squares, self._memory.meet(squares, piece_name(self.pieces, batch[-1]))))
            if len(met) == 2:
                yield from _end(*met.popleft())
        while met:
            yield from _end(*met.popleft())

    @torch.no_grad()
    def _average_part(self, index: int, divisor: int) -> Tensor:
        """Average this rank's part of a piece, for everybody. Returns the sum of squares of the part, in fp64."""
        copies = self._memory.part(index)
        return squares_of_chunks(add_up(copies, copies, divisor), self.pieces[index].numel)


def _end(batch: list[int], squares: Tensor, wait: Callable[[], None]) -> Iterator[tuple[int, Tensor]]:
    wait()
    yield from zip(batch, squares.unbind(), strict=True)


def batches(pieces: Sequence[Piece], order: Sequence[int]) -> Iterator[list[int]]:
    """Pieces that one meeting of the ranks finishes: small ones together."""
    batch: list[int] = []
    size = 0
    for index in order:
        batch.append(index)
        size += pieces[index].nbytes
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
