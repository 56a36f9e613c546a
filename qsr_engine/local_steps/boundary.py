"""What happens at a boundary: headers are exchanged, then parameters, buffers and optimizer state are averaged.

With `averaging.overlap` a boundary begins an averaging, and something else ends it:

    next_forward   begins at the boundary; the model's reads wait; ended before the next update. The same numbers.
    delayed        begins with the next forward, from a snapshot; delay_steps later, or at the next boundary if that is
                   earlier, (average - snapshot) is added. Another algorithm: what a worker does in these steps does not
                   know the average yet. Sources: DaSGD (Zhou et al., arXiv 2006.00441), CO2 (Sun et al., ICLR 2024),
                   Streaming DiLoCo (Douillard et al., arXiv 2501.18512).

`wait()` ends either at once, so that the parameters are the average; the last boundary of the run does it itself.

With `averaging.fragments` a boundary is one of some fragments of the parameters, several times a round (see
`schedule.due_fragments`), and only these are then the same on all workers; with `averaging.mixing` not even they are.
Buffers and optimizer state are averaged at the end of a round. Where the run ends, a round is cut, or a worker is left
out, the boundary is one of all fragments; in the first two cases, without mixing.

Where workers are members that come and go, a boundary is one of `member.py`.

`averaged()` shows the average at any step, to an evaluation or a checkpoint, and changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from qsr_engine.averaging import NOBODY, Averager, CollectiveError, LeftOut
from qsr_engine.averaging.errors import Group
from qsr_engine.local_steps.averaged import Averaged, Buffers, OptimizerState
from qsr_engine.local_steps.costs import Costs
from qsr_engine.local_steps.header import Purpose
from qsr_engine.local_steps.meeting import Meeting
from qsr_engine.local_steps.member import MemberBoundary
from qsr_engine.local_steps.rounds import Rounds
from qsr_engine.local_steps.stopwatch import Stopwatch
from qsr_engine.local_steps.traffic import Traffic
from qsr_engine.membership.quorum import Members
from qsr_engine.membership.watchdog import LostRankError, Watchdog


class Boundary:
    """The averager of a rank, and the averaging that is under way.

    Args:
        rounds: where the run stands.
        digest: of the configuration; it travels in the header.
        everybody: a group of all ranks, for headers and buffers.
        traffic: what leaves this rank's worker.
        members: the other workers, where they come and go; all ranks are then those of this worker.
    """

    def __init__(
        self,
        rounds: Rounds,
        costs: Costs,
        averager: Averager,
        replica: Averaged,
        digest: int,
        watchdog: Watchdog,
        everybody: Group,
        traffic: Traffic,
        members: Members | None = None,
    ) -> None:
        self.averager = averager
        self._rounds, self._costs, self._replica, self._traffic = rounds, costs, replica, traffic
        self._watchdog = watchdog
        self._qsr = qsr = rounds.qsr
        average_buffers = qsr.averaging.buffers == "average"
        self.buffers = Buffers(replica, average=average_buffers, worker_size=qsr.worker_size, everybody=everybody)
        self._optimizer_state = OptimizerState(replica, qsr.averaging, averager.group)
        self._meeting = Meeting(rounds, costs, averager, self.buffers, digest, watchdog, everybody)
        self._distance: torch.Tensor | None = None
        # Sum of squares over so many ranks, before the averaging that is under way; None where it is not known.
        self._before: tuple[float, int] | None = (0.0, 1)
        self._left_out: LeftOut = NOBODY  # of that averaging
        self._fragments: tuple[int, ...] = tuple(averager.fragments)  # that averaging is of these
        self._whole = True  # it is of all of them, and without mixing
        self._due = False  # a delayed averaging that begins with the next forward
        self._averaging = Stopwatch(averager.home)
        self._apply_at: int | None = None  # the step after which a delayed averaging takes effect
        self.member: MemberBoundary | None = None
        if members is not None:
            self.member = MemberBoundary(
                rounds,
                costs,
                averager,
                replica,
                self.buffers,
                members,
                everybody,
                watchdog.moved,
                lambda: watchdog.halt.requested,
            )

    @property
    def asked_to_stop(self) -> bool:
        """Whether some rank was, as told at the end of the last round; of members, whether this one stops there."""
        return self._meeting.asked_to_stop or (self.member is not None and self.member.stops)

    @property
    def largest_z(self) -> float | None:
        """Of the worker that had moved farthest at the last averaging, as outliers are judged; None where none was."""
        return None if self._meeting.outliers is None else self._meeting.outliers.largest

    @property
    def relative_distance(self) -> float | None:
        """Distance of the workers from their average, at the last averaging that has ended; None before the first."""
        return None if self._distance is None else self._distance.item()

    @property
    def same_everywhere(self) -> bool:
        """Whether all workers hold the same parameters, once what runs behind the forward has ended."""
        return self._rounds.on_boundary and self._whole and not self._due and self._apply_at is None

    @property
    def _mixing(self) -> float:
        return 0.0 if self._whole else self._qsr.averaging.mixing

    @property
    def has_to_apply(self) -> bool:
        """Whether the average of an earlier step is still to take effect."""
        return self._apply_at is not None

    def average(self, fragments: Collection[int], purpose: Purpose = Purpose.BOUNDARY, *, whole: bool = False) -> bool:
        """Average, or begin to, after a local step.

        Args:
            fragments: of the parameters.
            whole: these are all, and nothing is mixed: with this step the run ends, or a round before its time.
        Returns:
            Whether this worker stands elsewhere now: it was behind the other members, and begins their next round.
        Raises:
            BoundaryError: on every rank, as exchange_headers() says; nothing was averaged.
            CollectiveError: a collective failed or timed out; LostRankError, which is one, where ranks are lost.
        """
        if self.member is not None:
            return self._average_as_member(self.member, purpose)
        options, everything = self._qsr.averaging, tuple(self.averager.fragments)
        with self._timed():
            self.averager.step = self._rounds.step
            self.averager.round_lasted(self._rounds.units)
            self._left_out, self._before = self._meeting.before_averaging(purpose, fragments)
            left_out = self._left_out
            self._fragments = everything if left_out.ranks else tuple(fragments)
            self._whole = whole or (self._fragments == everything and not options.mixing)
            self._costs.bytes_sent += self._traffic.of(self._fragments)
            if whole or left_out.ranks or self._rounds.at_end:
                self._average_the_rest(left_out)
            overlap = "none" if self._rounds.finished else options.overlap
            if overlap == "delayed":
                self._due = True
            elif overlap == "none" or not self.averager.start(left_out, self._fragments, self._mixing):
                self.averager.average(left_out, self._fragments, self._mixing)
                self._averaged()
        return False

    def _average_as_member(self, member: MemberBoundary, purpose: Purpose) -> bool:
        with self._timed():
            self.averager.step = self._rounds.step
            met, finite = self._meeting.inside_worker(purpose, member.members.agree)
            elsewhere, self._distance = member.average(
                squares=met.squares, finite=finite, skipped=met.skipped // self._qsr.worker_size, stop=met.stop
            )
            self._costs.seconds_waiting += member.seconds_waited()
        return elsewhere

    def _average_the_rest(self, left_out: LeftOut) -> None:
        """Buffers and optimizer state."""
        states = self._optimizer_state.average(left_out, self._rounds.round)
        self._costs.bytes_sent += self.buffers.average(left_out) + self._traffic.state * states
        self.buffers.same_everywhere()

    def _averaged(self) -> None:
        if self._before is not None:
            self._distance = self.averager.relative_distance(*self._before, self._left_out, self._fragments)
        if self.averager.movement is not None:
            self.averager.movement.begin(self._fragments)
        self._replica.refresh()

    def begin_forward(self) -> None:
        """A forward in training begins."""
        if self._due:
            with self._timed():
                self._due = False
                self._apply_at = self._rounds.step + (self._qsr.averaging.delay_steps or 1)
                self.averager.snapshot(self._fragments)
        else:
            self.averager.begin_forward()

    def begin_update(self) -> None:
        """The optimizer is about to change the parameters. Raises CollectiveError: the averaging failed."""
        if self._due:  # no forward was seen; the parameters are still those of the boundary
            self.begin_forward()
        self.finish()

    def stepped(self, *, meets: bool) -> None:
        """A step has been taken: add a delayed average where it is due, at the latest where the next boundary is."""
        self.buffers.changed()
        if self._apply_at is not None and (self._rounds.step == self._apply_at or meets):
            with self._timed():
                self._apply_at = None
                self.averager.apply(self._mixing)
                self._averaged()

    def finish(self) -> None:
        """End an averaging that runs behind the forward. Only this rank waits. Raises CollectiveError: it failed."""
        self._watchdog.moved()
        if self.averager.in_background and self._apply_at is None:
            with self._timed():
                self.averager.finish()
                self._averaged()

    def wait(self) -> None:
        """End the averaging that the boundary just passed began: what it averages is the average on every worker.

        Every rank must call it, on a boundary: a delayed averaging is then done at once, without delay.

        Raises:
            CollectiveError: the averaging failed.
            RuntimeError: a delayed averaging is under way inside a round.
        """
        self.finish()
        if self._apply_at is not None and not self._rounds.on_boundary:
            raise RuntimeError(
                f"step {self._rounds.step} is inside a round, and the average of its first step takes effect after "
                f"step {self._apply_at}; call wait() on a boundary, when engine.step() has returned True"
            )
        if self._due or self._apply_at is not None:
            with self._timed():
                self.averager.finish()  # a snapshot's; no update has followed it
                self._due, self._apply_at = False, None
                self.averager.average(fragments=self._fragments, mixing=self._mixing)
                self._averaged()

    def meet(self) -> None:
        """Every rank comes, for an evaluation or a checkpoint. Raises as averaged() does."""
        self._watchdog.moved()
        with self._watchdog.explained():
            self.averager.finish() if self._apply_at is not None else self.finish()
            self._meeting.exchange(Purpose.AVERAGED)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, parameters and buffers are the workers' average; afterwards every rank has what it had, bit for bit.

        Every rank must enter, between two steps. What is under way goes on: next_forward's averaging is ended, which
        changes no number, and a delayed one takes effect when it would have.

        Raises:
            BoundaryError: on every rank, if the ranks are not at the same step, or not all of them enter.
            CollectiveError: a collective failed.
        """
        self.meet()
        with contextlib.ExitStack() as afterwards:
            if not self.same_everywhere:
                afterwards.callback(self._replica.refresh)
                with self._watchdog.explained():
                    afterwards.enter_context(self.averager.averaged())
                self._replica.refresh()
            afterwards.enter_context(self.buffers.averaged())
            yield

    def state_dict(self) -> dict[str, Any]:
        """What overlaps the steps, as plain values; the averager has its tensors."""
        return {
            "relative_distance": self.relative_distance,
            "due": self._due,
            "apply_at": self._apply_at,
            "before": None if self._before is None else list(self._before),
            "fragments": list(self._fragments),
            "of_fragments": len(self.averager.fragments),
            "whole": self._whole,
            "outliers": None if self._meeting.outliers is None else self._meeting.outliers.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What is under way belongs to a run that is left; another one was loaded, whose rounds are known by now.

        Raises:
            ValueError: fragments are under way that this run does not have.
        """
        self.averager.finish()
        everything = tuple(self.averager.fragments)
        under_way = state["due"] or state["apply_at"] is not None
        if under_way and state["of_fragments"] != len(everything):
            raise ValueError(
                f"an averaging is under way of a run with averaging.fragments {state['of_fragments']}, and this run "
                f"has {len(everything)}; write {state['of_fragments']}, or go on from a checkpoint where none is"
            )
        self._due, self._apply_at, self._whole = state["due"], state["apply_at"], state["whole"]
        self._fragments = tuple(state["fragments"]) if under_way else everything
        if self._meeting.outliers is not None:
            self._meeting.outliers.load_state_dict(state["outliers"])
        before = state["before"]
        self._before = None if before is None else (before[0], before[1])
        self.buffers.same_everywhere()
        if not self.same_everywhere:
            self.buffers.changed()
        distance = state["relative_distance"]
        self._distance = None if distance is None else torch.tensor(distance, dtype=torch.float64)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Seconds that the steps wait for averaging; a failure says at which step."""
        try:
            with self._watchdog.explained(), self._averaging.running():
                yield
        except LostRankError:
            raise
        except CollectiveError as error:
            if str(error).startswith("after step"):
                raise
            raise CollectiveError(f"after step {self._rounds.step}: {error}") from error

    def tell_seconds(self) -> None:
        """Add to the costs what the device has done by now."""
        self._costs.seconds_averaging += self._averaging.take()
        self._costs.seconds_waiting += self._meeting.waiting.take()
