"""What is run: every rule at every budget of averagings, its peak rate tuned on trials that do not count."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.frontier.problems import Batches, Pictures, Problem, load
from benchmarks.frontier.rules import RULES, block, period_for
from benchmarks.frontier.sparse import SparseBatches
from benchmarks.frontier.workers import Outcome, train

TUNING, COUNTING = 1, 2  # blocks of trials
TRIALS = {TUNING: 8, COUNTING: 30}
FACTORS = (0.5, 1.0, 2.0)  # of the problem's own rate, to begin with
FURTHEST = (1 / 64, 16.0)


@dataclass(frozen=True)
class Case:
    """A rule at a budget; share 1 is parallel's."""

    problem: Problem
    rule: str
    share: float

    @property
    def period(self) -> int:
        return 1 if self.rule == "parallel" else period_for(self.rule, self.share, self.problem)


MAIN = Problem("digits", steps=16_000)
SHORT = dataclasses.replace(MAIN, steps=4_000)
FEW = ("constant", "power 1", "QSR", "power 3")
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
}
SPARSE = Problem("sparse", 20_000, "sparse", samples=25, hidden=(), noise=3.0, batch=1, rate=0.003)
PICTURES = dataclasses.replace(MAIN, name="cifar10", data="cifar10", samples=1_000, noise=0.2, steps=4_000, rate=0.05)


def main_cases(shares: Sequence[float]) -> list[Case]:
    """At the smallest budget without SWAP and outer optimizers, for lack of computing time."""
    fewest = [rule for rule in RULES if rule != "swap" and "outer" not in rule]
    rules = {share: RULES if share > min(shares) else fewest for share in shares}
    return [Case(MAIN, "parallel", 1.0), *(Case(MAIN, rule, share) for share in shares for rule in rules[share])]


def varied_cases(shares: Sequence[float]) -> list[Case]:
    found = []
    for name, changes in VARIED.items():
        problem = dataclasses.replace(SHORT, name=name, **changes)
        rules = [(rule, share) for share in shares for rule in ("constant", "QSR")]
        found += [Case(problem, rule, share) for rule, share in [("parallel", 1.0), *rules]]
    return found


def picture_cases(shares: Sequence[float]) -> list[Case]:
    return [Case(PICTURES, "parallel", 1.0), *(Case(PICTURES, rule, share) for share in shares for rule in FEW)]


def sparse_cases(shares: Sequence[float]) -> list[Case]:
    return [Case(SPARSE, "parallel", 1.0), *(Case(SPARSE, rule, share) for share in shares for rule in FEW)]


class Runs:
    """Trains what is asked for once, and keeps every outcome as a line of JSON; a later process goes on from there.

    Args:
        file: of the lines.
        folder: of pictures, --data.
    """

    def __init__(self, file: Path, folder: Path | None) -> None:
        self._file, self._folder = file, folder
        self._known: dict[str, dict[str, Any]] = {}
        for line in file.read_text().splitlines() if file.exists() else []:
            found = json.loads(line)
            self._known[found["key"]] = found

    @property
    def seconds(self) -> float:
        """Of one core, in all."""
        return float(sum(found["seconds"] for found in self._known.values()))

    def outcome(self, case: Case, factor: float, which: int) -> Outcome:
        """Args: factor: of the problem's rate; which: TUNING or COUNTING."""
        rate = case.problem.rate * factor
        qsr = block(case.rule, case.period, case.share, case.problem, rate)
        told = {"problem": dataclasses.asdict(case.problem) | {"name": ""}, "qsr": qsr.model_dump(), "trials": which}
        key = hashlib.sha256(json.dumps([told, TRIALS[which]], sort_keys=True).encode()).hexdigest()[:16]
        if key not in self._known:
            outcome = train(self._batches(case.problem, TRIALS[which], which), qsr)
            line = {"key": key, "case": f"{case.problem.name}, {case.rule}, {case.share:g}, {rate:g}, block {which}"}
            self._known[key] = {**line, **dataclasses.asdict(outcome)}
            with self._file.open("a") as stream:
                stream.write(json.dumps(self._known[key]) + "\n")
            print(f"{line['case']}: {mean(outcome.errors):.2f} % ({outcome.seconds:.1f} s)", flush=True)
        kept = self._known[key]
        return Outcome(**{field.name: kept[field.name] for field in dataclasses.fields(Outcome)})

    def _batches(self, problem: Problem, trials: int, which: int) -> Batches | SparseBatches:
        if problem.data == "sparse":
            return SparseBatches(problem, trials, which)
        return Batches(problem, pictures_of(problem, self._folder), trials, which)

    def tune(self, case: Case) -> dict[float, float]:
        """Mean error at each factor of the rate that was tried: the best lies between two others, or at the end."""
        tried = {factor: mean(self.outcome(case, factor, TUNING).errors) for factor in FACTORS}
        while (factor := beyond(tried)) is not None:
            tried[factor] = mean(self.outcome(case, factor, TUNING).errors)
        return dict(sorted(tried.items()))

    def result(self, case: Case) -> dict[str, Any]:
        """A row of the raw figures."""
        tuned = self.tune(case)
        factor = best(tuned)
        outcome = self.outcome(case, factor, COUNTING)
        return {
            "problem": case.problem.name,
            "rule": case.rule,
            "budget": case.share,
            "period_at_peak": case.period,
            "rate": case.problem.rate * factor,
            "edge": not min(tuned) < factor < max(tuned),
            "tuning": {f"{case.problem.rate * one:g}": round(error, 3) for one, error in tuned.items()},
            "averagings_percent": round(100 * outcome.averagings / case.problem.steps, 3),
            "longest_round": outcome.longest,
            "errors": outcome.errors,
            "seconds": outcome.seconds,
        }


@cache
def pictures_of(problem: Problem, folder: Path | None) -> Pictures:
    return load(problem, folder)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def best(tried: dict[float, float]) -> float:
    """The factor with the smallest error; the smallest of several."""
    return min(sorted(tried), key=lambda factor: tried[factor])


def beyond(tried: dict[float, float]) -> float | None:
    """The next factor to try; None where the best lies between two others, or is as far as is tried at all."""
    found = best(tried)
    following = found * 2 if found == max(tried) else found / 2 if found == min(tried) else None
    return following if following is not None and FURTHEST[0] <= following <= FURTHEST[1] else None


def run_all(runs: Runs, cases: Sequence[Case], seconds: float) -> list[dict[str, Any]] | None:
    """The rows of all cases; None where the seconds of this process's core did not suffice: run it again."""
    rows = []
    for case in cases:
        if os.times().user > seconds:
            return None
        rows.append(runs.result(case))
    return rows
