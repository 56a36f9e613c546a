"""Means of a few trials, with their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and half of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} \N{PLUS-MINUS SIGN} {self.half:.2f}"


def interval(values: Sequence[float], among: int = 1) -> Interval:
    """Of the mean of a normal population, by Student's t; of two values at least.

    Args:
        among: so many intervals that all of them together hold their means in 95 of 100 cases (Bonferroni).
    """
    from scipy.special import stdtrit

    many = len(values)
    quantile = float(stdtrit(many - 1, 1 - 0.025 / among))
    return Interval(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(many))
