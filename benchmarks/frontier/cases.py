"""What is run, part by part: problems, and for each its rules and budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.frontier.problems import Problem
from benchmarks.frontier.rules import RULES, period_for


@dataclass(frozen=True)
class Case:
    """A rule at a budget; share 1 is parallel's.

    Args:
        times: the peak rate as a multiple of parallel's best; None tunes it for the case itself.
    """

    problem: Problem
    rule: str
    share: float
    times: float | None = None

    @property
    def period(self) -> int:
        return 1 if self.rule == "parallel" else period_for(self.rule, self.share, self.problem)

    @property
    def title(self) -> str:
        """Cases with the same title are compared."""
        return self.problem.name if self.times is None else f"{self.problem.name}, {self.times:g} times the rate"


MAIN = Problem("digits", steps=16_000)
SHORT = dataclasses.replace(MAIN, steps=4_000)
# One thing of the short problem is changed at a time.
VARIED: dict[str, dict[str, Any]] = {
    "4,000 steps": {},
    "1,000 steps": {"steps": 1_000},
    "no label noise": {"noise": 0.0},
    "cross-entropy": {"loss": "cross_entropy", "rate": 0.2},
    "K = 2": {"workers": 2},
    "K = 16": {"workers": 16},
    "momentum 0.9": {"optimizer": "momentum", "rate": 0.005},
    "AdamW": {"optimizer": "adamw", "rate": 0.003},
    "AdamW, moments every 3rd and 6th round": {
        "optimizer": "adamw",
        "rate": 0.003,
        "state": (("exp_avg", 3), ("exp_avg_sq", 6)),
    },
    "three hidden layers": {"hidden": (32, 32, 32)},
    "three hidden layers, 8,000 steps": {"hidden": (32, 32, 32), "steps": 8_000, "rate": 0.2},
    "hidden 128": {"hidden": (128,)},
    "Muon": {"optimizer": "muon", "rate": 0.01},
}
SPARSE = Problem("sparse", 20_000, "sparse", samples=25, hidden=(), noise=3.0, batch=1, rate=0.003)
SENSING = Problem("sensing", 4_000, "sensing", samples=40, hidden=(), noise=3.0, batch=1, rate=0.003)
PICTURES = dataclasses.replace(MAIN, name="cifar10", data="cifar10", samples=1_000, noise=0.2, steps=4_000, rate=0.05)

POWERS = ("constant", "power 1", "QSR", "power 3")
ONE = 0.01  # share of the steps in which the parts with one budget average
PICKED = {  # beside constant H and QSR
    "Muon": ("constant, outer", "QSR, outer in units"),
    "three hidden layers": ("power 1", "power 3", "post_local"),
}


def problem(name: str) -> Problem:
    """Of VARIED."""
    return dataclasses.replace(SHORT, name=name, **VARIED[name])


def cases(of: Problem, rules: Sequence[str], shares: Sequence[float], times: float | None = None) -> list[Case]:
    """Parallel, and every rule at every share."""
    return [Case(of, "parallel", 1.0, times), *(Case(of, rule, share, times) for share in shares for rule in rules)]


def main() -> list[Case]:
    return cases(MAIN, RULES, (0.04, 0.01, 0.0025))


def varied() -> list[Case]:
    return [
        case for name in VARIED for case in cases(problem(name), ("constant", "QSR", *PICKED.get(name, ())), (ONE,))
    ]


def fixed() -> list[Case]:
    """At rates tuned for parallel: two and four times its best one, and in a deeper network that one itself."""
    rules = [rule for rule in RULES if "outer" not in rule]
    short = [case for times in (2.0, 4.0) for case in cases(problem("4,000 steps"), rules, (ONE,), times)]
    deep = cases(problem("three hidden layers"), (*POWERS, "post_local"), (ONE,), 1.0)
    return [*short, *deep, *cases(problem("hidden 128"), ("constant", "QSR"), (ONE,), 2.0)]


def pictures() -> list[Case]:
    return cases(PICTURES, POWERS, (ONE,))


def regressions() -> list[Case]:
    """Last with a single averaging, at the end."""
    found = []
    for of, rules in ((SENSING, (*POWERS, "swap")), (SPARSE, ("constant", "QSR", "swap"))):
        found += [*cases(of, rules, (0.04, 0.0025)), Case(of, "constant", 1 / of.steps)]
    return found


PARTS = {"main": main, "varied": varied, "fixed": fixed, "regressions": regressions, "pictures": pictures}
