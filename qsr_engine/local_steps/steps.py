"""Local steps of one rank: they count, ask the rule for the period, and average at the boundary.

    begin a round          H = period(step, lr of this step)
    H optimizer steps      of the worker's own optimizer; no communication between workers
    boundary               headers exchanged, parameters averaged; the next round begins

For every optimizer step (not micro-batch) `begin_forward()` comes before the forward, `begin_update()` before the
optimizer changes the parameters, and `advance()` after it. In a `parallel` round the engine averages the gradients
itself, and its boundary exchanges nothing. Strategies that change mode during a run follow from the schedule: `mode`
says what the current step is.
"""

from __future__ import annotations

from typing import Any

from qsr_engine.averaging import Averager
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.local_steps.averaged import Averaged
from qsr_engine.local_steps.boundary import Boundary
from qsr_engine.local_steps.costs import Costs
from qsr_engine.local_steps.rounds import Rounds
from qsr_engine.membership.watchdog import Watchdog
from qsr_engine.schedule import Mode


class LocalSteps:
    """Position in the run (`rounds`), what its averagings cost so far (`costs`), and its boundaries.

    Args:
        qsr: the run.
        averager: the parameters, in buckets, and the group of ranks to average over.
        digest: of the configuration; it travels in the boundary header.
        replica: what else belongs to the parameters.
        parallel_bytes: bytes that a rank sends at one step of `parallel`.
        watchdog: tells lost ranks and requests to stop; without one, this process is by itself.
    """

    def __init__(
        self,
        qsr: QSRConfig,
        averager: Averager,
        digest: int,
        *,
        replica: Averaged | None = None,
        parallel_bytes: int = 0,
        watchdog: Watchdog | None = None,
    ) -> None:
        replica = replica or Averaged()
        self.qsr, self.averager = qsr, averager
        self.watchdog = watchdog or Watchdog(None, 0, 1, None)
        self.rounds = Rounds(qsr, replica.largest_rate)
        self.costs = Costs()
        self.boundary = Boundary(self.rounds, self.costs, averager, replica, digest, self.watchdog)
        self._parallel_bytes = parallel_bytes
        self._was_cut = False

    # -------------------------------------------------------------------------------------------- what users read

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.rounds.step

    @property
    def round(self) -> int:
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
        return self.rounds.finished

    @property
    def on_boundary(self) -> bool:
        """Whether it stands between two rounds: the parameters are the same on every worker, after wait()."""
        return self.rounds.on_boundary

    @property
    def stopping(self) -> bool:
        """At a boundary: some rank was asked to stop, and all know it; save and exit."""
        return self._was_cut or self.boundary.asked_to_stop

    @property
    def averagings(self) -> int:
        return self.costs.averagings

    @property
    def bytes_sent(self) -> int:
        return self.costs.bytes_sent

    @property
    def relative_distance(self) -> float | None:
        """Distance of the workers from their average, at the last averaging that has ended; None before the first."""
        return self.boundary.relative_distance

    def figures(self) -> dict[str, float]:
        """What a monitor shows of a boundary; the distance only where it is known."""
        figures: dict[str, float] = {
            "period": self.period,
            "averagings": self.averagings,
            "bytes_sent": self.bytes_sent,
            "skipped_steps": self.costs.skipped_steps_of_all_workers,
            "left_out": sum(self.costs.left_out.values()),
        }
        if self.relative_distance is not None:
            figures["relative_distance"] = self.relative_distance
        return figures

    def request_stop(self) -> None:
        """Ask all ranks to stop, as qsr.faults.on_signal says; `stopping` is then True at a boundary, on every rank.

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
        """Count one optimizer step; at the end of the round, average. Returns True at a boundary.

        Raises:
            BoundaryError, CollectiveError: as Boundary.average().
            RuntimeError: the run has ended already.
        """
        rounds, costs, mode = self.rounds, self.costs, self.mode
        rounds.check_unfinished()
        rounds.step += 1
        self.watchdog.done(rounds.step, rounds.round, finished=rounds.finished)
        costs.parallel_bytes_so_far += self._parallel_bytes
        if mode == "parallel":
            costs.bytes_sent += self._parallel_bytes
        at_the_end = self._cuts_round() or rounds.at_end
        self.boundary.stepped(at_the_end=at_the_end)
        if not at_the_end:
            return False
        if mode == "local":
            self.boundary.average()
        costs.averagings += 1
        if not rounds.finished:
            rounds.begin_next()
            if mode == "parallel" and rounds.mode == "local":
                self.averager.begin_local()
        return True

    def _cuts_round(self) -> bool:
        """Whether the round ends here because the run is to stop, the same on every rank.

        Ranks that meet at every step cannot tell one another in a header. Where local steps end by themselves, the
        header of the boundary tells it.
        """
        local = self.mode == "local"
        if not self.watchdog.halt.requested or self.finished or (local and self.rounds.at_end):
            return False
        if (local and self.qsr.faults.on_signal == "finish_round") or not self.watchdog.halt.at(self.step):
            return False
        self.rounds.cut()
        self._was_cut = True
        return True

    # ------------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on, as plain numbers; the round is part of it."""
        own = {"relative_distance": self.relative_distance}
        return {**self.costs.state_dict(), **own, **self.rounds.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), also from the middle of a round, as Rounds.load_state_dict() does.

        Raises:
            ValueError: keys are missing or unknown, or the state lies outside this run.
        """
        state = {"left_out": {}, **state}  # a checkpoint of an older version has none
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"a local-step state has the keys {sorted(expected)}; found {sorted(state)}")
        self.rounds.check_state(state)
        self.boundary.abandon(state["relative_distance"])
        self.costs.load_state_dict(state)
        self.rounds.load_state_dict(state)
