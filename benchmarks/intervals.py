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


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of a normal population, by Student's t; of two values at least."""
    from scipy.special import stdtrit

    many = len(values)
    return Interval(
        statistics.mean(values), float(stdtrit(many - 1, 0.975)) * statistics.stdev(values) / math.sqrt(many)
    )
