"""What was measured, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.loader.processes import Job
from benchmarks.loader.ways import BASELINE, FFCV_JPEG, FLOOR, OURS, Way

SHORT_SIDES = {"originals": None, "short256": 256}
LIMIT = 0.5  # mean difference up to which a way gives the same pictures


@dataclass
class Results:
    rates: dict[tuple[str, int, str], dict[int, float]] = field(default_factory=dict)  # data, cores, way; then round
    differences: dict[tuple[str, str], Job] = field(default_factory=dict)  # data, picture
    problems: dict[str, str] = field(default_factory=dict)  # by way
    versions: dict[str, Any] = field(default_factory=dict)  # by way
    raw: list[Job] = field(default_factory=list)

    def ratio(self, data: str, cores: int, way: str, to: str) -> float | None:
        of, base = self.rates.get((data, cores, way), {}), self.rates.get((data, cores, to), {})
        ratios = [of[number] / base[number] for number in of if number in base]
        return statistics.median(ratios) if ratios else None

    def median(self, data: str, cores: int, way: str) -> float | None:
        rates = self.rates.get((data, cores, way))
        return statistics.median(rates.values()) if rates else None

    def difference(self, data: str, way: Way) -> float | None:
        found = self.differences.get((data, way.picture), {}).get("mean")
        return None if found is None else float(found)


def table(name: str, all_cores: Sequence[int], ways: Sequence[Way], results: Results) -> str:
    columns = ["way"]
    for cores in all_cores:
        columns += [f"{cores} core{'s' if cores > 1 else ''}: images/s", "x Pillow", "of the floor"]
    rows = []
    for way in ways:
        found = results.difference(name, way)
        difference = "" if way.name == FLOOR else "not measurable" if found is None else f"{found:.3f}"
        rates = [cell for cores in all_cores for cell in rate_cells(results, name, cores, way.name)]
        rows.append([way.name, *rates, difference])
    shown = report.table([*columns, "mean difference of 255"], rows)
    return "\n\n".join([f"### {name}", shown, *(f"{way}: {said}" for way, said in results.problems.items())])


def rate_cells(results: Results, name: str, cores: int, way: str) -> list[str]:
    rates = sorted(results.rates.get((name, cores, way), {}).values())
    if not rates:
        return [results.problems.get(way, "not measured").split(":")[0], "", ""]
    low, high = (float(np.quantile(rates, q)) for q in (0.25, 0.75))
    to_pillow, to_floor = (results.ratio(name, cores, way, to) for to in (BASELINE, FLOOR))
    return [
        f"{statistics.median(rates):,.0f} [{low:,.0f}, {high:,.0f}]",
        f"{to_pillow:.2f}" if to_pillow else "",
        f"{to_floor:.0%}" if to_floor else "",
    ]


def targets(ways: Sequence[Way], results: Results) -> str:
    """What the loader is to reach. A peer counts where its pictures are the same."""
    lines: list[list[str]] = []

    def line(what: str, found: float | None, least: float, show: Callable[[float], str]) -> None:
        verdict = "not measured" if found is None else "pass" if found >= least else "FAIL"
        lines.append([what, show(least), "" if found is None else show(found), verdict])

    def times(value: float) -> str:
        return f"{value:.2f} x"

    line(f"originals, 1 core, beside {BASELINE}", results.ratio("originals", 1, OURS, BASELINE), 2.2, times)
    same = [w for w in ways if w.name not in (OURS, FLOOR) and within(results.difference("originals", w))]
    for way in (way for way in same if way.name != BASELINE):
        line(f"originals, 1 core, beside {way.name}", results.ratio("originals", 1, OURS, way.name), 1.5, times)
    best = max(same, key=lambda way: results.median("originals", 2, way.name) or 0, default=None)
    rate = results.median("originals", 2, OURS)
    ratio = results.ratio("originals", 2, OURS, best.name) if best else None
    line("originals, 2 cores, images/s (this or the next line)", rate, 1100, lambda value: f"{value:,.0f}")
    line(f"originals, 2 cores, beside the best, {best.name if best else ''}", ratio, 1.6, times)
    line(f"short256, 1 core, beside {FFCV_JPEG}", results.ratio("short256", 1, OURS, FFCV_JPEG), 1.4, times)
    for name in SHORT_SIDES:
        line(f"{name}, 1 core, of the floor", results.ratio(name, 1, OURS, FLOOR), 0.75, lambda value: f"{value:.0%}")
    return f"### Targets\n\n{report.table(('target', 'at least', 'found', ''), lines)}"


def within(found: float | None) -> bool:
    return found is not None and found <= LIMIT
