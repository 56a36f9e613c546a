"""`qsr report RUN...`: reads finished and unfinished runs back and compares them.

Tables, the same figures in report.json, plots, and one page, report.html, that holds all of it. Runs of one recipe that
differ in nothing but their seed are a group: its mean and standard deviation are shown. Nothing here imports torch, nor
pyplot with its global state.
"""

from __future__ import annotations

import base64
import html
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qsr_engine.monitor import METRICS, RECIPE, SUMMARY, WORKERS, Record, WorkersRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ReportError(RuntimeError):
    """Runs that cannot be read or compared; the message names the folder or the file and line."""


@dataclass(frozen=True)
class Run:
    """One run, as its folder tells it."""

    name: str
    path: Path
    strategy: str  # a label such as `qsr H>=4 alpha=0.0175`
    recipe: dict[str, Any]
    records: list[dict[str, Any]]  # at least one; the fields of monitor.Record
    workers: list[dict[str, Any]]  # the fields of monitor.WorkersRecord; none in a run of an earlier version
    finished: bool
    total_steps: int
    notes: list[str] = field(default_factory=list)  # what a reader of its figures must know


def read_run(path: str | Path) -> Run:
    """Read one run's folder.

    A last line that is torn, as a killed run leaves it, is left out and said in the notes.

    Raises:
        ReportError: it is no run, has no record yet, or a file of it is broken.
    """
    path = Path(path)
    recipe = _read_recipe(path / RECIPE)
    records, notes = _read_records(path / METRICS)
    workers, earlier = _read_workers(path / WORKERS)
    notes += earlier
    total_steps, finished = recipe["qsr"]["total_steps"], (path / SUMMARY).is_file()
    if not finished:
        notes.insert(0, f"unfinished at step {records[-1]['step']}/{total_steps}")
    name, label = path.resolve().name, strategy_label(recipe["qsr"])
    notes += _slow_worker(workers)
    return Run(name, path, label, recipe, records, workers, finished, total_steps, notes)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = f"{path.name}: {error.strerror or error}"
        raise ReportError(f"{path.parent}: not the folder of a run ({reason}); write one of `qsr train`") from error


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise ReportError(f"{path}: not a YAML file that can be read: {error}") from error
    match recipe:
        case {"qsr": {"strategy": str(), "total_steps": int()}}:
            return dict(recipe)
    raise ReportError(f"{path}: not a resolved recipe; found no qsr.strategy and qsr.total_steps in it")


def _read_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    records: list[dict[str, Any]] = []
    lines = _read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if _is_record(row):
            records.append(row)
        elif number < len(lines):
            raise ReportError(f"{path}, line {number}: not a record of metrics; repair or delete this line: {line:.60}")
    if not records:
        raise ReportError(f"{path}: no record of metrics yet; wait for the run's first one, or leave this run out")
    return records, [] if len(records) == len(lines) else ["the last line of metrics.jsonl is torn and left out"]


def _is_record(row: object) -> bool:
    """Counts are whole numbers; every other field may be null, where it was unknown or not finite."""
    return isinstance(row, dict) and all(
        isinstance(row.get(item.name, ""), int if item.type == "int" else int | float | None) for item in fields(Record)
    )


def _read_workers(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The workers' records and what to note of them; what cannot be read is left out, since no other figure needs it.

    Of a run that went on with another number of workers, the last records with the same number.
    """
    found = []
    for line in _read_text(path).splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if _is_workers_record(row):
            found.append(row)
    same = list(takewhile(lambda row: len(row["seconds"]) == len(found[-1]["seconds"]), reversed(found)))[::-1]
    if len(same) == len(found):
        return same, []
    workers, before = len(same[0]["seconds"]), found[len(found) - len(same) - 1]
    return same, [
        f"of {workers} workers from step {before['step']} on, and {len(before['seconds'])} before; waiting is told of "
        "the later part"
    ]


def _is_workers_record(row: object) -> bool:
    """A loss may be null, where it was not finite, and waiting as a whole, where there were no local steps."""
    if not isinstance(row, dict) or not {item.name for item in fields(WorkersRecord)} <= set(row):
        return False
    lists = [row[name] for name in ("seconds", "seconds_data", "skipped_samples")]
    lists += [] if row["seconds_waiting"] is None else [row["seconds_waiting"]]
    right = isinstance(row["step"], int) and all(isinstance(values, list) and values for values in lists)
    if not right or len({len(values) for values in lists}) > 1:
        return False
    return all(isinstance(value, int | float) for values in lists for value in values) and min(row["seconds"]) > 0


def waiting_percent(workers: Sequence[dict[str, Any]]) -> list[float] | None:
    """Of the time of the run, that each worker waited at boundaries for the last to come; None: not known."""
    known = [row for row in workers if row["seconds_waiting"] is not None]
    if not known:
        return None
    totals = [[sum(each) for each in zip(*(row[name] for row in known), strict=True)] for name in _WAITING]
    return [100 * waited / seconds for waited, seconds in zip(*totals, strict=True)]


def _slow_worker(workers: Sequence[dict[str, Any]]) -> list[str]:
    """A note where one worker is slow throughout: the others wait for it in most records, and notably."""
    known = [row["seconds_waiting"] for row in workers if row["seconds_waiting"] is not None]
    percent = waiting_percent(workers)
    if not percent or len(percent) < 2 or len(known) < _ENOUGH:
        return []
    (slowest, times), *_ = Counter(waited.index(min(waited)) for waited in known).most_common(1)
    others = statistics.mean(value for worker, value in enumerate(percent) if worker != slowest)
    if times < _MOSTLY * len(known) or others - percent[slowest] < _NOTABLE:
        return []
    return [
        f"worker {slowest} is slow throughout: the others waited {others:.0f} % of the time for it, and it was the "
        f"last to come in {times} of {len(known)} records"
    ]


_WAITING = ("seconds_waiting", "seconds")
_ENOUGH = 5  # records, to say that a worker is slow
_MOSTLY = 0.8  # of the records
_NOTABLE = 5.0  # per cent of the time


def strategy_label(qsr: dict[str, Any]) -> str:
    """What tells this run's strategy from others, from the resolved `qsr` block of its recipe."""
    strategy, h_base, alpha, power = qsr["strategy"], qsr.get("h_base", 1), qsr.get("alpha") or 0, qsr.get("power", 2)
    if strategy == "parallel":
        return "parallel"
    if strategy != "qsr":
        return f"{strategy} H={h_base}" + (f" @{qsr['switch_step']}" if "switch_step" in qsr else "")
    return f"qsr H>={h_base} alpha={alpha:g}" if power == 2 else f"power {power:g}, H>={h_base}, alpha {alpha:g}"


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The runs' folders: each path itself, or, where it is no run, the runs directly inside it, sorted.

    Raises:
        ReportError: no path, a path without any run, or the same run twice.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [] if (path / RECIPE).exists() else sorted(file.parent for file in path.glob(f"*/{METRICS}"))
        found += inside or [path]
    if not found:
        raise ReportError("no run is given; write one or more folders of `qsr train`")
    run, count = Counter(path.resolve() for path in found).most_common(1)[0]
    if count > 1:
        raise ReportError(f"{run}: this run is given {count} times; write it once")
    return found


def figures(run: Run) -> dict[str, Any]:
    """The figures of one run, as the table and report.json have them. None: not known.

    Hours leave evaluation out; images per second are the mean over those hours.
    """
    last = run.records[-1]
    parts = {name: last[f"seconds_{name}"] for name in ("compute", "averaging", "data")}
    seconds = sum(part for part in parts.values() if part is not None)
    return {
        "run": run.name,
        "path": str(run.path),
        "strategy": run.strategy,
        "step": last["step"],
        "total_steps": run.total_steps,
        "finished": run.finished,
        "accuracy_percent": next((y for _, y in reversed(_accuracies(run))), None),
        "averagings": last["averagings"],
        "communication_percent": last["communication_percent"],
        "hours": seconds / 3600,
        **{f"hours_{name}": None if part is None else part / 3600 for name, part in parts.items()},
        "images_per_second": last["images_seen"] / seconds if seconds else None,
        "waiting_percent": None if (waited := waiting_percent(run.workers)) is None else statistics.mean(waited),
        "waiting_percent_of_workers": waited,
        "sharpness": next((y for _, y in reversed(_series(run, "sharpness"))), None),
        "notes": run.notes,
    }


def _accuracies(run: Run) -> list[tuple[int, float]]:
    """(step, accuracy in %) of every evaluation."""
    return _series(run, "eval_accuracy")


def _series(run: Run, name: str) -> list[tuple[int, float]]:
    """(step, value) of a field, where it is known; a run of an earlier version may not have it."""
    return [(row["step"], row[name]) for row in run.records if row.get(name) is not None]


# ------------------------------------------------------------------------------------------- runs of several seeds


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
    """Groups of two or more finished runs whose recipes differ in their seed and in where they are written only."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.finished:
            recipe = {key: value for key, value in run.recipe.items() if key not in ("seed", "logging")}
            found.setdefault(json.dumps(recipe, sort_keys=True, default=str), []).append(run)
    many = [same for same in found.values() if len(same) > 1]
    return [Group(_common(run.name for run in same), same[0].strategy, same) for same in many]


def _common(names: Iterable[str]) -> str:
    """What names of one group have in common at their beginning."""
    first, *others = names
    length = next((n for n in range(len(first), 0, -1) if all(o.startswith(first[:n]) for o in others)), 0)
    return first[:length].rstrip("-_. ").removesuffix("seed").rstrip("-_. ") or first


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


# Okabe and Ito's colours, which colour-blind readers tell apart too; the dashes change with every turn through them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")


def plots(runs: Sequence[Run], out_dir: Path) -> list[Path]:
    """Draw the runs into out_dir and return the files; those over accuracy only where a run was evaluated."""
    drawings = [_period_and_lr]
    if any(_accuracies(run) for run in runs):
        drawings += [_accuracy_over_communication, _accuracy_over_steps]
    if any(waiting_percent(run.workers) for run in runs):
        drawings.append(_waiting_over_steps)
    if any(_series(run, "sharpness") for run in runs):
        drawings.append(_sharpness_over_steps)
    out_dir.mkdir(parents=True, exist_ok=True)
    files = [out_dir / f"{draw.__name__[1:]}.png" for draw in drawings]
    for draw, file in zip(drawings, files, strict=True):
        draw(runs).savefig(file, dpi=150)
    return files


def _panels(runs: Sequence[Run], ylabels: Sequence[str], xlabel: str = "optimizer step") -> tuple[Figure, list[Any]]:
    """Panels above one another on one x axis, in a figure tall enough to name every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 2.6 * len(ylabels) + 0.2 * len(runs)), layout="constrained")
    axes = list(figure.subplots(len(ylabels), 1, sharex=True, squeeze=False)[:, 0])
    for panel, ylabel in zip(axes, ylabels, strict=True):
        panel.set_ylabel(ylabel)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(xlabel)
    return figure, axes


def _curve(index: int, runs: Sequence[Run]) -> dict[str, Any]:
    """Curves often lie on one another: earlier ones are wider, and show beneath the later ones."""
    width, dashes = 1.2 + 2.4 * (1 - (index + 1) / len(runs)), _DASHES[index // len(_COLOURS) % len(_DASHES)]
    return {"label": _label(runs[index]), "c": _COLOURS[index % len(_COLOURS)], "ls": dashes, "lw": width}


def _label(run: Run) -> str:
    facts = [run.strategy] * (run.strategy != run.name) + ["unfinished"] * (not run.finished)
    return f"{run.name} ({', '.join(facts)})" if facts else run.name


def _period_and_lr(runs: Sequence[Run]) -> Figure:
    """The paper's Figure 5, over steps."""
    figure, (period, rate) = _panels(runs, ["period H (steps)", "learning rate"])
    for index, run in enumerate(runs):
        steps, curve = [row["step"] for row in run.records], _curve(index, runs)
        period.plot(steps, [row["period"] for row in run.records], drawstyle="steps-pre", **curve)
        rate.plot(steps, [math.nan if row["lr"] is None else row["lr"] for row in run.records], **curve)
    period.set_yscale("log", base=2)
    period.yaxis.set_major_formatter("{x:g}")
    rate.set_ylim(bottom=0)
    figure.legend(handles=rate.lines, loc="outside lower center", frameon=False)
    return figure


def _accuracy_over_steps(runs: Sequence[Run]) -> Figure:
    figure, (panel,) = _panels(runs, ["accuracy (%)"])
    for index, run in enumerate(runs):
        if points := _accuracies(run):
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, **_curve(index, runs))
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def _sharpness_over_steps(runs: Sequence[Run]) -> Figure:
    figure, (panel,) = _panels(runs, ["sharpness (largest eigenvalue)"])
    for index, run in enumerate(runs):
        if points := _series(run, "sharpness"):
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, **_curve(index, runs))
    panel.set_yscale("log")
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def _waiting_over_steps(runs: Sequence[Run]) -> Figure:
    """How long workers wait at boundaries for the last to come: their mean, and from the least to the most."""
    figure, (panel,) = _panels(runs, ["waiting at boundaries (% of the time)"])
    for index, run in enumerate(runs):
        rows = [row for row in run.workers if row["seconds_waiting"] is not None]
        if not rows:
            continue
        steps = [row["step"] for row in rows]
        shares = [waiting_percent([row]) or [] for row in rows]
        curve = _curve(index, runs)
        panel.plot(steps, [statistics.mean(share) for share in shares], **curve)
        panel.fill_between(steps, list(map(min, shares)), list(map(max, shares)), color=curve["c"], alpha=0.15)
    panel.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def _accuracy_over_communication(runs: Sequence[Run]) -> Figure:
    """A marker a run, hollow where it is unfinished, or a group, with its standard deviation as an error bar.

    The labels stand in a column, where none covers another.
    """
    found = groups(runs)
    grouped = {run.name for group in found for run in group.runs}
    shown: list[tuple[Any, Any, Any, str, bool]] = [
        (
            group.mean("communication_percent"),
            group.mean("accuracy_percent"),
            group.deviation("accuracy_percent"),
            f"{group.name} ({group.strategy}, {len(group.runs)} runs)",
            True,
        )
        for group in found
    ]
    for run in runs:
        if run.name not in grouped:
            row = figures(run)
            shown.append((row["communication_percent"], row["accuracy_percent"], None, _label(run), run.finished))
    points, (figure, (panel,)) = [], _panels(runs, ["accuracy (%)"], "communication (% of parallel)")
    for index, (x, y, deviation, label, finished) in enumerate(shown):
        if x is not None and y is not None:
            colour = _COLOURS[index % len(_COLOURS)]
            style = {"color": colour, "markerfacecolor": colour if finished else "white", "capsize": 4}
            panel.errorbar(x, y, yerr=deviation, fmt="o", markersize=8, **style)
            points.append((y, x, label))
    if points and max(xs := [x for _, x, _ in points]) > 10 * min(xs) > 0:
        panel.set_xscale("log")
        panel.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        panel.xaxis.set_major_formatter("{x:g}")
    bottom, top = panel.get_ylim()
    gap = min(0.075, 1 / max(1, len(points)))  # between two labels, as a fraction of the panel's height
    place, leader = -gap, {"arrowstyle": "-", "color": "0.75", "shrinkB": 5, "relpos": (0, 0.5)}
    for index, (y, x, label) in enumerate(sorted(points), start=1):
        place = min(max((y - bottom) / (top - bottom), place + gap), 1 - gap * (len(points) - index))
        panel.annotate(label, (x, y), (1.04, place), textcoords="axes fraction", va="center", arrowprops=leader)
    return figure


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
