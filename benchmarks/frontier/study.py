"""What is run: every rule at every budget of averagings, its peak rate tuned on trials that do not count."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.frontier.cases import Case
from benchmarks.frontier.problems import Batches, Pictures, Problem, load
from benchmarks.frontier.regression import Regression
from benchmarks.frontier.rules import block
from benchmarks.frontier.sensing import sensing_batches
from benchmarks.frontier.sparse import sparse_batches
from benchmarks.frontier.workers import Outcome, train
from qsr_engine.config.qsr import QSRConfig

TUNING, COUNTING = 1, 2  # blocks of trials
TRIALS = {TUNING: 8, COUNTING: 30}
REGRESSIONS = {"sparse": sparse_batches, "sensing": sensing_batches}
FACTORS = (0.5, 1.0, 2.0)  # of the problem's own rate, to begin with
FURTHEST = (1 / 64, 16.0)
# Errors of the regressions have two valleys: at a rate so small that nothing drifts, and just below divergence.
OF_REGRESSIONS = (*FACTORS, 4.0, 8.0, 16.0)


class NotRunError(Exception):
    """An outcome is asked for that is not kept, and nothing is to be trained."""


class Runs:
    """Trains what is asked for once, and keeps every outcome as a line of JSON; a later process goes on from there.

    Args:
        file: of the lines.
        folder: of pictures, --data.
        trains: False raises NotRunError for what is not kept.
    """

    def __init__(self, file: Path, folder: Path | None, trains: bool = True) -> None:
        self._file, self._folder, self._trains = file, folder, trains
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
        trials = trials_of(case.problem, which)
        key = key_of(case.problem, qsr, which, trials)
        if key not in self._known:
            if not self._trains:
                raise NotRunError(f"{case.title}, {case.rule}, {case.share:g}, {rate:g}")
            outcome = train(self._batches(case.problem, trials, which), qsr)
            line = {"key": key, "case": f"{case.problem.name}, {case.rule}, {case.share:g}, {rate:g}, block {which}"}
            self._known[key] = {**line, **dataclasses.asdict(outcome)}
            with self._file.open("a") as stream:
                stream.write(json.dumps(self._known[key]) + "\n")
            print(f"{line['case']}: {mean(outcome.errors):.2f} % ({outcome.seconds:.1f} s)", flush=True)
        kept = self._known[key]
        return Outcome(**{field.name: kept[field.name] for field in dataclasses.fields(Outcome)})

    def _batches(self, problem: Problem, trials: int, which: int) -> Batches | Regression:
        if problem.data in REGRESSIONS:
            return REGRESSIONS[problem.data](problem, trials, which)
        return Batches(problem, pictures_of(problem, self._folder), trials, which)

    def has(self, case: Case) -> bool:
        """All that a row needs, where nothing is trained."""
        try:
            self.result(case)
        except NotRunError:
            return False
        return True

    def tune(self, case: Case) -> dict[float, float]:
        """Mean error at each factor of the rate that was tried: the best lies between two others, or at the end."""
        factors = OF_REGRESSIONS if case.problem.data in ("sparse", "sensing") else FACTORS
        tried = {factor: mean(self.outcome(case, factor, TUNING).errors) for factor in factors}
        while (factor := beyond(tried)) is not None:
            tried[factor] = mean(self.outcome(case, factor, TUNING).errors)
        return dict(sorted(tried.items()))

    def result(self, case: Case) -> dict[str, Any]:
        """A row of the raw figures."""
        own = case.times is None
        tuned = self.tune(case if own else Case(case.problem, "parallel", 1.0))
        factor = best(tuned) * (case.times or 1)
        outcome = self.outcome(case, factor, COUNTING)
        return {
            "problem": case.title,
            "rule": case.rule,
            "unit": "squared error" if case.problem.data in REGRESSIONS else "points",
            "budget": case.share,
            "period_at_peak": case.period,
            "rate": case.problem.rate * factor,
            "edge": own and not min(tuned) < factor < max(tuned),
            "tuning": {f"{case.problem.rate * one:g}": round(error, 3) for one, error in tuned.items()} if own else {},
            "averagings_percent": round(100 * outcome.averagings / case.problem.steps, 3),
            "longest_round": outcome.longest,
            "errors": outcome.errors,
            "seconds": outcome.seconds,
        }


def key_of(problem: Problem, qsr: QSRConfig, which: int, trials: int) -> str:
    """Of what determines an outcome; keys of the configuration that are at their defaults do not, nor does a name."""
    told = {"problem": dataclasses.asdict(problem) | {"name": ""}, "qsr": qsr.model_dump(exclude_defaults=True)}
    return hashlib.sha256(json.dumps([told, which, trials], sort_keys=True).encode()).hexdigest()[:16]


def trials_of(problem: Problem, which: int) -> int:
    """Of a regression as many tune as count: at a rate that is near too large, one of many diverges."""
    return TRIALS[COUNTING if problem.data in REGRESSIONS else which]


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
