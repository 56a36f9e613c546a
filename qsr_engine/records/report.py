"""`qsr report RUN...`: compares runs in tables, plots, and one page, report.html, that holds all of it.

The same figures are in report.json. Nothing here imports torch.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsr_engine.records.page import Cell, page
from qsr_engine.records.plots import plots
from qsr_engine.records.runs import ReportError, Run, figures, find_runs, read_run
from qsr_engine.records.seeds import Group, groups
from qsr_engine.records.summary import summary


def group_table(found: Sequence[Group]) -> str:
    """Mean and standard deviation over the runs of each group, a line each."""
    return _aligned(_group_rows(found))


def _group_rows(found: Sequence[Group]) -> list[list[str]]:
    reached = [column for column in _REACHED if any(_is_of(run, column[1]) for group in found for run in group.runs)]
    headers = [header for header, *_ in reached]
    rows = [["group", "strategy", "runs", *headers, "averagings %", "bytes %", "sharpness"]]
    for group in found:
        row = [_with_deviation(group, figure, text) for _, figure, text in reached]
        for figure in ("averagings_percent", "bytes_percent"):
            mean = group.mean(figure)
            row.append("\N{EN DASH}" if mean is None else _three_digits(mean))
        row += [_with_deviation(group, "sharpness", _three_digits)]
        rows.append([group.name, group.strategy, str(len(group.runs)), *row])
    return rows


def _with_deviation(group: Group, figure: str, text: Callable[[float], str]) -> str:
    mean, deviation = group.mean(figure), group.deviation(figure)
    if mean is None or deviation is None:
        return "\N{EN DASH}"
    return f"{text(mean)} \N{PLUS-MINUS SIGN} {text(deviation)}"


def _three_digits(value: float) -> str:
    """Three significant digits, never in exponents."""
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:.{max(0, 2 - exponent)}f}"


_Column = tuple[str, str, Callable[[Any], str]]  # header, figure, how it is written
_REACHED: tuple[_Column, ...] = (  # of a group
    ("accuracy %", "accuracy_percent", "{:.2f}".format),
    ("loss", "loss", "{:.4f}".format),
    ("bits a byte", "bits_per_byte", "{:.4f}".format),
)
_COLUMNS: tuple[_Column, ...] = (
    ("run", "run", str),
    ("strategy", "strategy", str),
    ("steps", "steps", str),
    ("accuracy %", "accuracy_percent", "{:.2f}".format),
    ("top-5 %", "top5_percent", "{:.2f}".format),
    ("best %", "best_percent", "{:.2f}".format),
    ("loss", "loss", "{:.4f}".format),
    ("perplexity", "perplexity", _three_digits),
    ("bits a byte", "bits_per_byte", "{:.4f}".format),
    ("best loss", "best_loss", "{:.4f}".format),
    ("at step", "best_step", str),
    ("training %", "train_percent", "{:.2f}".format),
    ("averagings", "averagings", str),
    ("averagings %", "averagings_percent", _three_digits),
    ("bytes %", "bytes_percent", _three_digits),
    ("time", "hours", _three_digits),
    ("compute", "hours_compute", _three_digits),
    ("averaging", "hours_averaging", _three_digits),
    ("data", "hours_data", _three_digits),
    ("waiting %", "waiting_percent", "{:.1f}".format),
    ("images/s", "images_per_second", _three_digits),
    ("tokens/s", "tokens_per_second", _three_digits),
    ("sharpness", "sharpness", _three_digits),
)
_TIMES = ("hours", "hours_compute", "hours_averaging", "hours_data")
_BEST: dict[str, Callable[..., float]] = {  # of these figures one is the best of the finished runs
    **dict.fromkeys(("accuracy_percent", "top5_percent", "best_percent"), max),
    **dict.fromkeys(("images_per_second", "tokens_per_second"), max),
    **dict.fromkeys(("loss", "perplexity", "bits_per_byte", "best_loss"), min),
    **dict.fromkeys(("averagings", "averagings_percent", "bytes_percent", "waiting_percent", "sharpness"), min),
    **dict.fromkeys(_TIMES, min),
}


# The columns of one task, where a run is of it.
_OF_TASK = {
    "images": ("accuracy_percent", "images_per_second"),
    "text": ("loss", "perplexity", "bits_per_byte", "best_loss", "tokens_per_second"),
}
# A column only where a run has it.
_OPTIONAL = ("sharpness", "waiting_percent", "top5_percent", "best_percent", "best_step", "train_percent")


def _is_of(run: Run, figure: str) -> bool:
    """Whether a figure is one of the run's task, or of every task."""
    return all(run.task == task or figure not in names for task, names in _OF_TASK.items())


def table(runs: Sequence[Run]) -> str:
    """The figures of the runs, a line each, and below them what is to be said about single runs."""
    notes = "".join(f"\n{run.name}: {note}" for run in runs for note in run.notes)
    return _aligned(_rows(runs)) + (notes and "\n" + notes)


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    """The header, then a row a run."""
    return [[text for text, _ in row] for row in _cells(runs)]


def _cells(runs: Sequence[Run]) -> list[list[Cell]]:
    """The header, then a row a run; the best are those of several finished runs."""
    rows = [figures(run) for run in runs]
    unit, in_an_hour = _unit(max((row["hours"] or 0.0 for row in rows), default=0.0))
    for row in rows:
        row["steps"] = f"{row['step']}/{row['total_steps']}"
    columns = [
        column
        for column in _COLUMNS
        if any(_is_of(run, column[1]) for run in runs)
        and (column[1] not in _OPTIONAL or any(row[column[1]] is not None for row in rows))
    ]
    best = {}
    for name, choose in _BEST.items():
        values = [row[name] for row in rows if row["finished"] and row[name] is not None]
        if len(set(values)) > 1:
            best[name] = choose(values)

    def cell(row: dict[str, Any], name: str, text: Callable[[Any], str]) -> Cell:
        value = row[name]
        if value is None:
            return _unmarked("\N{EN DASH}")
        return text(value * in_an_hour if name in _TIMES else value), row["finished"] and value == best.get(name)

    headers = [_unmarked(f"{header} {unit}" if name in _TIMES else header) for header, name, _ in columns]
    return [headers, *([cell(row, name, text) for _, name, text in columns] for row in rows)]


def _unmarked(text: str) -> Cell:
    return text, False


def _workers(runs: Sequence[Run]) -> list[list[Cell]]:
    """What the workers of each run told: the least, the mean and the most of them."""
    rows = [["run", "workers", "waiting %", "training %", "skipped samples"]]
    for run in runs:
        if run.workers:
            row = figures(run)
            spread = [_spread(row[f"{name}_percent_of_workers"]) for name in ("waiting", "train")]
            rows.append([run.name, str(run.worker_counts[-1]), *spread, str(sum(run.workers[-1]["skipped_samples"]))])
    return [list(map(_unmarked, row)) for row in rows]


def _spread(values: Sequence[float] | None) -> str:
    if not values:
        return "\N{EN DASH}"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _unit(hours: float) -> tuple[str, float]:
    """Of all times of a table, by the longest of them; and how many of it an hour has."""
    if hours < 1 / 30:
        return "s", 3600.0
    return ("min", 60.0) if hours < 2 else ("h", 1.0)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: names on the left, numbers on the right, a rule under the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [[f"{row[0]:{widths[0]}}", f"{row[1]:{widths[1]}}", *map(str.rjust, row[2:], widths[2:])] for row in ruled]
    return "\n".join(map("  ".join, lines))


def report(paths: Sequence[str | Path], out_dir: str | Path | None = None) -> str:
    """Compare runs: writes the plots and report.json into out_dir, and returns the table and where they are.

    The paths are run folders, or folders of them; out_dir None is `report` beside the first run.

    A run that cannot be read is left out, and named with the reason.

    Raises:
        ReportError: no run, the same run twice, none that can be read, or out_dir cannot be written.
    """
    runs, left_out = _readable(find_runs(paths))
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.path)) for run in runs]
    folder = Path(out_dir or runs[0].path.resolve().parent / "report")
    try:
        drawn = plots(runs, folder)
        files = [*drawn, folder / "report.json", folder / "report.html"]
        files[-2].write_text(json.dumps([figures(run) for run in runs], indent=2) + "\n", encoding="utf-8")
        seeds = [list(map(_unmarked, row)) for row in _group_rows(groups(runs))]
        tables = {"Runs": _cells(runs), "Several seeds": seeds, "Workers": _workers(runs)}
        said = [*(f"{run.name}: {note}" for run in runs for note in run.notes), *left_out]
        files[-1].write_text(page(summary(runs), tables, said, drawn), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{folder}: cannot write the report: {error.strerror or error}; choose another") from error
    found = groups(runs)
    several = ["", group_table(found)] if found else []
    parts = [table(runs), *several, "", *textwrap.wrap(summary(runs), 100), *(["", *left_out] if left_out else [])]
    return "\n".join([*parts, "", *map(str, files)])


def _readable(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and what is said of the others. Raises ReportError where there are none."""
    runs: list[Run] = []
    wrong: list[str] = []
    for path in paths:
        try:
            runs.append(read_run(path))
        except ReportError as error:
            wrong.append(str(error))
    if not runs:
        raise ReportError("\n".join(wrong))
    return runs, [f"left out: {error}" for error in wrong]
