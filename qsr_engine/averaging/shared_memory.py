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
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import Piece
from qsr_engine.averaging.collectives import (
    CHUNK,
    EXACT,
    Group,
    Mean,
    chunk_of_squares,
    collective,
    piece_name,
    ring_bytes,
)

_SHM = Path("/dev/shm")  # where torch puts shared storages on Linux


class SharedMemory(Mean):
    """The mean of in-place pieces that all ranks of the group can see.

    Args:
        everywhere: [piece][rank of the group], views of the same elements; see `see_one_another`.
    """

    def __init__(self, pieces: Sequence[Piece], group: Group, everywhere: list[list[Tensor]]) -> None:
        self.pieces = list(pieces)
        self.group = group
        self._everywhere = everywhere
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self.divisor = self._ranks
        # What it reads from the others' memory and writes into it, which is as much as a ring all-reduce would send.
        self.bytes_sent = ring_bytes(sum(piece.nbytes for piece in self.pieces), self._ranks)

    def run(self, order: Sequence[int]) -> Iterator[tuple[int, Tensor | float | None]]:
        """As Mean.run. The mean of a piece is there when all ranks have computed their parts, which a tiny all-reduce
        tells; it carries the sums of squares."""
        self._meet(torch.zeros(1, dtype=torch.float64), "meeting before the averaging")
        for batch in batches(self.pieces, order):
            squares = torch.stack([self._average_part(index) for index in batch])
            self._meet(squares, piece_name(self.pieces, batch[-1]))
            yield from zip(batch, squares.tolist(), strict=True)

    def _meet(self, values: Tensor, what: str) -> None:
        with collective(what, self.group):
            dist.all_reduce(values, group=self.group)

    @torch.no_grad()
    def _average_part(self, index: int) -> Tensor:
        """Average this rank's part of a piece, for everybody. Returns the sum of squares of the part, in fp64."""
        copies = self._everywhere[index]
        size = -(-copies[0].numel() // self._ranks)
        start, stop = self._rank * size, min((self._rank + 1) * size, copies[0].numel())
        exact, squares = copies[0].numel() <= EXACT, []
        for at in range(start, stop, CHUNK):
            first, *others = (copy[at : min(at + CHUNK, stop)] for copy in copies)
            total = first if first.dtype in (torch.float32, torch.float64) else first.float()
            for other in others:
                total.add_(other)
            total.div_(self.divisor)
            squares.append(chunk_of_squares(total, exact))
            for copy in others if total is first else (first, *others):
                copy.copy_(total)
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def batches(pieces: Sequence[Piece], order: Sequence[int]) -> Iterator[list[int]]:
    """Pieces that one meeting of the ranks finishes: small ones together."""
    batch: list[int] = []
    size = 0
    for index in order:
        batch.append(index)
        size += pieces[index].nbytes
        if size >= 16_000_000:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def hosts_of(group: Group) -> list[list[int]]:
    """The ranks of the group by host, in the order of the group; empty where a rank cannot tell on which host it is.

    Every rank of the run must call it. A container or a network namespace counts as a host of its own.
    """
    names = gather(_host())
    members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    if any(names[rank] is None for rank in members):
        return []
    found: dict[Any, list[int]] = {}
    for rank in members:
        found.setdefault(names[rank], []).append(rank)
    return list(found.values())


def see_one_another(pieces: Sequence[Piece], hosts: Sequence[Sequence[int]]) -> list[list[Tensor]] | None:
    """Move the storages of the pieces into shared memory, and map those of the other ranks of this host.

    Every rank of the run must call it. Addresses of the tensors change; their storages and the views on them stay.

    Args:
        hosts: the ranks that must agree on it, by host; empty to take part and to share nothing.
    Returns:
        For every piece its elements in the memory of each rank of this host, as in `hosts`. Where it cannot be done on
        every host, None: on a GPU, or where /dev/shm is too small, which a warning says.
    """
    members = [rank for host in hosts for rank in host]
    here = next((host for host in hosts if dist.get_rank() in host), [])
    places = [piece.tensors[0].untyped_storage().data_ptr() for piece in pieces]
    storages = {place: piece.tensors[0].untyped_storage() for place, piece in zip(places, pieces, strict=True)}
    possible = all(piece.in_place and piece.device.type == "cpu" for piece in pieces) and _SHM.is_dir() and bool(hosts)
    needed = sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())
    shared = _fits(gather({"host": _host() if possible else None, "needed": needed, "free": _free()}), hosts)
    told: list[tuple[int, int, int]] | None = None  # for every piece: file descriptor, offset and size in elements
    everywhere: list[list[Tensor]] | None = None
    try:
        if shared:
            descriptors = {}
            for place, storage in storages.items():
                storage.share_memory_()
                descriptors[place], _ = storage._share_fd_cpu_()
            tensors = [piece.tensors[0] for piece in pieces]
            told = [(descriptors[p], int(t.storage_offset()), t.numel()) for p, t in zip(places, tensors, strict=True)]
    except (OSError, RuntimeError) as error:
        _warn_of(error)
    processes = gather((os.getpid(), told))
    try:
        if shared and all(processes[rank][1] is not None for rank in members):
            everywhere = [
                [_open(processes[rank][0], processes[rank][1][index], piece.dtype) for rank in here]
                for index, piece in enumerate(pieces)
            ]
    except (OSError, RuntimeError) as error:
        _warn_of(error)
    opened = gather(everywhere is not None)
    return everywhere if all(opened[rank] for rank in members) else None


def _warn_of(error: Exception) -> None:
    """Too many open files, a hardened kernel, processes of several users."""
    warnings.warn(
        f"parameters cannot be averaged in shared memory, so they are averaged through gloo: {error}", stacklevel=3
    )


def _fits(facts: Sequence[dict[str, Any]], hosts: Sequence[Sequence[int]]) -> bool:
    """Whether each of the hosts has enough shared memory for all ranks of the run that are on it."""
    fits = bool(hosts)
    for ranks in hosts:
        name = facts[ranks[0]]["host"]
        if any(facts[rank]["host"] is None for rank in ranks):
            return False
        on_it = [fact for fact in facts if fact["host"] == name]
        needed, free = sum(fact["needed"] for fact in on_it), min(fact["free"] for fact in on_it)
        fits = fits and needed <= 0.9 * free
        if needed > 0.9 * free and dist.get_rank() == ranks[0]:
            warnings.warn(
                f"{_SHM} has {free / 1e6:.0f} MB free and the parameters of this host's ranks need "
                f"{needed / 1e6:.0f} MB, so they are averaged through gloo instead of in shared memory; enlarge it "
                "(docker run --shm-size=...), or write averaging.shared_memory: false",
                stacklevel=3,
            )
    return fits


def gather(value: Any) -> list[Any]:
    """What each rank of the run gives, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    with collective("looking for ranks on the same host", None):
        dist.all_gather_object(values, value)
    return values


def _host() -> tuple[str, ...] | None:
    """The same for processes that can open each other's memory and share a network; None where it cannot be told."""
    try:
        namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return (boot, *namespaces, str(os.getuid()))


def _free() -> int:
    try:
        room = os.statvfs(_SHM)
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize


def _open(process: int, place: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    descriptor, offset, numel = place
    end = (offset + numel) * dtype.itemsize
    path = f"/proc/{process}/fd/{descriptor}"
    return torch.from_file(path, shared=True, size=end, dtype=torch.uint8).view(dtype)[offset:]
