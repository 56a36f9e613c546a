"""What a comparison of runs says, in one paragraph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qsr_engine.config.units import counted, seconds_text
from qsr_engine.records.runs import Run, figures
from qsr_engine.records.seeds import Group, groups


class _Measure(NamedTuple):
    """What the runs of a task are compared by."""

    figure: str
    what: str  # before a value
    unit: str  # behind it, and
    of_difference: str  # behind a difference
    digits: int
    sign: int  # 1 where more is better


_MEASURES = {
    "images": _Measure("accuracy_percent", "", " %", " points", 2, 1),
    "text": _Measure("loss", "a loss of ", "", "", 4, -1),
}


@dataclass(frozen=True)
class _Entry:
    """A finished run, or a group of them by their means."""

    name: str
    strategy: str
    runs: int
    reached: float  # by the measure of the task
    deviation: float | None
    averagings: float | None  # % of the steps
    hours: float | None


def summary(runs: Sequence[Run]) -> str:
    """How many runs there are, and, task by task, how they compare with data parallel, or with the best of them."""
    unfinished = sum(not run.finished for run in runs)
    many = f"{counted(len(runs), 'run')}, {'all finished' if not unfinished else f'{unfinished} of them unfinished'}."
    parts = []
    for task, measure in _MEASURES.items():
        of_task = _entries([run for run in runs if run.task == task], measure)
        entries = sorted(of_task, key=lambda entry: measure.sign * entry.reached, reverse=True)
        if not entries:
            continue
        base = next((entry for entry in entries if entry.strategy == "parallel"), entries[0])
        parts.append(f"{base.name} reached {_reached(base, measure)}{_cost(base)}.")
        parts += [_compared(entry, base, measure) for entry in entries if entry is not base]
        if len(entries) > 1 and all(entry.deviation is None for entry in entries):
            parts.append("Each is one run: how much of a difference is chance, more seeds would tell.")
    return " ".join([many, *(parts or ["No finished run was evaluated."])])


def _entries(runs: Sequence[Run], measure: _Measure) -> list[_Entry]:
    found = groups(runs)
    grouped = {run.name for group in found for run in group.runs}
    entries = [_of_group(group, measure) for group in found]
    for run in runs:
        if run.finished and run.name not in grouped:
            row = figures(run)
            shown = (row[measure.figure], None, row["averagings_percent"], row["hours"])
            entries.append(_Entry(run.name, run.strategy, 1, *shown))
    return [entry for entry in entries if entry.reached is not None]


def _of_group(group: Group, measure: _Measure) -> _Entry:
    reached, deviation = group.mean(measure.figure), group.deviation(measure.figure)
    shown = (deviation, group.mean("averagings_percent"), group.mean("hours"))
    return _Entry(group.name, group.strategy, len(group.runs), reached, *shown)  # type: ignore[arg-type]


def _reached(entry: _Entry, measure: _Measure) -> str:
    digits = measure.digits
    value = f"{measure.what}{entry.reached:.{digits}f}"
    if entry.deviation is None:
        return f"{value}{measure.unit}"
    return f"{value} \N{PLUS-MINUS SIGN} {entry.deviation:.{digits}f}{measure.unit} ({entry.runs} runs)"


def _cost(entry: _Entry) -> str:
    told = [] if entry.averagings is None else [f"averaging at {entry.averagings:.3g} % of the steps"]
    told += [] if entry.hours is None else [f"in {seconds_text(3600 * entry.hours)}"]
    return "".join(f", {part}" for part in told)


def _compared(entry: _Entry, base: _Entry, measure: _Measure) -> str:
    difference, digits = entry.reached - base.reached, measure.digits
    points = f"{abs(difference):.{digits}f}{measure.of_difference} {'more' if difference > 0 else 'less'}"
    points = points if abs(difference) >= 0.5 * 10**-digits else "as much"
    said = f"{entry.name} reached {_reached(entry, measure)}, {points}{_cost(entry)}"
    if entry.hours and base.hours:
        saved = 100 * (1 - entry.hours / base.hours)
        said += f" ({abs(saved):.0f} % {'less' if saved > 0 else 'more'})"
    return f"{said}."
