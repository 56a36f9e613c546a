"""Compute of a step and cost of an averaging from two finished runs: `qsr plan RECIPE --fit RUN RUN`.

Source: Gu et al. (arXiv 2310.14423), Appendix F. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsr_engine.config.digest import differences
from qsr_engine.config.may_differ import that_matter
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import seconds_text
from qsr_engine.planning.cost import Costs, Observed, fit_two_runs
from qsr_engine.records.run_folder import RECIPE, SUMMARY
from qsr_engine.records.runs import ReportError, Run, read_run

_OF_THE_MACHINES = ("ranks", "worker_size", "engine", "device", "torch")


def fit_runs(paths: Sequence[str | Path], recipe: Recipe | None) -> tuple[Costs, int, list[str]]:
    """Fit compute and averaging from two finished runs, for a third recipe.

    Returns:
        The figures, the runs' number of workers, and what that assumes, a line each.
    Raises:
        ConfigError, ReportError: a run cannot be read or is unfinished, they differ in something that matters, or the
            times of these two fit no costs.
    """
    recipes = [_recipe_of(Path(path)).model_dump(mode="json") for path in paths]
    runs = [_finished(Path(path)) for path in paths]
    (first, one), (second, other) = runs
    _check_same(f"{first.path} and {second.path}", *recipes)
    machines = [{key: summary.get(key) for key in _OF_THE_MACHINES} for _, summary in runs]
    _check_same(f"{first.path} and {second.path}", *machines)
    if recipe is not None:
        _check_same(f"the recipe and {first.path}", recipe.model_dump(mode="json"), recipes[0])
    observed = [
        Observed(summary["steps"], summary["averagings"], summary["seconds_training"]) for summary in (one, other)
    ]
    try:
        fit = fit_two_runs(*observed)
    except ValueError as error:
        raise ConfigError(f"--fit {first.path} {second.path}: {error}") from error
    return fit, one["ranks"] // one["worker_size"], [*map(_line, runs), _assumed(runs)]


def _line(run: tuple[Run, dict[str, Any]]) -> str:
    summary = run[1]
    return (
        f"{run[0].path.name}: {run[0].strategy}, {summary['steps']} steps and {summary['averagings']} averagings in "
        f"{seconds_text(summary['seconds_training'])}; waiting for the slowest worker is in its averagings"
    )


def _assumed(runs: Sequence[tuple[Run, dict[str, Any]]]) -> str:
    if any(run.recipe["qsr"]["strategy"] in ("parallel", "post_local") for run, _ in runs):
        return (
            "one run averaged gradients: what of that was hidden behind the backward pass is not in the fit, and an "
            "averaging of parameters is taken for as long as what was not hidden; two runs of local steps fit better"
        )
    return "both runs took local steps; the gradients of a step of parallel are taken for as long as an averaging"


def _recipe_of(path: Path) -> Recipe:
    """A run's recipe, with the defaults of keys that did not exist when it was written."""
    if not (path / RECIPE).is_file():
        read_run(path)  # which says what it is instead
    return load_recipe(path / RECIPE)


def _finished(path: Path) -> tuple[Run, dict[str, Any]]:
    run = read_run(path)
    if not run.finished:
        raise ConfigError(
            f"--fit {path}: the run is unfinished ({SUMMARY} is missing); finish it with qsr train --resume"
        )
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path / SUMMARY}: cannot be read: {error}") from error
    for key in ("steps", "averagings", "seconds_training", "ranks", "worker_size"):
        value = summary.get(key) if isinstance(summary, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ReportError(f"{path / SUMMARY}: {key} is {value!r}; needed is a number above 0, as qsr train writes")
    _check_workers(run)
    return run, summary


def _check_workers(run: Run) -> None:
    """Refuse a run that was resumed with another number of workers: its seconds are of two kinds."""
    if len(run.worker_counts) > 1:
        raise ConfigError(
            f"--fit {run.path}: it ran on {' and on '.join(map(str, run.worker_counts))} workers, so that its seconds "
            "fit no one cost of an averaging; give runs that kept their workers from beginning to end"
        )


def _check_same(names: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    found = that_matter(differences(one, other), "fit")
    lines = [f"  {key}: {here!r} and {there!r}" for key, here, there in found]
    if lines:
        raise ConfigError(
            f"--fit: {names} differ in what a step or an averaging costs:\n" + "\n".join(lines) + "\n"
            "Give runs that differ in their strategy and periods only"
        )
