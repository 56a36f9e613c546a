"""Runs of one recipe that differ in nothing but their seed: a group, whose mean and standard deviation are shown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qsr_engine.records.runs import Run, figures


@dataclass(frozen=True)
class Group:
    """Finished runs of one recipe with several seeds. Standard deviations are those of a sample, None of one run."""

    name: str
    strategy: str
    runs: list[Run]

    def mean(self, figure: str) -> float | None:
        """The mean over the runs of one of their figures(); None where a run does not have it."""
        values = self._values(figure)
        return statistics.mean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """The standard deviation likewise."""
        values = self._values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, figure: str) -> list[float]:
        values = [figures(run)[figure] for run in self.runs]
        return [] if None in values else values


def groups(runs: Sequence[Run]) -> list[Group]:
    """Groups of two or more finished runs that have as many workers, and whose recipes differ in their seed and in
    where they are written only. A run that began with a checkpoint of another one is in no group."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.finished and not run.branched:
            recipe = {k: v for k, v in run.recipe.items() if k not in ("seed", "logging", "stop_at_step")}
            recipe["workers"] = run.worker_counts
            found.setdefault(json.dumps(recipe, sort_keys=True, default=str), []).append(run)
    many = [same for same in found.values() if len(same) > 1]
    return [Group(_common(run.name for run in same), same[0].strategy, same) for same in many]


def _common(names: Iterable[str]) -> str:
    """What names of one group have in common at their beginning."""
    first, *others = names
    length = next((n for n in range(len(first), 0, -1) if all(o.startswith(first[:n]) for o in others)), 0)
    return first[:length].rstrip("-_. ").removesuffix("seed").rstrip("-_. ") or first
