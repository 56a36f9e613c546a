"""Which workers have moved so much farther than workers do that an average should not follow them.

With m_k the L2 norm of worker k's movement since the last averaging, m the median of all workers' (the lower one of
two), and mu and sigma^2 an exponential mean and variance of all m_k / m so far, worker k is an outlier where

    m_k / m > mu + z sigma

Source: EDiT (Cheng et al., arXiv 2412.07210), and its authors' code in ATorch: an exponential mean and variance of the
norm itself for every worker and parameter, in which the newest counts 0.02, z of 3, nobody judged in the first 100
averagings, and outliers not learnt from. Two things differ here. The norm is taken over the median, because EDiT's
period is constant and QSR's is not: where H doubles, all workers move farther, and beside norms of earlier rounds all
would be outliers. And all workers share one mean and variance, which are learnt in fewer rounds, and hold for any
number of them.

Every rank computes it from the same numbers, with operations that are rounded alike on all hosts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from qsr_engine.config.qsr import OutlierConfig

NEWEST = 0.02  # what the last averaging counts; in the first 50, all of them count the same


class Outliers:
    """The mean and variance over the averagings so far, and who lies outside."""

    def __init__(self, config: OutlierConfig) -> None:
        self._config = config
        self.mean = self.variance = 0.0  # of m_k / m
        self.averagings = 0  # that these are of
        self.largest: float | None = None  # z of the worker that moved farthest before the last averaging, if judged

    def judge(self, squares: Sequence[float], without: Collection[int]) -> dict[int, float]:
        """Judge an averaging, and learn from those who are no outliers.

        At least half of the workers are none. Where the median is 0, nobody is judged.

        Args:
            squares: m_k^2 of every worker, all of them perhaps times one number.
            without: workers that are left out already.
        Returns:
            Of every outlier, by its number: (mu + z sigma) / (m_k / m), the share of its movement that is none.
        """
        norms = np.sqrt(np.asarray(squares, dtype=np.float64))
        there = np.ones(len(norms), dtype=np.bool_)
        there[list(without)] = False
        self.largest = None
        among = np.sort(norms[there])
        if not len(among) or among[(len(among) - 1) // 2] == 0:
            return {}
        relative = norms / among[(len(among) - 1) // 2]
        limit = math.inf
        if self.averagings >= self._config.after_averagings and self.variance > 0:
            deviation = math.sqrt(self.variance)
            self.largest = (float(relative[there].max()) - self.mean) / deviation
            limit = max(1.0, self.mean + self._config.z * deviation)
        far = there & (relative > limit)
        self._learn(relative[there & ~far])
        return {int(worker): limit / float(relative[worker]) for worker in np.flatnonzero(far)}

    def _learn(self, relative: npt.NDArray[np.float64]) -> None:
        """math.fsum rounds once, so that no order of summation is left to a host."""
        self.averagings += 1
        weight = max(NEWEST, 1 / self.averagings)
        self.mean += weight * (math.fsum(relative) / len(relative) - self.mean)
        self.variance += weight * (math.fsum((relative - self.mean) ** 2) / len(relative) - self.variance)

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "variance": self.variance, "averagings": self.averagings}

    def load_state_dict(self, state: dict[str, float] | None) -> None:
        """None, of a run that judged nobody: learn anew."""
        state = state or Outliers(self._config).state_dict()
        self.mean, self.variance, self.averagings = state["mean"], state["variance"], int(state["averagings"])
