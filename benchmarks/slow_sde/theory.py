"""Cases of the study, and what the paper's equation and an account step by step say of their speed."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from qsr_engine.config.qsr import LearningRateConfig, QSRConfig
from qsr_engine.schedule import learning_rate

POWERS = {"parallel": None, "constant H": 0, "H ~ 1/lr": 1, "QSR": 2, "power 3": 3}
PEAK = 0.04  # the learning rate at which every rule gives the same period
START = (2.0, 0.5)  # u, v
START_Q = START[0] ** 2 - START[1] ** 2


@dataclass(frozen=True)
class Case:
    """One run of all trials: `period` is H at the learning rate PEAK, `along` is rho, `slow_time` the run's length."""

    strategy: str
    workers: int
    lr: float
    trials: int
    decaying: bool = False
    slow_time: float = 0.125
    period: int = 8
    along: float = 0.0
    seed: int = 0

    @property
    def steps(self) -> int:
        mean_square = 3 / 8 if self.decaying else 1.0  # of a cosine from 1 to 0
        return round(self.slow_time / (mean_square * self.lr**2))

    def rates(self) -> list[float]:
        """The learning rate of every step."""
        config = LearningRateConfig(schedule="cosine" if self.decaying else "constant", peak=self.lr)
        return [learning_rate(config, step, self.steps) for step in range(self.steps)]

    @property
    def alpha(self) -> float | None:
        """As the paper's H = (alpha / lr)^power has it."""
        power = POWERS[self.strategy]
        return PEAK * math.pow(self.period, 1 / power) if power else None

    @property
    def qsr(self) -> QSRConfig:
        power = POWERS[self.strategy]
        rule: dict[str, Any] = {"strategy": "qsr", "alpha": self.alpha, "power": float(power or 1)}
        if power is None:
            rule = {"strategy": "parallel"}
        elif power == 0:
            rule = {"strategy": "constant", "h_base": self.period}
        lr = LearningRateConfig(schedule="cosine" if self.decaying else "constant", peak=self.lr)
        return QSRConfig(**rule, total_steps=self.steps, lr=lr)


def psi(x: float) -> float:
    """How independent the workers' noise across the manifold is, over a round; x = 2 sharpness lr H."""
    return 1 + math.expm1(-x) / x if x > 1e-4 else x / 2 - x * x / 6


def slow_sde(case: Case) -> tuple[list[float], list[float]]:
    """Slow time and q after every step, by the paper's equation; H is (alpha / lr)^power at every moment."""
    power, times, values = POWERS[case.strategy], [0.0], [START_Q]
    for lr in case.rates():
        q, speed = values[-1], 1.0
        if power is not None:
            x = 2 * math.hypot(q, 2) * lr * case.period * (PEAK / lr) ** power
            speed += (case.workers - 1) * psi(x)
        times.append(times[-1] + lr**2)
        values.append(q * math.exp(-(lr**2) * (speed - case.along**2) / case.workers))
    return times, values


def step_by_step(case: Case) -> tuple[list[float], list[float]]:
    """Slow time and q at every boundary, from the variances across the manifold: of the average, and of each worker
    about it but for a factor 1 - 1/K, which starts from 0 in every round. H is set at the start of a round."""
    power, rates = POWERS[case.strategy], case.rates()
    others, times, values = 1 - 1 / case.workers, [0.0], [START_Q]
    average = apart = slow = 0.0
    q, end = START_Q, 0
    for step, lr in enumerate(rates):
        if step == end:
            period = 1 if power is None else math.floor(case.period * (PEAK / lr) ** power + 1e-9)
            end = min(step + period, len(rates))
        sharpness = math.hypot(q, 2)
        noise = 1 / case.workers if power is None else 1.0
        q *= math.exp(-(lr**2) * (noise + sharpness * (average + others * apart) - case.along**2 / case.workers))
        kept, added = (1 - lr * sharpness) ** 2, lr**2 * sharpness
        average = kept * average + added / case.workers
        slow += lr**2
        if power is not None:
            apart = kept * apart + added
        if step + 1 == end:
            q *= 1 + others * apart / sharpness
            apart = 0.0
            times.append(slow)
            values.append(q)
    return times, values


def predict(case: Case, finite: bool) -> tuple[list[float], list[float]]:
    return step_by_step(case) if finite else slow_sde(case)


def predicted_speed(case: Case, finite: bool, since: float = 0.0) -> float:
    """The mean speed from this slow time to the end."""
    times, values = predict(case, finite)
    first = min(bisect_left(times, since * (1 - 1e-9)), len(times) - 2)
    return case.workers * math.log(values[first] / values[-1]) / (times[-1] - times[first])


def predicted_offset(case: Case, finite: bool) -> float:
    """u v - 1 of the average after a long round, to lowest order in the round's slow time, and in lr where finite."""
    power, noise = POWERS[case.strategy] or 0, case.along**2
    offset = (1 - 1 / case.workers) * noise * case.lr**2 * case.period * math.pow(PEAK / case.lr, power)
    sharpness = math.hypot(predict(case, finite)[1][-1], 2)
    return offset - (case.lr * (3 / 2 - 1 / (2 * case.workers) + noise) / sharpness if finite else 0)
