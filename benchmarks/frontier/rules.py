"""The rules that are compared, each with the constant that makes it average in a given share of the steps."""

from __future__ import annotations

from functools import cache
from typing import Any

from benchmarks.frontier.problems import Problem
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.schedule import rounds

DILOCO = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
POWERS = {"power 1": 1.0, "QSR": 2.0, "power 3": 3.0, "QSR, outer": 2.0, "QSR, outer in units": 2.0}
RULES = (
    "constant",
    "power 1",
    "QSR",
    "power 3",
    "post_local",
    "swap",
    "constant, outer",
    "QSR, outer",
    "QSR, outer in units",
)
SWITCH = 0.75  # of swap, in parts of the run


def block(rule: str, period: int, share: float, problem: Problem, rate: float) -> QSRConfig:
    """The configuration of a run.

    Args:
        rule: "parallel" or one of RULES. Those with a power have H = max(period, floor(period (peak / lr)^power)).
        period: H at the peak rate.
        share: of the steps in which post_local averages; half of these in its first phase.
        rate: the peak.
    """
    made: dict[str, Any] = {"strategy": "constant", "h_base": period}
    if rule == "parallel":
        made = {"strategy": "parallel"}
    elif rule in POWERS:
        power = POWERS[rule]
        made = {"strategy": "qsr", "h_base": period, "alpha": rate * period ** (1 / power), "power": power}
    elif rule == "post_local":
        made = {"strategy": "post_local", "h_base": period, "switch_step": round(share / 2 * problem.steps)}
    elif rule == "swap":
        made = {"strategy": "swap", "h_base": period, "switch_step": round(SWITCH * problem.steps)}
    if "outer" in rule:
        made["outer"] = {**DILOCO, **({"unit_steps": period} if "units" in rule else {})}
    if problem.state and rule != "parallel":
        made["averaging"] = {"state": dict(problem.state)}
    return QSRConfig(**made, total_steps=problem.steps, lr={"schedule": "cosine", "peak": rate})  # type: ignore[arg-type]


@cache
def period_for(rule: str, share: float, problem: Problem) -> int:
    """The smallest H at the peak with which the rule averages in no more than this share of the steps.

    It does not depend on the peak rate, since alpha follows that.
    """
    few, many = 1, problem.steps
    while few < many:
        middle = (few + many) // 2
        count = sum(1 for _ in rounds(block(rule, middle, share, problem, 1.0)))
        few, many = (few, middle) if count <= share * problem.steps else (middle + 1, many)
    return few
