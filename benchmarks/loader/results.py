"""What was measured, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.loader.processes import Job
from benchmarks.loader.ways import AUGMENTED, BASELINE, EIGHT, FFCV_JPEG, FLOOR, OURS, WRITTEN, Way

SHORT_SIDES = {"originals": None, "short256": 256}
LIMIT = 0.5  # mean difference up to which a way gives the same pictures


@dataclass
class Results:
    rates: dict[tuple[str, int, str], dict[int, float]] = field(default_factory=dict)  # data, cores, way; then round
    differences: dict[tuple[str, str], Job] = field(default_factory=dict)  # data, picture
    problems: dict[str, str] = field(default_factory=dict)  # by way
    versions: dict[str, Any] = field(default_factory=dict)  # by way
    raw: list[Job] = field(default_factory=list)
    prepared: set[tuple[str, str]] = field(default_factory=set)  # data, way
    parts: list[Job] = field(default_factory=list)  # command and load of the reports whose rounds these are

    @classmethod
    def of(cls, report: Job) -> Results:
        """What a report's JSON holds, to be gone on with."""
        made = cls(problems=report["problems"], versions=report["versions"], raw=report["measurements"])
        made.prepared = {(data, way) for data, way in report["prepared"]}
        made.differences = {(found["data"], found["picture"]): found for found in report["differences"]}
        made.parts = [*report["parts"], {"command": report["command"], "load": report["hardware"]["load"]}]
        for found in made.raw:
            if "rate" in found:
                made.rates.setdefault((found["data"], found["cores"], found["way"]), {})[found["round"]] = found["rate"]
        return made

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

    def line(what: str, found: float | None, least: float, most: float | None = None) -> None:
        limit = f"at least {least:.2f}" if most is None else f"at most {most:.2f}"
        if found is None:
            lines.append([what, limit, "", "not measured"])
        else:
            good = found >= least if most is None else found <= most
            lines.append([what, limit, f"{found:.3f}", "pass" if good else "FAIL"])

    names = {way.name: way for way in ways}
    for data, share in (("originals", 0.85), ("short256", 0.70)):
        same = [
            way
            for way in names
            if way not in (OURS, FLOOR, WRITTEN, *EIGHT) and within(results.difference(data, names[way]))
        ]
        best = max(same, key=lambda way: results.median(data, 1, way) or 0, default="")
        line(f"{data}, 1 core, over the best with the same pictures, {best}", results.ratio(data, 1, OURS, best), 1.6)
        line(f"{data}, 1 core, over {FFCV_JPEG}", results.ratio(data, 1, OURS, FFCV_JPEG), 1.4)
        line(f"{data}, 1 core, of the floor", results.ratio(data, 1, OURS, FLOOR), share)
        for way in (way for way in names if "RandAugment" in way and way != AUGMENTED):
            line(f"{data}, 1 core, with RandAugment, over {way}", results.ratio(data, 1, AUGMENTED, way), 2.0)
        line(f"{data}, 1 core, {WRITTEN}, over our own", results.ratio(data, 1, WRITTEN, OURS), 0.95)
        for way in EIGHT:
            line(f"{data}, 2 cores, {way} over two processes", results.ratio(data, 2, way, OURS), 1.0)
        if OURS in names:
            line(f"{data}, mean difference from Pillow", results.difference(data, names[OURS]), 0, most=0.05)
    return f"### Targets\n\n{report.table(('target', 'limit', 'found', ''), lines)}"


def within(found: float | None) -> bool:
    return found is not None and found <= LIMIT
