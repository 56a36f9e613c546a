"""The mean over several hosts in two levels: inside every host first, then between the hosts.

For N hosts with L ranks of the group on each, every piece is cut into L parts, and rank i of each host has part i:

    inside     rank i adds up part i of the L ranks of its host
    between    the L ranks with the same part, one from each host, all-reduce it: L groups at once, each with 1/L of all
    inside     rank i divides by the number of workers (that are not left out), once, and gives its part to its host

A host's port sends 2 (N - 1) / N of the payload. A ring over all ranks, numbered host by host, has it send
2 (N L - 1) / (N L): for 2 hosts of 2 ranks 1.5 of the payload instead of 1, of 8 ranks 1.875 instead of 1. What one
rank sends to all other workers together is the same in both. The mean has the same bits on every rank, since each part
is finished in one place on a host, and an all-reduce gives all its ranks the same bits; they are not the bits of the
flat ring, which adds in another order.

On CPUs the ranks of a host see one another's buckets (`shared_memory`), and nothing is copied there. Elsewhere, and
where the user asks for it, the levels are a reduce-scatter, an all-reduce and an all-gather (as in Jia et al., "Highly
scalable deep learning training system with mixed-precision", 2018). NCCL has hierarchical algorithms of its own and
chooses among them, so on GPUs the flat all-reduce stays the default. Gloo's reduce-scatter is an all-reduce of a copy
(torch 2.14: counted at the loopback interface): right, but dearer inside the host, so that too is for who asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import Piece
from qsr_engine.averaging.chunks import add_up, squares_of_chunks
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.reducer import Reducer, all_gather_flat, piece_name, ring_bytes, time_out
from qsr_engine.averaging.shared_memory import HostMemory, batches

# torch 2.14 calls it so, and warns of the name that 2.11 has.
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclasses.dataclass(frozen=True)
class Levels:
    """The groups of a rank: the ranks of its host, and those with the same place on their hosts, one from each."""

    inside: dist.ProcessGroup
    between: dist.ProcessGroup
    everybody: Group

    @classmethod
    def make(cls, hosts: Sequence[Sequence[int]], group: Group) -> Levels:
        """Make the groups, with the backend and the time-out of `group`; every rank of it must call this."""
        rank = dist.get_rank()
        here = next(ranks for ranks in hosts if rank in ranks)
        there = [ranks[here.index(rank)] for ranks in hosts]
        options: dict[str, Any] = {"backend": dist.get_backend_config(group), "timeout": time_out(group)}
        # Every rank makes that of its host first, so nobody waits for somebody who waits for him.
        inside = dist.new_group(list(here), use_local_synchronization=True, **options)
        between = dist.new_group(there, use_local_synchronization=True, **options)
        return cls(cast(dist.ProcessGroup, inside), cast(dist.ProcessGroup, between), group)

    @property
    def place(self) -> int:
        """Which part of every piece this rank has."""
        return dist.get_rank(self.inside)

    @property
    def parts(self) -> int:
        return dist.get_world_size(self.inside)


BATCHES = 4  # of PIECE bytes or more between the hosts at once: enough for a link, and the first is ready early


class _TwoLevel(Reducer):
    """What a rank sends to the others of its host and to other hosts is together as much as in a ring over all."""

    def __init__(self, pieces: Sequence[Piece], levels: Levels) -> None:
        ranks = dist.get_world_size(levels.everybody)
        super().__init__(pieces, ranks, ring_bytes(sum(piece.nbytes for piece in pieces), ranks))
        self._levels = levels


class TwoLevelSharedMemory(_TwoLevel):
    """The mean in two levels where every rank sees the buckets of the others on its host. Copies nothing.

    Args:
        pieces: in-place pieces on a CPU.
        everywhere: as HostMemory, of the ranks of this host.
    """

    def __init__(self, pieces: Sequence[Piece], levels: Levels, everywhere: list[list[Tensor]]) -> None:
        super().__init__(pieces, levels)
        self._memory = HostMemory(everywhere, levels.inside)

    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        """Only the ranks of a host meet, before they read one another's memory and when they have written into it."""
        self._memory.meet(torch.zeros(1, dtype=torch.float64), "meeting on this host before the averaging")()
        between: deque[list[tuple[int, dist.Work | None]]] = deque()
        for batch in batches(self.pieces, order):
            between.append([(index, self._add_up(index)) for index in batch])
            if len(between) == BATCHES:
                yield from self._finish_batch(between.popleft(), divisor)
        while between:
            yield from self._finish_batch(between.popleft(), divisor)

    def _finish_batch(self, batch: list[tuple[int, dist.Work | None]], divisor: int) -> Iterator[tuple[int, Tensor]]:
        squares = torch.stack([self._finish(index, work, divisor) for index, work in batch])
        self._memory.meet(squares, piece_name(self.pieces, batch[-1][0]))()
        yield from zip((index for index, _ in batch), squares.unbind(), strict=True)

    @torch.no_grad()
    def _add_up(self, index: int) -> dist.Work | None:
        """Add up this rank's part over the host, in the memory of its first rank, and send it to the other hosts.

        It is rounded once, and travels in the type of the bucket, as in the flat all-reduce.
        """
        part = self._memory.part(index)
        if not part[0].numel():
            return None  # and so it is for the counterparts on the other hosts
        for _ in add_up(part, part[:1]):
            pass
        with collective(piece_name(self.pieces, index), self._levels.between):
            return dist.all_reduce(part[0], group=self._levels.between, async_op=True)

    @torch.no_grad()
    def _finish(self, index: int, work: dist.Work | None, divisor: int) -> Tensor:
        """Give the mean of this rank's part to the host. Returns the sum of squares of the part, in fp64."""
        if work is not None:
            with collective(piece_name(self.pieces, index), self._levels.between):
                work.wait()
        part = self._memory.part(index)
        return squares_of_chunks(add_up(part[:1], part, divisor), self.pieces[index].numel)


@dataclasses.dataclass
class _Stage:
    """A piece on its way, and the collectives that are under way for it."""

    index: int
    works: Sequence[dist.Work | None]


class TwoLevelCollectives(_TwoLevel):
    """The mean in two levels by collectives in place: reduce-scatter and all-gather inside a host, all-reduce between.

    At most two pieces are in each of the three stages, since gloo copies what it scatters. The elements that are left
    when a piece is cut into equal parts, fewer than there are ranks on a host, are all-reduced over all ranks.
    """

    @torch.no_grad()
    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        stages = (self._reduce_inside, self._reduce_between, functools.partial(self._gather_inside, divisor))
        queues: list[deque[_Stage]] = [deque(_Stage(index, []) for index in order), deque(), deque(), deque()]
        while any(queues):
            for number, queue in enumerate(queues):
                if not queue or (number > 0 and len(queue) < 2 and any(queues[:number])):
                    continue
                done = queue.popleft()
                self._wait(done)
                if number < len(stages):
                    queues[number + 1].append(_Stage(done.index, stages[number](done.index)))
                else:
                    self._tail(done.index).div_(divisor)
                    yield done.index, None

    def _wait(self, stage: _Stage) -> None:
        with collective(piece_name(self.pieces, stage.index), self._levels.everybody):
            for work in stage.works:
                assert work is not None
                work.wait()

    def _body(self, index: int) -> Tensor:
        """What can be cut into equal parts of a piece; [parts, elements of a part]."""
        flat = self.pieces[index].tensors[0]
        return flat[: flat.numel() - flat.numel() % self._levels.parts].view(self._levels.parts, -1)

    def _tail(self, index: int) -> Tensor:
        flat = self.pieces[index].tensors[0]
        return flat[flat.numel() - flat.numel() % self._levels.parts :]

    def _reduce_inside(self, index: int) -> list[dist.Work | None]:
        body, tail, levels = self._body(index), self._tail(index), self._levels
        works = []
        with collective(piece_name(self.pieces, index), levels.everybody):
            if body.numel():
                mine = body[self._levels.place]
                works.append(reduce_scatter_flat(mine, body.view(-1), group=levels.inside, async_op=True))
            if tail.numel():
                works.append(dist.all_reduce(tail, group=levels.everybody, async_op=True))
        return works

    def _reduce_between(self, index: int) -> list[dist.Work | None]:
        body = self._body(index)
        if not body.numel():
            return []
        with collective(piece_name(self.pieces, index), self._levels.between):
            return [dist.all_reduce(body[self._levels.place], group=self._levels.between, async_op=True)]

    def _gather_inside(self, divisor: int, index: int) -> list[dist.Work | None]:
        body = self._body(index)
        if not body.numel():
            return []
        mine = body[self._levels.place].div_(divisor)
        with collective(piece_name(self.pieces, index), self._levels.inside):
            return [all_gather_flat(body.view(-1), mine, group=self._levels.inside, async_op=True)]
