"""What a run costs in time, and the three figures that say it: Appendix F of the paper, as pure functions.

    local steps   hours = steps x compute of a step + averagings x an averaging
    parallel      hours = steps x (compute of a step + what its gradients cost beyond what is hidden)

It is a model. Every worker's steps take the same time, an averaging hides behind nothing (averaging.overlap hides a
part of it), and data, evaluation, checkpoints and failures cost nothing. `python -m benchmarks.scale` simulates slow
workers, failures and hosts of several workers.

Source: Gu et al. (arXiv 2310.14423), Appendix F, for the sum and for the fit from two runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qsr_engine.schedule import Round

HIDDEN_BY_BACKWARD = 2 / 3  # of a step: a backward pass computes twice what a forward does
BUCKET_BYTES = 25e6  # of gradients that travel together, as in PyTorch's DistributedDataParallel


@dataclass(frozen=True)
class Counts:
    """What a run does, counted.

    Args:
        gradients: times that gradients are averaged: every step of `parallel`, and those of `post_local` before its
            switch, which are taken to cost as much time.
        averagings: of parameters.
        last: steps of the last round of local steps.
    """

    strategy: str
    steps: int
    gradients: int
    averagings: int
    last: int = 0

    @property
    def all_averagings(self) -> int:
        return self.gradients + self.averagings


def count(strategy: str, rounds: Iterable[Round]) -> Counts:
    steps = gradients = averagings = last = 0
    for round_ in rounds:
        steps += round_.length
        gradients += round_.mode == "parallel"
        averagings += round_.mode == "local"
        last = round_.length if round_.mode == "local" else last
    return Counts(strategy, steps, gradients, averagings, last)


@dataclass(frozen=True)
class Cost:
    """Seconds of a run."""

    compute: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.communication


@dataclass(frozen=True)
class Costs:
    """The three figures, in seconds.

    Args:
        step_seconds: compute of an optimizer step, with data and all else that comes with every step.
        averaging_seconds: of the parameters, with all else that comes with every boundary.
        gradient_seconds: that a step of `parallel` takes longer than step_seconds.
    """

    step_seconds: float
    averaging_seconds: float
    gradient_seconds: float

    def of(self, counts: Counts) -> Cost:
        """Cost of a run of so many steps and averagings."""
        waited = counts.gradients * self.gradient_seconds + counts.averagings * self.averaging_seconds
        return Cost(counts.steps * self.step_seconds, waited)


def beyond_hidden(seconds: float, hidden_seconds: float, last_bucket: float) -> float:
    """What of the gradients' seconds is not hidden.

    Args:
        seconds: of all gradients of a step.
        hidden_seconds: of the backward pass, beside which they travel; 0 where they travel after it.
        last_bucket: share of them that is ready only when the backward pass ends.
    """
    return max(seconds * last_bucket, seconds - hidden_seconds) if hidden_seconds else seconds


@dataclass(frozen=True)
class Observed:
    """What a finished run tells a fit: optimizer steps, averagings, and seconds of training in all."""

    steps: int
    averagings: int
    seconds: float


def fit_two_runs(first: Observed, second: Observed) -> Costs:
    """Solve seconds = steps x (compute of a step) + averagings x (cost of an averaging) for two runs.

    Gradients of `parallel` are taken for as long as an averaging, as the paper does.

    Raises:
        ValueError: the runs average equally often for their steps, or their times make a cost negative.
    """
    determinant = first.steps * second.averagings - second.steps * first.averagings
    if determinant == 0:
        raise ValueError(
            f"{first.averagings} averagings in {first.steps} steps and {second.averagings} in {second.steps} are one "
            "period, so that nothing tells compute from averaging; give runs of different periods"
        )
    averaging = (first.steps * second.seconds - second.steps * first.seconds) / determinant
    step = (first.seconds * second.averagings - second.seconds * first.averagings) / determinant
    if averaging < 0 or not 0 < step < math.inf:
        raise ValueError(
            f"{first.averagings} averagings in {first.steps} steps took {first.seconds:g} s, and {second.averagings} "
            f"in {second.steps} took {second.seconds:g} s: that makes {averaging:g} s an averaging and {step:g} s a "
            "step; give runs in which more averagings took more time"
        )
    return Costs(step, averaging, averaging)
