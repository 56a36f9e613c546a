"""The position in a run: step, round, H and mode. Pure: it knows no tensors and no other rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.schedule import Mode, Round, due_fragments, learning_rate, mode, period, rises

SAME_RATE = 1e-12  # relative: learning rates of two hosts that compute the same schedule do not differ by more


class Rounds:
    """Counts steps, and asks the rule for the period at the start of each round.

    Args:
        qsr: the run.
        rate: reads the optimizer's learning rate; asked only where the configuration has no `lr` block.
    """

    def __init__(self, qsr: QSRConfig, rate: Callable[[], float]) -> None:
        self.qsr = qsr
        self._rate = rate
        self.step = 0
        self.round = 0
        self._agreed: float | None = None  # learning rate, with the other ranks
        self._lr: float | None = None  # of the current round's first step
        self._lr_before: float | None = None  # of that of the round before
        self._cut = False  # the current round ends before its time
        self._current = self._begin()

    @property
    def period(self) -> int:
        """H of the current round; after the last step, of the last round."""
        return self._current.length

    @property
    def mode(self) -> Mode:
        """Whether the current step averages gradients (`parallel`) or is a local step."""
        return self._current.mode

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        if self.qsr.lr is None:
            return self._rate()
        return learning_rate(self.qsr.lr, self.step, self.qsr.total_steps)

    @property
    def finished(self) -> bool:
        return self.step >= self.qsr.total_steps

    @property
    def at_start(self) -> bool:
        """Whether no step of the current round has been taken."""
        return self.step == self._current.start

    @property
    def at_end(self) -> bool:
        """Whether all steps of the current round have been taken."""
        return self.step == self._current.start + self._current.length

    @property
    def on_boundary(self) -> bool:
        """Whether it stands between two rounds, or at the end of the run."""
        return self.finished or self.at_start

    @property
    def ends_whole(self) -> bool:
        """Whether everything is averaged after the step that was taken last: with it the run ends, or a round that was
        cut."""
        return self.finished or self._cut

    @property
    def due(self) -> tuple[int, ...]:
        """The fragments of the parameters (averaging.fragments) to average after the step that was taken last."""
        fragments, current = self.qsr.averaging.fragments, self._current
        if current.mode == "parallel":
            return ()
        if self.ends_whole:
            return tuple(range(fragments))
        return due_fragments(current.length, self.step - current.start, fragments)

    @property
    def units(self) -> float:
        """Length of the current round up to here, in units of outer.unit_steps; 1 where there are none."""
        return self.units_of(self._current.start, self.step)

    def units_of(self, start: int, stop: int) -> float:
        """Length of a round of the steps from start to stop, the latter excluded: their rates add up to so many
        times unit_steps x lr.peak."""
        qsr = self.qsr
        if qsr.lr is None or qsr.outer is None or qsr.outer.unit_steps is None:
            return 1.0
        rates = math.fsum(learning_rate(qsr.lr, step, qsr.total_steps) for step in range(start, stop))
        return rates / (qsr.outer.unit_steps * qsr.lr.peak)

    def check_unfinished(self) -> None:
        """Raises RuntimeError if the run has taken its total_steps."""
        if self.finished:
            raise RuntimeError(
                f"the run ended at step {self.step}, which is qsr.total_steps; a longer run needs a larger total_steps "
                "from its start, since the learning rate and the last round depend on it"
            )

    def cut(self) -> None:
        """The current round ends after the step that was taken last."""
        self._current = dataclasses.replace(self._current, length=self.step - self._current.start)
        self._cut = True

    def begin_next(self) -> None:
        """The next round begins."""
        self.round += 1
        self._lr_before = self._lr
        self._current = self._begin()

    def begin_again(self) -> None:
        """Ask for the period once more: at the first step, where the optimizer's learning rate has changed since."""
        self._current = self._begin()

    def agree(self, rate: float) -> None:
        """Rank 0's, for the next step: where this rank's differs from it by rounding only, it sets the next period."""
        self._agreed = rate

    def _begin(self) -> Round:
        rate = self.learning_rate
        if self._agreed is not None and math.isclose(rate, self._agreed, rel_tol=SAME_RATE):
            rate = self._agreed
        self._lr, self._cut = rate, False
        rising = rises(self.qsr, self.step, rate, self._lr_before)
        return Round(self.step, period(self.qsr, self.step, rate, rising), mode(self.qsr, self.step))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "round": self.round,
            "round_start": self._current.start,
            "period": self.period,
            "mode": self.mode,
            "lr_before": self._lr_before if self.at_start else self._lr,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if a state_dict() lies outside this run."""
        if not 0 <= state["round_start"] <= state["step"] <= self.qsr.total_steps:
            raise ValueError(
                f"the state is at step {state['step']} of a round that began at step {state['round_start']}, and this "
                f"run has {self.qsr.total_steps} steps"
            )
        inside = state["round_start"] < state["step"] < state["round_start"] + state["period"]
        if inside and state["step"] == self.qsr.total_steps:
            raise ValueError(
                f"the state is inside a round, at step {state['step']}, with which this run ends; write a larger "
                "total_steps, so that the workers meet once more"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), also from the middle of a round.

        On a boundary the next round begins by the rule of this run, which may differ from the one that was saved; so it
        does after the last step of a run, where this one is longer. A round under way keeps its end, or ends with this
        run.

        Raises:
            ValueError: the state lies outside this run.
        """
        self.check_state(state)
        self.step, self.round = state["step"], state["round"]
        self._lr = self._lr_before = state["lr_before"]
        self._cut = False
        end = state["round_start"] + state["period"]
        if self.step in (state["round_start"], end) and not self.finished:
            self._current = self._begin()
        else:
            length = min(state["period"], max(1, self.qsr.total_steps - state["round_start"]))
            self._current = Round(state["round_start"], length, state["mode"])


def with_a_new_round(state: dict[str, Any]) -> dict[str, Any]:
    """The state_dict() of a run that was inside a round, as where its step begins a round."""
    if state["step"] in (state["round_start"], state["round_start"] + state["period"]):
        return state
    return {**state, "round": state["round"] + 1, "round_start": state["step"]}
