"""The position in a run: step, round, H and mode. Pure: it knows no tensors and no other rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.schedule import Mode, Round, learning_rate, mode, period


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

    def check_unfinished(self) -> None:
        """Raises RuntimeError if the run has taken its total_steps."""
        if self.finished:
            raise RuntimeError(
                f"the run ended at step {self.step}, which is qsr.total_steps; a longer run needs a larger total_steps "
                "from its start, since the learning rate and the last round depend on it"
            )

    def check_boundary(self, what: str) -> None:
        """Raises RuntimeError inside a round; `what` says what is to be done on a boundary."""
        if not self.on_boundary:
            raise RuntimeError(
                f"step {self.step} is inside a round of {self.period} steps, where every worker has parameters of its "
                f"own; {what} when engine.step() has returned True"
            )

    def cut(self) -> None:
        """The current round ends after the step that was taken last."""
        self._current = dataclasses.replace(self._current, length=self.step - self._current.start)

    def begin_next(self) -> None:
        """The next round begins."""
        self.round += 1
        self._current = self._begin()

    def begin_again(self) -> None:
        """Ask for the period once more: at the first step, where the optimizer's learning rate has changed since."""
        self._current = self._begin()

    def _begin(self) -> Round:
        return Round(self.step, period(self.qsr, self.step, self.learning_rate), mode(self.qsr, self.step))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "round": self.round,
            "round_start": self._current.start,
            "period": self.period,
            "mode": self.mode,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if a state_dict() lies outside this run."""
        if not 0 <= state["round_start"] <= state["step"] <= self.qsr.total_steps:
            raise ValueError(
                f"the state is at step {state['step']} of a round that began at step {state['round_start']}, and this "
                f"run has {self.qsr.total_steps} steps"
            )
        end = state["round_start"] + state["period"]
        if state["step"] > state["round_start"] and end > self.qsr.total_steps:
            raise ValueError(
                f"the state is inside a round that ends at step {end}, and this run has {self.qsr.total_steps} steps; "
                "go on from a state that was saved on a boundary"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), also from the middle of a round.

        On a boundary the next round begins by the rule of this run, which may differ from the one that was saved; so it
        does after the last step of a run, where this one is longer.

        Raises:
            ValueError: the state lies outside this run.
        """
        self.check_state(state)
        self.step, self.round = state["step"], state["round"]
        end = state["round_start"] + state["period"]
        if self.step in (state["round_start"], end) and not self.finished:
            self._current = self._begin()
        else:
            self._current = Round(state["round_start"], state["period"], state["mode"])
