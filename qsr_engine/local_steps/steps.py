"""Local steps of one rank: they count, ask the rule for the period, and average at the boundary.

    begin a round          H = period(step, lr of this step)
    H optimizer steps      of the worker's own optimizer; no communication between workers
    boundary               headers exchanged, parameters averaged; the next round begins

With averaging.fragments there are boundaries inside a round too, each of a part of the parameters.

For every optimizer step (not micro-batch) `begin_forward()` comes before the forward, `begin_update()` before the
optimizer changes the parameters, and `advance()` after it. In a `parallel` round the engine averages the gradients
itself, and its boundary exchanges nothing. Strategies that change mode during a run follow from the schedule: `mode`
says what the current step is.
"""

from __future__ import annotations

import contextlib
from typing import Any

from qsr_engine.averaging import Averager
from qsr_engine.averaging.errors import Group
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.local_steps.averaged import Averaged
from qsr_engine.local_steps.boundary import Boundary
from qsr_engine.local_steps.costs import Costs
from qsr_engine.local_steps.header import Purpose
from qsr_engine.local_steps.rounds import Rounds, with_a_new_round
from qsr_engine.local_steps.traffic import Traffic, bytes_percent
from qsr_engine.membership.quorum import Members
from qsr_engine.membership.watchdog import Watchdog
from qsr_engine.schedule import Mode


class LocalSteps:
    """Position in the run (`rounds`), what its averagings cost so far (`costs`), and its boundaries.

    Args:
        qsr: the run.
        averager: the parameters, in buckets, and the group of ranks to average over.
        digest: of the configuration; it travels in the boundary header.
        replica: what else belongs to the parameters.
        traffic: what leaves this rank's worker; without it, what the averager of this rank sends.
        watchdog: tells lost ranks and requests to stop; without one, this process is by itself.
        everybody: a group of all ranks, for headers and buffers.
        members: the other workers, where they come and go.
    """

    def __init__(
        self,
        qsr: QSRConfig,
        averager: Averager,
        digest: int,
        *,
        replica: Averaged | None = None,
        traffic: Traffic | None = None,
        watchdog: Watchdog | None = None,
        everybody: Group = None,
        members: Members | None = None,
    ) -> None:
        replica = replica or Averaged()
        self.qsr, self.averager = qsr, averager
        self.watchdog = watchdog or Watchdog(None, 0, 1, None)
        self.rounds = Rounds(qsr, replica.largest_rate)
        self._costs = Costs()
        if traffic is None:
            each = tuple(averager.bytes_of(fragment) for fragment in averager.fragments)
            traffic = Traffic(averaging=averager.bytes_per_averaging, fragments=each)
        self.traffic = traffic
        self.boundary = Boundary(
            self.rounds, self._costs, averager, replica, digest, self.watchdog, everybody, traffic, members
        )
        self._stands = False  # all ranks do, after the same step, because one was asked to stop

    # -------------------------------------------------------------------------------------------- what users read

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.rounds.step

    @property
    def round(self) -> int:
        """Number of the current round, from 0."""
        return self.rounds.round

    @property
    def period(self) -> int:
        """H of the current round; after the last step, of the last round."""
        return self.rounds.period

    @property
    def mode(self) -> Mode:
        """Whether the current step averages gradients (`parallel`) or is a local step."""
        return self.rounds.mode

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        return self.rounds.learning_rate

    @property
    def finished(self) -> bool:
        """Whether all qsr.total_steps are done."""
        return self.rounds.finished

    @property
    def on_boundary(self) -> bool:
        """Whether it stands between two rounds: the parameters are the same on every worker, after wait().

        With averaging.fragments or averaging.mixing that is so only where the run has ended, or end_round() was called.
        """
        return self.rounds.on_boundary

    @property
    def stopping(self) -> bool:
        """After a step: some rank was asked to stop, and all know it and stand here; save and exit."""
        return self._stands or self.boundary.asked_to_stop

    @property
    def costs(self) -> Costs:
        """What averagings have cost, with the seconds that the device has spent on them by now."""
        self.boundary.tell_seconds()
        return self._costs

    @property
    def averagings(self) -> int:
        """Averagings so far; under `parallel`, one a step."""
        return self.costs.averagings

    @property
    def bytes_sent(self) -> int:
        """What has left this rank's worker for others so far."""
        return self.costs.bytes_sent

    @property
    def averagings_percent(self) -> float:
        """Averagings over steps so far: the paper's relative communication."""
        return 100 * self.averagings / max(1, self.step)

    @property
    def bytes_percent(self) -> float:
        """Bytes that have left the worker over those that would have left it under `parallel`."""
        return bytes_percent(self.bytes_sent, self.costs.parallel_bytes_so_far)

    @property
    def relative_distance(self) -> float | None:
        """Distance of the workers from their average, at the last averaging that has ended; None before the first."""
        return self.boundary.relative_distance

    @property
    def largest_z(self) -> float | None:
        """z of the worker that had moved farthest at the last averaging; None where faults.outlier judged nobody."""
        return self.boundary.largest_z

    def figures(self) -> dict[str, float]:
        """What a monitor shows of a boundary; distance and largest z only where they are known."""
        figures: dict[str, float] = {
            "period": self.period,
            "averagings": self.averagings,
            "averagings_percent": self.averagings_percent,
            "bytes_sent": self.bytes_sent,
            "bytes_percent": self.bytes_percent,
            "skipped_steps": self.costs.skipped_steps_of_all_workers,
            "left_out": sum(self.costs.left_out.values()),
            "clipped": sum(self.costs.clipped.values()),
        }
        known = {"relative_distance": self.relative_distance, "largest_z": self.largest_z}
        return figures | {name: value for name, value in known.items() if value is not None}

    def request_stop(self) -> None:
        """Ask all ranks to stop, as qsr.faults.on_signal says; `stopping` is then True after a step, on every rank.

        A handler of a signal may call it.
        """
        self.watchdog.halt.request()

    def finish(self) -> None:
        """End an averaging that runs behind the forward. Only this rank waits. Raises CollectiveError: it failed."""
        self.boundary.finish()

    def wait(self) -> None:
        """The parameters are the average on every worker, which must all call it: see Boundary.wait()."""
        self.boundary.wait()

    # ------------------------------------------------------------------------------------------- what engines call

    def begin_forward(self) -> None:
        """A forward in training begins. Raises LostRankError."""
        self.watchdog.begin(self.step, self.round)
        self.boundary.begin_forward()

    def begin_update(self) -> None:
        """The optimizer is about to change the parameters.

        The round's first step fixes H: a scheduler that steps after the engine has done so by now.

        Raises:
            CollectiveError: the averaging in the background failed.
        """
        if self.qsr.lr is None and self.rounds.at_start:
            self.rounds.begin_again()
        self.boundary.begin_update()

    def advance(self) -> bool:
        """Count one optimizer step, and average what is due. Returns True at the end of a round.

        Raises:
            BoundaryError, CollectiveError: as Boundary.average().
            RuntimeError: the run has ended already.
        """
        rounds, costs, mode = self.rounds, self.costs, self.mode
        rounds.check_unfinished()
        rounds.step += 1
        self.watchdog.done(rounds.step, rounds.round, finished=rounds.finished)
        costs.parallel_bytes_so_far += self.traffic.parallel
        if self.qsr.strategy == "parallel":  # before the switch of post_local the driver averages, and counts it
            costs.bytes_sent += self.traffic.parallel
        self._stands = self._meets_to_stop()
        if self._stands and mode == "local" and self.qsr.faults.on_signal == "cut_round":
            rounds.cut()
        self.boundary.stepped(meets=bool(rounds.due))
        if rounds.at_end:
            self._end_round(Purpose.BOUNDARY)
            return True
        if rounds.due:
            self.boundary.average(rounds.due)
        return False

    def end_round(self) -> bool:
        """End the round here: average now, and begin a new one. Every rank must call it, between two steps.

        On a boundary there is no round to end, and an averaging that is under way is ended; where it was not one of all
        parameters (averaging.fragments, averaging.mixing), all are averaged. They are then the same on every worker.

        Returns:
            Whether a round was ended.
        Raises:
            BoundaryError, CollectiveError: as Boundary.average().
        """
        if self.on_boundary:
            self.wait()
            if not self.boundary.same_everywhere:
                self.boundary.average(self.averager.fragments, Purpose.END_ROUND, whole=True)
                self.wait()
            return False
        self.boundary.finish()
        self.rounds.cut()
        self.boundary.stepped(meets=True)
        self._end_round(Purpose.END_ROUND)
        self.wait()
        return True

    def _end_round(self, purpose: Purpose) -> None:
        """All steps of the round have been taken."""
        rounds, mode = self.rounds, self.mode
        elsewhere = mode == "local" and self.boundary.average(rounds.due, purpose, whole=rounds.ends_whole)
        self.costs.averagings += 1
        if not rounds.finished and not elsewhere:
            rounds.begin_next()
            if mode == "parallel" and rounds.mode == "local":
                self.averager.begin_local()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the parameters and buffers are the workers' average: see Boundary.averaged()."""
        return self.boundary.averaged()

    def _meets_to_stop(self) -> bool:
        """Whether all ranks stand after this step because the run is to stop, the same on every rank.

        Ranks that meet at every step cannot tell one another in a header. Where a round of local steps ends by itself,
        the header of the boundary tells it.
        """
        local = self.mode == "local"
        if not self.watchdog.halt.requested or self.finished or (local and self.rounds.at_end):
            return False
        return not (local and self.qsr.faults.on_signal == "finish_round") and self.watchdog.halt.at(self.step)

    # ------------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on, as plain numbers; the round is part of it."""
        return {**self.costs.state_dict(), **self.boundary.state_dict(), **self.rounds.state_dict()}

    def averager_state(self) -> dict[str, Any]:
        """What the averager carries over from the last averaging to the next, tensors among it."""
        same = self.boundary.same_everywhere
        return self.averager.state_dict(inside_round=not same, to_apply=self.boundary.has_to_apply)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), also from the middle of a round, as Rounds.load_state_dict() does.

        Raises:
            ValueError: keys are missing or unknown, or the state lies outside this run.
        """
        # An older checkpoint has none of these.
        of_all: dict[str, Any] = {"fragments": [0], "of_fragments": 1, "whole": True}
        delayed: dict[str, Any] = {"due": False, "apply_at": None, "before": [0.0, 1]}
        state = {
            "left_out": {},
            "clipped": {},
            "late": 0,
            "outliers": None,
            "lr_before": None,
            **delayed,
            **of_all,
            **state,
        }
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"a local-step state has the keys {sorted(expected)}; found {sorted(state)}")
        self.rounds.check_state(state)
        self.costs.load_state_dict(state)
        self.rounds.load_state_dict(state)
        self.boundary.load_state_dict(state)
        self._stands = False


def from_the_average(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict(), as where the workers' average at its step begins a round and nothing is under way."""
    return {**with_a_new_round(state), "due": False, "apply_at": None, "whole": True}
