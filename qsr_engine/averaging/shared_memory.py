"""The mean inside one host, on CPUs: every rank maps the buckets of the others and computes its share of the mean.

The buckets' storages move into shared memory once, in place: views of them stay views. At a boundary rank r of n reads
the r-th part of every piece in all n buckets, and writes the mean of it into all of them. Nothing is copied, and each
byte crosses the memory bus about as often as in one copy. The order of summation is that of the ranks.

DeepSpeed ships a shared-memory all-reduce for CPUs (`deepspeed.comm.inference_all_reduce`). It is compiled at the first
start, works over all ranks only, stages every byte through buffers of its own, and waits for a dead rank for ever;
this one needs torch's own shared storages, any group, and waits in gloo, which has a time-out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import PIECE, Piece
from qsr_engine.averaging.chunks import add_up, squares_of_chunks
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.reducer import Reducer, piece_name, ring_bytes

Offer = tuple[int, list[tuple[int, int, int]]]  # process, and (file descriptor, offset, size) in elements of each piece


def offer(pieces: Sequence[Piece]) -> Offer:
    """Move the storages of in-place pieces into shared memory, for other processes to map().

    Raises:
        OSError, RuntimeError: it cannot be done; some storages may have moved.
    """
    places = []
    descriptors: dict[int, int] = {}
    for piece in pieces:
        tensor = piece.tensors[0]
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in descriptors:
            storage.share_memory_()
            descriptors[key], _ = storage._share_fd_cpu_()
        places.append((descriptors[key], int(tensor.storage_offset()), tensor.numel()))
    return os.getpid(), places


def map_offered(offered: Offer, pieces: Sequence[Piece]) -> list[Tensor]:
    """The elements of each piece in the memory of the process that offers them. Raises as offer()."""
    process, places = offered
    found = []
    for (descriptor, offset, numel), piece in zip(places, pieces, strict=True):
        end = (offset + numel) * piece.dtype.itemsize
        flat = torch.from_file(f"/proc/{process}/fd/{descriptor}", shared=True, size=end, dtype=torch.uint8)
        found.append(flat.view(piece.dtype)[offset:])
    return found


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
        copies = self._everywhere[index]
        size = -(-copies[0].numel() // self._ranks)
        start = min(self._rank * size, copies[0].numel())
        return [copy[start : start + size] for copy in copies]

    def meet(self, values: Tensor, what: str) -> None:
        """Wait until every rank has come; the values become their sum."""
        with collective(what, self._group):
            dist.all_reduce(values, group=self._group)


class SharedMemory(Reducer):
    """The mean of in-place pieces that all ranks of the group can see. Takes what HostMemory takes."""

    def __init__(self, pieces: Sequence[Piece], group: Group, everywhere: list[list[Tensor]]) -> None:
        ranks = dist.get_world_size(group)
        # What it reads from the others' memory and writes into it, which is as much as a ring all-reduce would send.
        super().__init__(pieces, ranks, ring_bytes(sum(piece.nbytes for piece in pieces), ranks))
        self._memory = HostMemory(everywhere, group)

    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        """The mean of a piece is there when all ranks have computed their parts, which a tiny all-reduce tells; it
        carries the sums of squares."""
        self._memory.meet(torch.zeros(1, dtype=torch.float64), "meeting before the averaging")
        for batch in batches(self.pieces, order):
            squares = torch.stack([self._average_part(index, divisor) for index in batch])
            self._memory.meet(squares, piece_name(self.pieces, batch[-1]))
            yield from zip(batch, squares.unbind(), strict=True)

    @torch.no_grad()
    def _average_part(self, index: int, divisor: int) -> Tensor:
        """Average this rank's part of a piece, for everybody. Returns the sum of squares of the part, in fp64."""
        copies = self._memory.part(index)
        return squares_of_chunks(add_up(copies, copies, divisor), self.pieces[index].numel)


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
