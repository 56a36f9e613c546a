"""Runs that `qsr train` wrote, read back from their folders, and their figures; no torch."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from qsr_engine.records.members import MemberEvent, read_events
from qsr_engine.records.records import Record, WorkersRecord
from qsr_engine.records.run_folder import EVENTS, METRICS, ORIGIN, RECIPE, SUMMARY, WORKERS, stopped_at


class ReportError(RuntimeError):
    """Runs that cannot be read or compared; the message names the folder or the file and line."""


@dataclass(frozen=True)
class Run:
    """One run, as its folder tells it."""

    name: str
    path: Path
    strategy: str  # a label such as `qsr H>=4 alpha=0.0175`
    recipe: dict[str, Any]
    records: list[dict[str, Any]]  # at least one; the fields of Record, None where an older version had none
    workers: list[dict[str, Any]]  # of the last number of workers; WorkersRecord; none in a run of long ago
    worker_counts: list[int]  # how many workers it had, one after another; several where it went on with others
    finished: bool
    total_steps: int
    notes: list[str] = field(default_factory=list)  # what a reader of its figures must know
    branched: bool = False  # began with a checkpoint of another run
    events: list[MemberEvent] = field(default_factory=list)  # where workers come and go

    @property
    def task(self) -> str:
        """`images` or `text`."""
        return str(self.recipe.get("task", "images"))


def read_run(path: str | Path) -> Run:
    """Read one run's folder.

    A last line that is torn, as a killed run leaves it, is left out and said in the notes.

    Raises:
        ReportError: it is no run, has no record yet, or a file of it is broken.
    """
    path = Path(path)
    recipe = _read_recipe(path / RECIPE)
    records, notes = _read_records(path / METRICS)
    told = _read_workers(path / WORKERS)
    parts = [list(rows) for _, rows in groupby(told, key=lambda row: len(row["seconds"]))]
    workers, counts = (parts[-1] if parts else []), [len(rows[0]["seconds"]) for rows in parts]
    if len(parts) > 1:
        notes.append(
            f"of {counts[-1]} workers from step {parts[-2][-1]['step']} on, and {counts[-2]} before; waiting is told "
            "of the later part"
        )
    total_steps, stopped = recipe["qsr"]["total_steps"], stopped_at(path)
    finished = (path / SUMMARY).is_file() and stopped is None
    if stopped is not None:
        notes.insert(0, f"stopped at step {stopped}/{total_steps}, as its recipe says (stop_at_step)")
    elif not finished:
        notes.insert(0, f"unfinished at step {records[-1]['step']}/{total_steps}")
    notes += _origin(path / ORIGIN)
    branched = (path / ORIGIN).exists()
    name, label = path.resolve().name, strategy_label(recipe["qsr"])
    for count, what in (
        (records[-1]["left_out"], "a worker that was not finite, or an outlier, was left out of an average"),
        (records[-1]["clipped"], "the movement of a worker that was an outlier was clipped"),
    ):
        if count:
            notes.append(f"{what} {'once' if count == 1 else f'{count} times'}")
    notes += _slow_worker(workers)
    events = read_events(path / EVENTS)
    notes += _comings(events)
    return Run(name, path, label, recipe, records, workers, counts, finished, total_steps, notes, branched, events)


def _comings(events: Sequence[MemberEvent]) -> list[str]:
    """A note where workers came and went after the start."""
    found = Counter(event.event for event in events if event.step > 0)
    words = {
        "leave": "left",
        "join": "joined",
        "missing": "were not there in time",
        "late": "movements came late",
        "failed": "averagings failed and were repeated",
    }
    said = [f"{found[event]} {text}" for event, text in words.items() if found[event]]
    lost, twice, missed = (sum(event.samples[place] for event in events) for place in range(3))
    if lost or twice or missed:
        said.append(f"of their samples {lost} were lost, {twice} came twice and {missed} were missed")
    return [f"members: {', '.join(said)} (events.jsonl)"] if said else []


def _origin(path: Path) -> list[str]:
    """A note where the run began with another one's checkpoint."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return [
            f"begun at step {found['step']} with the checkpoint {found['tag']} of {found['run']}, whose costs count"
        ]
    return []


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
    lacking: set[str] = set()
    lines = _read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if _is_record(row):
            records.append(dict.fromkeys(_FIELDS) | row)
            lacking |= _ALWAYS_KNOWN - row.keys()
        elif number < len(lines):
            raise ReportError(f"{path}, line {number}: not a record of metrics; repair or delete this line: {line:.60}")
    if not records:
        raise ReportError(f"{path}: no record of metrics yet; wait for the run's first one, or leave this run out")
    notes = [] if len(records) == len(lines) else ["the last line of metrics.jsonl is torn and left out"]
    if lacking:
        notes.append(f"written by another version, without {', '.join(sorted(lacking))}, which is not known here")
    return records, notes


_FIELDS: dict[str, Any] = {item.name: int if item.type == "int" else int | float | None for item in fields(Record)}

_COUNTED_HERE = {"averagings_percent"}  # from averagings and steps, of any version's run
# Others may be null in any run.
_ALWAYS_KNOWN = {item.name for item in fields(Record) if item.default is not None} - _COUNTED_HERE


def _is_record(row: object) -> bool:
    """Counts are whole numbers; every other field may be null, where it was unknown or not finite.

    Another version may have had other fields, but for the step.
    """
    return (
        isinstance(row, dict)
        and "step" in row
        and all(isinstance(row[name], kind) for name, kind in _FIELDS.items() if name in row)
    )


def _read_workers(path: Path) -> list[dict[str, Any]]:
    """The workers' records; what cannot be read is left out, since no other figure needs it."""
    found = []
    for line in _read_text(path).splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if _is_workers_record(row):
                found.append(row)
    return found


def _is_workers_record(row: object) -> bool:
    """A loss may be null, where it was not finite, and waiting as a whole, where there were no local steps.

    A run of an earlier version has no accuracy.
    """
    if not isinstance(row, dict) or _OF_WORKERS - set(row):
        return False
    lists = [row[name] for name in ("seconds", "seconds_data", "skipped_samples")]
    lists += [row[name] for name in ("seconds_waiting", "accuracy") if row.get(name) is not None]
    right = isinstance(row["step"], int) and all(isinstance(values, list) and values for values in lists)
    if not right or len({len(values) for values in lists}) > 1:
        return False
    return all(isinstance(value, int | float) for values in lists for value in values) and min(row["seconds"]) > 0


_OF_WORKERS = {item.name for item in fields(WorkersRecord) if item.default is MISSING}


def waiting_percent(workers: Sequence[dict[str, Any]]) -> list[float] | None:
    """Of the time of the run, that each worker waited at boundaries for the last to come; None: not known."""
    known = [row for row in workers if row["seconds_waiting"] is not None]
    if not known:
        return None
    waited, seconds = (
        [sum(of_one) for of_one in zip(*(row[name] for row in known), strict=True)]
        for name in ("seconds_waiting", "seconds")
    )
    return [100 * part / whole for part, whole in zip(waited, seconds, strict=True)]


_ENOUGH = 5  # records, to say that a worker is slow
_MOSTLY = 0.8  # of the records
_NOTABLE = 5.0  # per cent of the time


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


def strategy_label(qsr: dict[str, Any]) -> str:
    """What tells this run's strategy from others, from the resolved `qsr` block of its recipe."""
    strategy, h_base, alpha, power = qsr["strategy"], qsr.get("h_base", 1), qsr.get("alpha") or 0, qsr.get("power", 2)
    if strategy == "parallel":
        return "parallel"
    limit = f", h_max {qsr['h_max']}" if qsr.get("h_max") else ""
    if strategy != "qsr":
        switch = f" @{qsr['switch_step']}" if "switch_step" in qsr else ""
        return f"{strategy} H={h_base}{switch}" + (limit if strategy == "swap" else "")  # others have no longer round
    warmup = f", h_warmup {qsr['h_warmup']}" if qsr.get("h_warmup") else ""
    rule = f"qsr H>={h_base} alpha={alpha:g}" if power == 2 else f"power {power:g}, H>={h_base}, alpha {alpha:g}"
    return rule + warmup + limit


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

    Hours leave evaluation out; images and tokens per second are the mean over those hours.
    """
    last = run.records[-1]
    parts = {name: last[f"seconds_{name}"] for name in ("compute", "averaging", "data")}
    seconds = sum(part for part in parts.values() if part is not None)
    of_text = run.task == "text"
    best_step, best = max(accuracies(run), key=lambda point: point[1], default=(None, None))
    losses = series(run, "eval_loss")
    if of_text and losses:
        best_step = min(losses, key=lambda point: point[1])[0]
    told = [row["accuracy"] for row in run.workers if row.get("accuracy") is not None]
    # Of a run of an earlier version too, whose communication_percent was of bytes.
    share = None if last["averagings"] is None else 100 * last["averagings"] / max(1, last["step"])
    return {
        "run": run.name,
        "path": str(run.path),
        "strategy": run.strategy,
        "step": last["step"],
        "total_steps": run.total_steps,
        "finished": run.finished,
        "accuracy_percent": _last(run, "eval_accuracy"),
        "top5_percent": _last(run, "eval_top5_accuracy"),
        "best_percent": best,
        "best_step": best_step,
        "loss": _last(run, "eval_loss"),
        "perplexity": _last(run, "eval_perplexity"),
        "bits_per_byte": _last(run, "eval_bits_per_byte"),
        "best_loss": min((loss for _, loss in losses), default=None),
        "train_percent": statistics.mean(told[-1]) if told else None,
        "train_percent_of_workers": told[-1] if told else None,
        "averagings": last["averagings"],
        "averagings_percent": share,
        "communication_percent": share,  # its old name
        "bytes_percent": last["bytes_percent"],
        "hours": None if last["seconds_compute"] is None else seconds / 3600,
        **{f"hours_{name}": None if part is None else part / 3600 for name, part in parts.items()},
        **{
            f"{unit}_per_second": last[f"{unit}_seen"] / seconds
            if seconds and last[f"{unit}_seen"] is not None
            else None
            for unit in ("images", "tokens")
        },
        "waiting_percent": None if (waited := waiting_percent(run.workers)) is None else statistics.mean(waited),
        "waiting_percent_of_workers": waited,
        "sharpness": _last(run, "sharpness"),
        **{name: _last(run, name) for name in NORMS},
        "notes": run.notes,
    }


NORMS = tuple(name for name in _FIELDS if name.endswith("_norm"))  # of Record


def _last(run: Run, name: str) -> float | None:
    return next((y for _, y in reversed(series(run, name))), None)


def accuracies(run: Run) -> list[tuple[int, float]]:
    """(step, accuracy in %) of every evaluation."""
    return series(run, "eval_accuracy")


def series(run: Run, name: str) -> list[tuple[int, float]]:
    """(step, value) of a field, where it is known; a run of an earlier version may not have it."""
    return [(row["step"], row[name]) for row in run.records if row.get(name) is not None]
