"""What a comparison of runs says, in one paragraph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qsr_engine.config.units import counted, seconds_text
from qsr_engine.records.runs import Run, figures
from qsr_engine.records.seeds import Group, groups


@dataclass(frozen=True)
class _Entry:
    """A finished run, or a group of them by their means."""

    name: str
    strategy: str
    runs: int
    accuracy: float  # %
    deviation: float | None
    averagings: float | None  # % of the steps
    hours: float | None


def summary(runs: Sequence[Run]) -> str:
    """How many runs there are, and how the others compare with data parallel, or with the most accurate one."""
    unfinished = sum(not run.finished for run in runs)
    many = f"{counted(len(runs), 'run')}, {'all finished' if not unfinished else f'{unfinished} of them unfinished'}."
    entries = sorted(_entries(runs), key=lambda entry: entry.accuracy, reverse=True)
    if not entries:
        return f"{many} No finished run was evaluated."
    base = next((entry for entry in entries if entry.strategy == "parallel"), entries[0])
    parts = [many, f"{base.name} reached {_accuracy(base)}{_cost(base)}."]
    parts += [_compared(entry, base) for entry in entries if entry is not base]
    if len(entries) > 1 and all(entry.deviation is None for entry in entries):
        parts.append("Each is one run: how much of a difference is chance, more seeds would tell.")
    return " ".join(parts)


def _entries(runs: Sequence[Run]) -> list[_Entry]:
    found = groups(runs)
    grouped = {run.name for group in found for run in group.runs}
    entries = [_of_group(group) for group in found]
    for run in runs:
        if run.finished and run.name not in grouped:
            row = figures(run)
            shown = (row["accuracy_percent"], None, row["averagings_percent"], row["hours"])
            entries.append(_Entry(run.name, run.strategy, 1, *shown))
    return [entry for entry in entries if entry.accuracy is not None]


def _of_group(group: Group) -> _Entry:
    accuracy, deviation = group.mean("accuracy_percent"), group.deviation("accuracy_percent")
    shown = (deviation, group.mean("averagings_percent"), group.mean("hours"))
    return _Entry(group.name, group.strategy, len(group.runs), accuracy, *shown)  # type: ignore[arg-type]


def _accuracy(entry: _Entry) -> str:
    if entry.deviation is None:
        return f"{entry.accuracy:.2f} %"
    return f"{entry.accuracy:.2f} \N{PLUS-MINUS SIGN} {entry.deviation:.2f} % ({entry.runs} runs)"


def _cost(entry: _Entry) -> str:
    told = [] if entry.averagings is None else [f"averaging at {entry.averagings:.3g} % of the steps"]
    told += [] if entry.hours is None else [f"in {seconds_text(3600 * entry.hours)}"]
    return "".join(f", {part}" for part in told)


def _compared(entry: _Entry, base: _Entry) -> str:
    difference = entry.accuracy - base.accuracy
    points = f"{abs(difference):.2f} points {'more' if difference > 0 else 'less'}"
    said = f"{entry.name} reached {_accuracy(entry)}, {points if abs(difference) >= 0.005 else 'as much'}{_cost(entry)}"
    if entry.hours and base.hours:
        saved = 100 * (1 - entry.hours / base.hours)
        said += f" ({abs(saved):.0f} % {'less' if saved > 0 else 'more'})"
    return f"{said}."
