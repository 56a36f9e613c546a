"""What one rank averages with the others, and how: the pieces of its buckets, their mean, and when it is waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging.buckets import Piece, pieces_in_place
from qsr_engine.averaging.collectives import (
    AllReduce,
    CollectiveError,
    Group,
    LeftOut,
    Mean,
    bucket_bytes,
    collective,
    sum_of_squares,
)
from qsr_engine.averaging.cuda_graph import Captured
from qsr_engine.averaging.outer import Outer
from qsr_engine.averaging.overlap import Background, Gate
from qsr_engine.averaging.shared_memory import SharedMemory, gather, hosts_of, see_one_another
from qsr_engine.averaging.two_level import (
    Levels,
    TwoLevelCollectives,
    TwoLevelSharedMemory,
    agree_on_two_levels,
)
from qsr_engine.averaging.wire import PIECE, Compressed
from qsr_engine.config.qsr import AveragingConfig, OuterConfig


class Averager:
    """Averages buckets over the ranks of a group, in place.

    `average()` blocks. `start()` and `finish()` average in the background, while a model that was given to
    `overlap_with()` waits for each parameter when it reads it. `snapshot()` and `apply()` average what the buckets
    hold now, and add what that changes later, when the buckets have moved on.

    Args:
        buckets: 1-d contiguous floating-point tensors, of the same sizes and order on every rank of the group.
        group: the ranks that average with one another, one from each worker.
        options: how; every rank of the run must make its Averager at the same time.
        shard_group: the ranks of one worker where each holds a part of the parameters (ZeRO); None where every rank
            holds them all.
        tensors: gives the tensors whose values the buckets hold, always the same ones; `moved()` looks at them.
        device: where the collectives of all ranks and of shard_group run, if not where the buckets are (offload).
        outer: what becomes of the mean; without it, the mean is the result. The buckets hold the same values on every
            rank of the group then.
    Raises:
        ConfigError: options.cuda_graph, and the buckets cannot be averaged in a CUDA graph; or options.two_level is
            True, and the ranks are not placed for it.
    """

    def __init__(
        self,
        buckets: Sequence[Tensor],
        group: Group,
        options: AveragingConfig | None = None,
        *,
        shard_group: Group = None,
        tensors: Callable[[], Sequence[Tensor]] = lambda: (),
        device: torch.device | None = None,
        outer: OuterConfig | None = None,
    ) -> None:
        self.buckets = list(buckets)
        self.group = group
        self.device = device or (self.buckets[0].device if self.buckets else torch.device("cpu"))
        self.options = options = options or AveragingConfig(shared_memory=False)
        self.workers = dist.get_world_size(group)
        self._mean = _mean(self.buckets, group, options)  # may move the buckets' memory: addresses are read after it
        self.pieces = list(self._mean.pieces)
        self._outer = Outer(outer, self.buckets) if outer and not outer.is_plain_average else None
        self._order = list(range(len(self.pieces)))
        self.step = 0  # of the boundary; errors name it
        self._left_out: Sequence[int] = ()
        self._tensors = tensors
        self._places = [_place(tensor) for tensor in tensors()]
        self._shard_group = shard_group if shard_group and dist.get_world_size(shard_group) > 1 else None
        self._squares: dict[int, float | Tensor] = {}  # of every piece's average, where it was measured on the way
        self._background: Background | None = None
        self._gate: Gate | None = None
        self._refresh: Callable[[Tensor], None] = lambda part: None
        self._snapshots: list[Tensor] = []
        self._differences: AllReduce | None = None

    @property
    def bytes_per_averaging(self) -> int:
        """Bytes that this rank sends to others in one averaging, or exchanges with them through shared memory.

        All other workers count, on this host and elsewhere; in two levels it is as much as in one.
        """
        return self._mean.bytes_sent

    @property
    def way(self) -> str:
        """How the mean is computed: the name of a class of this package."""
        return type(self._mean).__name__

    # ------------------------------------------------------------------------------------------- blocking

    def leave_out(self, workers: Sequence[int]) -> LeftOut:
        """The next averaging is the mean of the other workers, which these get too. Every rank says it, each time.

        What a bucket holds on a worker that is left out is lost at once. Not for snapshot().

        Args:
            workers: their numbers, by rank in the group; fewer than there are.
        """
        self._left_out = workers
        left_out = LeftOut(len(workers), dist.get_rank(self.group) in workers)
        left_out.take_effect(self._mean, self.workers)
        return left_out

    def average(self) -> None:
        """Replace every bucket by its mean over the group, or over those that leave_out() has left.

        Raises:
            CollectiveError: a collective failed or timed out; the buckets may be half averaged.
        """
        for _ in self._run():
            pass

    def _run(self) -> Iterator[int]:
        try:
            yield from self._run_to_the_end()
        except CollectiveError as error:
            raise CollectiveError(f"after step {self.step}: {error}") from error

    def _run_to_the_end(self) -> Iterator[int]:
        self._squares.clear()
        for index, squares in self._mean.run(self._order):
            if self._outer is not None and squares is None:
                squares = self._squares_of(self.pieces[index])  # of the mean, before the outer step
            if squares is not None:
                self._squares[index] = squares
            if self._outer is not None:
                self._outer.step(self.pieces[index])
                self._mean.moved(index)
            for part in self.pieces[index].tensors:
                self._refresh(part)
            yield index

    # ---------------------------------------------------------------------------- behind the next forward

    def overlap_with(
        self, module: nn.Module, parameters: Sequence[tuple[Tensor, int, int, int]], refresh: Callable[[Tensor], None]
    ) -> None:
        """Say who reads the buckets, before `start()` is used.

        Args:
            module: the model; its reads of a parameter wait for that parameter.
            parameters: (parameter, bucket, start, stop) for each; it is a view of, or derives from, these elements.
            refresh: called with every averaged part of a bucket, a 1-d view; updates what derives from it.
        """
        needs: dict[Tensor, tuple[int, ...]] = {}
        spans = [(index, *_span(part)) for index, piece in enumerate(self.pieces) for part in piece.tensors]
        for parameter, bucket, start, stop in parameters:
            first, _ = _span(self.buckets[bucket])
            size = self.buckets[bucket].element_size()
            lo, hi = first + start * size, first + stop * size
            needs[parameter] = tuple(dict.fromkeys(index for index, a, b in spans if a < hi and lo < b))
        self._gate = Gate(module, needs)
        self._refresh = refresh
        self._ordered = False
        self._gate.record()

    def begin_forward(self) -> None:
        """A forward begins. What is compiled reads without asking, so it waits for everything."""
        if self._gate is not None and self._gate.compiled():
            if self._background is not None:
                self._background.finish()
            self._gate.remove()

    def start(self) -> bool:
        """Begin to average in the background, in the order in which the first forward read the parameters.

        Until finish(), the group and the buckets are not to be used otherwise. Where no forward of the whole model has
        been seen, nobody knows what may be read when; then False, and nothing is begun.
        """
        assert self._gate is not None, "overlap_with() comes first"
        if not self._ordered and not self._agree_on_order(self._gate):
            return False
        background = Background(self._run(), len(self.pieces), self.buckets[0].device)
        self._gate.guard(background.wait)
        self._background = background
        return True

    def _agree_on_order(self, gate: Gate) -> bool:
        """Everybody takes the order of the group's first rank, once; collectives must match."""
        told: list[Any] = [gate.order(len(self.pieces)) if gate.recorded or gate.compiled() else None]
        if self.workers > 1:
            first = dist.get_global_rank(self.group, 0) if self.group is not None else 0
            with collective("agreeing on the order of the buckets", self.group):
                dist.broadcast_object_list(told, src=first, group=self.group)
        if told[0] is not None:
            self._order, self._ordered = told[0], True
        return self._ordered

    @property
    def in_background(self) -> bool:
        return self._background is not None

    def finish(self) -> None:
        """Wait for what start() began. Again is harmless.

        Raises:
            CollectiveError: as average().
        """
        if self._background is None:
            return
        try:
            self._background.finish()
        finally:
            self._background = None
            if self._gate is not None and self._ordered:
                self._gate.remove()

    # ----------------------------------------------------------------------------------- behind whole steps

    def snapshot(self) -> None:
        """Copy the buckets and begin to average the copies in the background; the buckets may then be changed.

        The copies take as much memory as the buckets, from the first snapshot on, and two staging buckets.
        """
        if self._differences is None:
            self._snapshots = [torch.empty_like(bucket) for bucket in self.buckets]
            capacity = bucket_bytes(self.options.bucket_mb, self.group)
            pieces = [piece for copy in self._snapshots for piece in pieces_in_place([copy], capacity)]
            self._differences = AllReduce(pieces, self.group, difference=True)
        for copy, bucket in zip(self._snapshots, self.buckets, strict=True):
            copy.copy_(bucket)
        differences = self._differences
        self._squares.clear()

        def run() -> Iterator[int]:
            for index, squares in differences.run(range(len(differences.pieces))):
                assert squares is not None
                self._squares[index] = squares
                yield index

        self._background = Background(run(), len(differences.pieces), self.buckets[0].device)

    @torch.no_grad()
    def apply(self) -> None:
        """Add to the buckets what the averaging would have changed at the snapshot: average - snapshot.

        Raises:
            CollectiveError: as average().
        """
        self.finish()
        for bucket, difference in zip(self.buckets, self._snapshots, strict=True):
            bucket.add_(difference)

    # --------------------------------------------------------------------------------------------- figures

    def moved(self) -> int:
        """How many tensors have left the buckets since they were made: were given new storage, added or taken away.

        Averaging the buckets would not reach them.
        """
        places = [_place(tensor) for tensor in self._tensors()]
        changed = sum(now != before for now, before in zip(places, self._places, strict=False))
        return changed + abs(len(places) - len(self._places))

    def sum_of_squares(self) -> float:
        """Sum of squares of all elements; not finite if and only if an element is not."""
        return _total([self._squares_of(piece) for piece in self.pieces]).item()

    @staticmethod
    def _squares_of(piece: Piece) -> Tensor:
        return torch.stack([sum_of_squares(tensor.view(-1)) for tensor in piece.tensors]).sum()

    def relative_distance(self, before: Sequence[float]) -> Tensor | None:
        """Distance of the workers from their average, relative to it: sqrt(mean_k |x_k - x|^2) / |x|, |.| the L2 norm.

        A scalar on the device of the buckets, for which the host need not wait. None where the workers' average was
        rounded on the wire: it is not their exact mean, which the formula below needs.

        Called when the averaging has ended, before the buckets change, with the sums of squares of all ranks before
        it. Over the workers that were not left out. Uses sum_k |x_k - x|^2 = sum_k |x_k|^2 - K |x|^2, so that no copy
        of the parameters is needed. Below about 1e-4 the rounding of fp32 sums drowns it.
        """
        if isinstance(self._mean, Compressed):
            return None
        after = _total(list(self._squares.values()) or [self._squares_of(piece) for piece in self.pieces])
        if self._left_out:
            size = len(before) // self.workers  # ranks of a worker, which are neighbours
            before = [squares for rank, squares in enumerate(before) if rank // size not in self._left_out]
        copies = len(before)
        if self._shard_group is not None:
            after = after.to(self.device)
            dist.all_reduce(after, group=self._shard_group)
            copies = self.workers - len(self._left_out)
        return torch.where(after > 0, (sum(before) / (after * copies) - 1).clamp(min=0).sqrt(), 0.0)

    # ----------------------------------------------------------------------------------------------- state

    def begin_local(self) -> None:
        """Local steps begin after `parallel` ones: the buckets hold the same values on every worker."""
        if self._outer is not None:
            self._outer.begin_round()

    def restart(self) -> None:
        """The buckets have been loaded, the same on every worker: forget what earlier averagings left."""
        if isinstance(self._mean, Compressed):
            self._mean.restart()
        if self._outer is not None:
            self._outer.restart()

    def state_dict(self) -> dict[str, Any]:
        """What this rank carries over from one averaging to the next: int8's rounding errors, the outer momentum."""
        state = self._mean.state_dict() if isinstance(self._mean, Compressed) else {}
        return state if self._outer is None else {**state, "outer": self._outer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), after restart(). Raises ValueError if it is of other buckets."""
        if isinstance(self._mean, Compressed):
            self._mean.load_state_dict(state)
        if self._outer is not None and "outer" in state:
            self._outer.load_state_dict(state["outer"])

    def close(self) -> None:
        """Wait for the background and free what must not outlive the process group."""
        self.finish()
        if isinstance(self._mean, Captured):
            self._mean.close()


def _mean(buckets: Sequence[Tensor], group: Group, options: AveragingConfig) -> Mean:
    capacity = bucket_bytes(options.bucket_mb, group)
    if options.wire_dtype != "fp32":
        alone = [piece for bucket in buckets for piece in pieces_in_place([bucket], min(capacity, PIECE))]
        return Compressed(alone, group, options.wire_dtype)
    if not options.cuda_graph and (options.shared_memory or options.two_level is True):
        alone = [piece for bucket in buckets for piece in pieces_in_place([bucket], capacity)]
        by_topology = _mean_by_topology(alone, group, options)
        if by_topology is not None:
            return by_topology
    mean = AllReduce(pieces_in_place(buckets, capacity), group)
    return Captured(mean, group) if options.cuda_graph else mean


def _mean_by_topology(pieces: Sequence[Piece], group: Group, options: AveragingConfig) -> Mean | None:
    """The mean that suits the hosts on which the ranks of the group are; None for the flat one. All ranks call it."""
    hosts = hosts_of(group)
    two_level = agree_on_two_levels(hosts, options.two_level)
    one_host = len(hosts) == 1 and len(hosts[0]) > 1
    everywhere = see_one_another(pieces, hosts if options.shared_memory and (one_host or two_level) else [])
    if everywhere and one_host:
        return SharedMemory(pieces, group, everywhere)
    if two_level and all(gather(everywhere is not None)) and everywhere is not None:
        return TwoLevelSharedMemory(pieces, Levels.make(hosts, group), everywhere)
    if options.two_level is True:
        return TwoLevelCollectives(pieces, Levels.make(hosts, group))
    return None


def _total(squares: Sequence[float | Tensor]) -> Tensor:
    device = next((value.device for value in squares if isinstance(value, Tensor)), torch.device("cpu"))
    if not squares:  # of a rank whose part of a small model is empty
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in squares]).sum()


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last address of a 1-d tensor's bytes, the last one excluded."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
