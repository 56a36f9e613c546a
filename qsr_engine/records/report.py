"""`qsr report RUN...`: compares runs in tables, plots, and one page, report.html, that holds all of it.

The same figures are in report.json. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsr_engine.records.plots import plots
from qsr_engine.records.runs import ReportError, Run, figures, find_runs, read_run
from qsr_engine.records.seeds import Group, groups


def group_table(found: Sequence[Group]) -> str:
    """Mean and standard deviation over the runs of each group, a line each."""
    return _aligned(_group_rows(found))


def _group_rows(found: Sequence[Group]) -> list[list[str]]:
    rows = [["group", "strategy", "runs", "accuracy %", "communication %", "sharpness"]]
    for group in found:
        row = [_with_deviation(group, "accuracy_percent", "{:.2f}".format)]
        row += [_three_digits(group.mean("communication_percent") or 0.0)]
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


_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (  # header, figure, how it is written
    ("run", "run", str),
    ("strategy", "strategy", str),
    ("steps", "steps", str),
    ("accuracy %", "accuracy_percent", "{:.2f}".format),
    ("averagings", "averagings", str),
    ("communication %", "communication_percent", _three_digits),
    ("hours", "hours", _three_digits),
    ("compute h", "hours_compute", _three_digits),
    ("averaging h", "hours_averaging", _three_digits),
    ("data h", "hours_data", _three_digits),
    ("waiting %", "waiting_percent", "{:.1f}".format),
    ("images/s", "images_per_second", _three_digits),
    ("sharpness", "sharpness", _three_digits),
)


_OPTIONAL = ("sharpness", "waiting_percent")  # a column only where a run has it


def table(runs: Sequence[Run]) -> str:
    """The figures of the runs, a line each, and below them what is to be said about single runs."""
    notes = "".join(f"\n{run.name}: {note}" for run in runs for note in run.notes)
    return _aligned(_rows(runs)) + (notes and "\n" + notes)


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    """The header, then a row a run."""
    rows = []
    for run in runs:
        row = figures(run)
        row["steps"] = f"{row['step']}/{row['total_steps']}"
        rows.append(row)
    columns = [
        column for column in _COLUMNS if column[1] not in _OPTIONAL or any(row[column[1]] is not None for row in rows)
    ]
    written = [["\N{EN DASH}" if row[key] is None else text(row[key]) for _, key, text in columns] for row in rows]
    return [[header for header, _, _ in columns], *written]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: names on the left, numbers on the right, a rule under the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = [[f"{row[0]:{widths[0]}}", f"{row[1]:{widths[1]}}", *map(str.rjust, row[2:], widths[2:])] for row in ruled]
    return "\n".join(map("  ".join, lines))


def report(paths: Sequence[str | Path], out_dir: str | Path | None = None) -> str:
    """Compare runs: writes the plots and report.json into out_dir, and returns the table and where they are.

    The paths are run folders, or folders of them; out_dir None is `report` beside the first run.

    Raises:
        ReportError: no run, the same run twice, one that cannot be read, or out_dir cannot be written.
    """
    runs = [read_run(path) for path in find_runs(paths)]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.path)) for run in runs]
    folder = Path(out_dir or runs[0].path.resolve().parent / "report")
    try:
        drawn = plots(runs, folder)
        files = [*drawn, folder / "report.json", folder / "report.html"]
        files[-2].write_text(json.dumps([figures(run) for run in runs], indent=2) + "\n", encoding="utf-8")
        files[-1].write_text(page(runs, drawn), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{folder}: cannot write the report: {error.strerror or error}; choose another") from error
    found = groups(runs)
    return "\n".join([table(runs), *(["", group_table(found)] if found else []), "", *map(str, files)])


def page(runs: Sequence[Run], drawn: Sequence[Path]) -> str:
    """One page with the tables, the notes and the plots; it needs no other file."""
    parts = [_html_table(_rows(runs))]
    if found := groups(runs):
        parts.append("<h2>Several seeds</h2>" + _html_table(_group_rows(found)))
    notes = [f"<li>{html.escape(f'{run.name}: {note}')}</li>" for run in runs for note in run.notes]
    parts += [f"<ul>{''.join(notes)}</ul>"] if notes else []
    for file in drawn:
        title, data = file.stem.replace("_", " "), base64.b64encode(file.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        )
    return _PAGE.format("\n".join(parts))


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><thead><tr>{head}</tr></thead>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>qsr report</title><style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td {{ padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #ddd; }}
td:nth-child(-n+2) {{ text-align: left; }} thead {{ font-weight: bold; }} img {{ max-width: 100%; }}
</style></head><body><h1>Comparison of runs</h1>
{}
</body></html>
"""
