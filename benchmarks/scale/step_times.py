"""How long steps take, and rounds of them: drawn step by step, or as the slowest of many workers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.scale.closed_form import StepTime

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

TAIL_INDEX = 3  # of the Pareto tail
CELLS = 1 << 19
SMALLEST_TAIL = 1e-12
# Logits of F between which the quantile is interpolated: from tails of 1e-13 to 1 - 1e-13.
KNOTS: Floats = np.linspace(-30.0, 30.0, 12_001)


@dataclass(frozen=True)
class Steps:
    """How long steps take.

    Args:
        mean: seconds of a step, over all steps and workers.
        cv: standard deviation over mean of one worker's steps.
        tail: distribution of one worker's steps.
        slow_share, slow_by: so many of all workers take 1 + slow_by times as long as the others, always.
    """

    mean: float
    cv: float = 0.0
    tail: Literal["lognormal", "pareto"] = "lognormal"
    slow_share: float = 0.0
    slow_by: float = 0.0

    def slow_workers(self, workers: int) -> int:
        return round(self.slow_share * workers)

    def seconds(self, workers: int) -> tuple[float, float]:
        """Mean step of the fast workers and of the slow ones."""
        fast = self.mean / (1 + self.slow_by * self.slow_workers(workers) / workers)
        return fast, fast * (1 + self.slow_by)

    def closed_form(self, workers: int) -> StepTime:
        """The same mean and variances, as closed_form.py knows them."""
        share = self.slow_workers(workers) / workers
        worker_cv = self.slow_by * math.sqrt(share * (1 - share)) / (1 + self.slow_by * share)
        return StepTime(self.mean, self.cv, worker_cv)

    @property
    def scale(self) -> float:
        """Of the Lomax tail, whose variance is scale^2 index / ((index - 1)^2 (index - 2))."""
        return self.cv * (TAIL_INDEX - 1) * math.sqrt((TAIL_INDEX - 2) / TAIL_INDEX)

    @property
    def sigma(self) -> float:
        """Of the lognormal's logarithm."""
        return math.sqrt(math.log1p(self.cv**2))

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        """Steps of mean 1."""
        if self.cv == 0:
            return np.ones(shape)
        if self.tail == "pareto":
            return 1 + self.scale * (random.pareto(TAIL_INDEX, shape) - 1 / (TAIL_INDEX - 1))
        return random.lognormal(-(self.sigma**2) / 2, self.sigma, shape)

    def longer(self, x: Floats) -> Floats:
        """P(a step of mean 1 is longer than x)."""
        if self.tail == "pareto":
            above = np.maximum(0.0, (x - 1) / self.scale + 1 / (TAIL_INDEX - 1))
            return np.asarray((1 + above) ** -float(TAIL_INDEX))
        logs = np.log(np.maximum(x, 1e-300))
        return np.asarray(_normal_tail((logs + self.sigma**2 / 2) / self.sigma))

    def longest(self) -> float:
        """The step of mean 1 that is exceeded with probability SMALLEST_TAIL."""
        if self.tail == "pareto":
            return 1 + self.scale * math.pow(SMALLEST_TAIL, -1 / TAIL_INDEX)
        return math.exp(7.1 * self.sigma)


def _normal_tail(z: Floats) -> Floats:
    from scipy.special import ndtr

    return np.asarray(ndtr(-z), dtype=np.float64)


class Sums:
    """Quantiles of the sum of any number of independent steps of mean 1.

    Args:
        steps: their cv must be above 0.
        most: the largest number of steps in a sum.
    """

    def __init__(self, steps: Steps, most: int) -> None:
        self._spread = 10 * steps.cv
        self._cell = (steps.longest() + 2 * self._spread * math.sqrt(most)) / CELLS
        edges = (np.arange(CELLS + 1, dtype=np.float64) - 0.5) * self._cell
        beyond = steps.longer(edges)
        cells = beyond[:-1] - beyond[1:]
        cells /= cells.sum()
        # What rounding to cells does to the mean; a sum of H is off by H times as much.
        self._shift = 1 - float(cells @ np.arange(CELLS)) * self._cell
        self._transform = np.fft.rfft(cells)
        self._known: dict[int, tuple[Floats, Floats]] = {}

    def table(self, count: int) -> tuple[Floats, Floats]:
        """At each of KNOTS: the quantile of a sum of count steps, and the mean of the sums below it."""
        if count not in self._known:
            self._known[count] = self._compute(count)
        return self._known[count]

    def _compute(self, count: int) -> tuple[Floats, Floats]:
        density = np.maximum(0.0, np.fft.irfft(self._transform**count, CELLS))
        # The transform is periodic, so the sums from `first` on stand at their remainder by CELLS.
        first = max(0, int((count - self._spread * math.sqrt(count) - 1) / self._cell))
        density = np.roll(density, -(first % CELLS))
        middles = (first + np.arange(CELLS)) * self._cell + count * self._shift
        below = np.cumsum(density)
        above = np.cumsum(density[::-1])[::-1] - density
        mean_below = np.cumsum(density * middles)
        kept = (below > 1e-13) & (above > 1e-13)
        logits = np.maximum.accumulate(np.log(below[kept]) - np.log(above[kept]))
        quantiles = np.interp(KNOTS, logits, middles[kept] + self._cell / 2)
        return quantiles, np.interp(KNOTS, logits, mean_below[kept] / below[kept])


@dataclass
class Drawn:
    """Seconds from a round's start until its last worker has come, (rounds,), and those that each column's worker
    computed, (rounds, columns). Columns are the workers, or one for the mean worker."""

    slowest: Floats
    compute: Floats


class Sampler:
    """Draws rounds.

    Args:
        sums: of these steps; None where cv is 0 or all workers are drawn one by one.
        one_by_one: whether every step of every worker is drawn.
    """

    def __init__(self, steps: Steps, workers: int, sums: Sums | None, one_by_one: bool) -> None:
        self.steps, self.workers, self.one_by_one = steps, workers, one_by_one
        self.columns = workers if one_by_one else 1
        self._sums = sums

    def draw(self, lengths: Counts, random: np.random.Generator) -> Drawn:
        drawn = Drawn(np.empty(len(lengths)), np.empty((len(lengths), self.columns)))
        for length in np.unique(lengths):
            places = np.flatnonzero(lengths == length)
            part = (self._each if self.one_by_one else self._largest)(int(length), len(places), random)
            drawn.slowest[places], drawn.compute[places] = part.slowest, part.compute
        return drawn

    def _each(self, length: int, count: int, random: np.random.Generator) -> Drawn:
        fast, slow = self.steps.seconds(self.workers)
        means = np.full(self.workers, fast)
        means[self.workers - self.steps.slow_workers(self.workers) :] = slow
        compute = self.steps.draw(random, (count, length, self.workers)).sum(axis=1) * means
        return Drawn(compute.max(axis=1), compute)

    def _largest(self, length: int, count: int, random: np.random.Generator) -> Drawn:
        """The slowest of the fast workers and of the slow ones; what the others computed is its expectation."""
        slow_workers = self.steps.slow_workers(self.workers)
        numbers = (self.workers - slow_workers, slow_workers)
        kinds = [(n, mean) for n, mean in zip(numbers, self.steps.seconds(self.workers), strict=True) if n]
        if self._sums is None:
            slowest = np.full(count, length * max(mean for _, mean in kinds))
            return Drawn(slowest, np.full((count, 1), length * self.steps.mean))
        quantiles, means_below = self._sums.table(length)
        largest = [mean * np.interp(_logit_of_largest(n, count, random), KNOTS, quantiles) for n, mean in kinds]
        slowest = np.maximum.reduce(largest)
        total = slowest.copy()
        for (n, mean), own in zip(kinds, largest, strict=True):
            others = n - (own == slowest)
            total += others * mean * np.interp(slowest / mean, quantiles, means_below)
        return Drawn(slowest, total[:, None] / self.workers)


def _logit_of_largest(n: int, count: int, random: np.random.Generator) -> Floats:
    """log(F / (1 - F)) at the largest of n draws: F^n is uniform there."""
    log_f = np.log(1 - random.random(count)) / n
    return np.asarray(np.minimum(log_f - np.log(-np.expm1(log_f) + 1e-300), KNOTS[-1]))
