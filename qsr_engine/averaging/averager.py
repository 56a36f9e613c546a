"""What one rank averages with the others, and how: the pieces of its buckets, their mean, and when it is waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging.allreduce import average_tensors
from qsr_engine.averaging.background import Background
from qsr_engine.averaging.buckets import Places, bucket_bytes, parts_within, pieces_of
from qsr_engine.averaging.choose import choose_reducer
from qsr_engine.averaging.distance import Squares
from qsr_engine.averaging.errors import CollectiveError, Group
from qsr_engine.averaging.fragments import numbers_of
from qsr_engine.averaging.mixing import mixed
from qsr_engine.averaging.movement import Movement
from qsr_engine.averaging.next_forward import NextForward
from qsr_engine.averaging.reducer import NOBODY, LeftOut
from qsr_engine.averaging.snapshot import Snapshot
from qsr_engine.config.averaging import AveragingConfig, OuterConfig


class Averager:
    """Averages buckets over the ranks of a group, in place: all of them, or some of their fragments.

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
        fragments: views of the buckets that together are all of their elements, as averaging.fragments has them. By
            default the buckets are the only one.
        movement: whether `movement` is kept, which says how far the buckets have moved since the last averaging.
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
        fragments: Sequence[Sequence[Tensor]] | None = None,
        movement: bool = False,
    ) -> None:
        self.buckets = list(buckets)
        self._fragments = [self.buckets] if fragments is None else fragments
        self.group = group
        self.home = self.buckets[0].device if self.buckets else torch.device("cpu")
        self.device = device or self.home
        self.options = options = options or AveragingConfig(shared_memory=False)
        self.workers = dist.get_world_size(group)
        self._reducer = choose_reducer(
            self.buckets, group, options, outer, device=self.device, fragments=self._fragments
        )
        self.pieces = self._reducer.pieces
        self._fragment_of = numbers_of(self.pieces, self._fragments)
        self._order = list(range(len(self.pieces)))
        self.step = 0  # of the boundary; errors name it
        self._places = Places(tensors)
        self._squares = Squares(self.pieces, self.workers, shard_group, self.device)
        self._background = Background(self.home)
        self.in_background = False  # from start() or snapshot() to finish()
        self._forward: NextForward | None = None
        self._refresh: Callable[[Tensor], None] = lambda part: None
        self._snapshot: Snapshot | None = None
        self.movement = Movement(self._fragments) if movement else None

    @property
    def bytes_per_averaging(self) -> int:
        """Bytes that this rank sends to others in one averaging, or exchanges with them through shared memory."""
        return self._reducer.bytes_sent

    @property
    def fragments(self) -> range:
        """Their numbers."""
        return range(len(self._fragments))

    def bytes_of(self, fragment: int) -> int:
        """Bytes that this rank sends for one fragment."""
        return self._reducer.bytes_of(self._pieces_of([fragment]))

    def _pieces_of(self, fragments: Collection[int] | None) -> list[int]:
        """Those of some fragments, or of all, in the order in which they are averaged."""
        if fragments is None:
            return list(self._order)
        return [index for index in self._order if self._fragment_of[index] in fragments]

    @property
    def way(self) -> str:
        """How the mean is computed: the name of a class of this package."""
        return self._reducer.way

    def left_out(self, workers: Sequence[int]) -> LeftOut:
        """What average() and start() need to know for the mean of the others, which these workers get too.

        Args:
            workers: their numbers, by rank in the group; fewer than there are, and the same on every rank.
        """
        return LeftOut(tuple(workers), len(workers), dist.get_rank(self.group) in workers)

    def average(
        self, left_out: LeftOut = NOBODY, fragments: Collection[int] | None = None, mixing: float = 0.0
    ) -> None:
        """Replace every bucket by its mean over the group; what it holds on a worker that is left out is lost.

        Args:
            fragments: only these; all of them where a worker is left out.
            mixing: what a worker keeps of its own: mixing x own + (1 - mixing) x mean. One that is left out keeps
                nothing.
        Raises:
            CollectiveError: a collective failed or timed out; the buckets may be half averaged.
        """
        for _ in self._run(self._pieces_of(fragments), left_out, mixing):
            pass

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the buckets hold their mean over the group; afterwards what they held, bit for bit.

        Every rank of the group must enter, and nothing may be under way. It is the plain mean, on fp32 wires and
        without the outer optimizer, and leaves nothing behind. What the buckets held is on the host meanwhile.

        Raises:
            CollectiveError: as average(); the buckets hold what they held.
        """
        assert not self.in_background, "finish() comes first"
        held = [bucket.to("cpu", copy=True) for bucket in self.buckets]
        try:
            average_tensors(self.buckets, self.group, bucket_bytes(self.options.bucket_mb, self.group))
            yield
        finally:
            for bucket, value in zip(self.buckets, held, strict=True):
                bucket.copy_(value)

    def _run(self, order: Sequence[int], left_out: LeftOut, mixing: float) -> Iterator[int]:
        """Begin to average; what is returned goes on, and gives the index of each piece that is finished."""
        assert not left_out.ranks or len(order) == len(self.pieces), "it would lose what it holds of other fragments"
        averaged = self._reducer.run(order, left_out)
        return self._finished(mixed(averaged, self.pieces, order, 0.0 if left_out.here else mixing))

    def _finished(self, averaged: Iterator[tuple[int, Tensor | None]]) -> Iterator[int]:
        try:
            for index in self._squares.noted(averaged):
                for piece in self.pieces[index].tensors:
                    for part in parts_within(piece, self.buckets):
                        self._refresh(part)
                yield index
        except CollectiveError as error:
            raise CollectiveError(f"after step {self.step}: {error}") from error

    def overlap_with(
        self, module: nn.Module, parameters: Sequence[tuple[Tensor, int, int, int]], refresh: Callable[[Tensor], None]
    ) -> None:
        """Say who reads the buckets, before `start()` is used.

        Args:
            module: the model; its reads of a parameter wait for that parameter.
            parameters: (parameter, bucket, start, stop) for each; it is a view of, or derives from, these elements.
            refresh: called with every averaged part of a bucket, a 1-d view; updates what derives from it.
        """
        needs = pieces_of(parameters, self.buckets, self.pieces)
        self._forward = NextForward(module, needs, len(self.pieces), self.group)
        self._refresh = refresh

    def begin_forward(self) -> None:
        """A forward begins."""
        if self._forward is not None:
            self._forward.begin(self._background.wait_for_all)

    def start(self, left_out: LeftOut = NOBODY, fragments: Collection[int] | None = None, mixing: float = 0.0) -> bool:
        """Begin to average() in the background, in the order in which the first forward read the parameters.

        Until finish(), the group and the buckets are not to be used otherwise. Where no forward of the whole model has
        been seen, nobody knows what may be read when; then False, and nothing is begun.
        """
        assert self._forward is not None, "overlap_with() comes first"
        order = self._forward.order()
        if order is None:
            return False
        self._order = order
        chosen = self._pieces_of(fragments)
        self._begin(self._run(chosen, left_out, mixing), chosen)
        self._forward.guard(self._background.wait)
        return True

    def _begin(self, run: Iterator[int], pieces: Sequence[int]) -> None:
        self._background.begin(run, pieces)
        self.in_background = True

    def finish(self) -> None:
        """Wait for what start() or snapshot() began. Again is harmless.

        Raises:
            CollectiveError: as average().
        """
        if not self.in_background:
            return
        try:
            self._background.finish()
        finally:
            self.in_background = False
            if self._forward is not None:
                self._forward.end()

    def snapshot(self, fragments: Collection[int] | None = None) -> None:
        """Begin to average a copy of the buckets in the background; the buckets may then be changed."""
        averaged, order = self._room_for_a_snapshot().take(self.fragments if fragments is None else fragments)
        self._begin(self._squares.noted(averaged), order)

    def _room_for_a_snapshot(self) -> Snapshot:
        if self._snapshot is None:
            capacity = bucket_bytes(self.options.bucket_mb, self.group)
            self._snapshot = Snapshot(self._fragments, self.group, capacity)
        return self._snapshot

    def apply(self, mixing: float = 0.0) -> None:
        """Add to the buckets what average(mixing=mixing) would have changed at the snapshot.

        That is (1 - mixing) x (mean - snapshot).

        Raises:
            CollectiveError: as average().
        """
        self.finish()
        assert self._snapshot is not None, "snapshot() comes first"
        self._snapshot.apply(1 - mixing)

    def moved(self) -> int:
        """How many tensors have left the buckets since they were made: averaging the buckets would not reach them."""
        return self._places.changed()

    def sum_of_squares(self, fragments: Collection[int] | None = None) -> Tensor:
        """Sum of squares of all elements, an fp64 scalar on their device; not finite if and only if an element is not.

        On a GPU the host does not wait for it.
        """
        return self._squares.now(self._pieces_of(fragments))

    def relative_distance(
        self, before: float, ranks: int, left_out: LeftOut = NOBODY, fragments: Collection[int] | None = None
    ) -> Tensor | None:
        """Distance of the workers from their average, relative to it: see Squares.relative_distance().

        A scalar on the device of the buckets, for which the host need not wait. None where the workers' average was
        rounded on the wire: it is not their exact mean, which the formula needs.
        """
        if not self._reducer.exact:
            return None
        return self._squares.relative_distance(before, ranks, left_out, self._pieces_of(fragments))

    def round_lasted(self, units: float) -> None:
        """How long the round is that the next averaging ends, in units of qsr.outer.unit_steps."""
        self._reducer.round_lasted(units)

    def begin_local(self) -> None:
        """Local steps begin after `parallel` ones: the buckets hold the same values on every worker."""
        self._reducer.begin_round()
        self._begin_movement()

    def restart(self) -> None:
        """The buckets have been loaded, the same on every worker: forget what earlier averagings left."""
        self._reducer.restart()
        self._begin_movement()

    def _begin_movement(self) -> None:
        if self.movement is not None:
            self.movement.begin()

    def state_dict(self, *, inside_round: bool = False, to_apply: bool = False) -> dict[str, Any]:
        """What this rank carries over from one averaging to the next: int8's rounding errors, the outer momentum.

        Args:
            inside_round: the buckets have moved on since the last averaging.
            to_apply: apply() is still to come.
        """
        state = self._reducer.state_dict(inside_round=inside_round)
        if inside_round and self.movement is not None:
            state["movement"] = self.movement.state_dict()
        if to_apply:
            self.finish()
            assert self._snapshot is not None
            state["snapshot"] = self._snapshot.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], *, inside_round: bool = False) -> None:
        """Go on from a state_dict(), after restart(). Raises ValueError as Reducer.load_state_dict()."""
        begun_with = state.get("movement")
        self._reducer.load_state_dict({k: v for k, v in state.items() if k != "movement"}, inside_round=inside_round)
        if inside_round and self.movement is not None:
            self.movement.load_state_dict(begun_with)
        if "snapshot" in state:
            self._room_for_a_snapshot().load_state_dict(state["snapshot"])

    def close(self) -> None:
        """Wait for the background, end its thread and free what must not outlive the process group."""
        try:
            self.finish()
        finally:
            self._background.close()
            self._reducer.close()
