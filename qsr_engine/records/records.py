"""What a run writes: its folder, one record of metrics at a time, and its last figures.

A run's folder holds `recipe.yaml` (the resolved recipe), `metrics.jsonl` (one `Record` a line), `workers.jsonl` (one
`WorkersRecord` a line), TensorBoard events of the same values, and `summary.json`, which exists once the run is
finished. `qsr_engine.runs` reads them back. Rank 0 alone writes: what it says of other workers, they told it at a
boundary.

torch is never imported, so that the command line starts quickly. Where the disk is full, training goes on without
records, which are written when there is room again (see appending.py).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self, TextIO

from tqdm import tqdm

from qsr_engine.config.strict import ConfigError
from qsr_engine.records.appending import AppendedFile, EventFile

RECIPE, METRICS, SUMMARY = "recipe.yaml", "metrics.jsonl", "summary.json"
WORKERS = "workers.jsonl"
CHECKPOINTS = "checkpoints"  # a folder
LOCK = ".lock"  # held by the process that trains
_EVENTS = "events.out.tfevents"

_ANOTHER_PLACE = "choose another place with `--set logging.dir=DIR` or `--set logging.name=NAME`"


def check_run_folder(path: Path) -> None:
    """Check, without creating anything, that a new run can have this folder.

    Raises:
        ConfigError: it holds something already, is a file, or lies where nothing can be written.
    """
    try:
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not existing.is_dir():
            raise ConfigError(f"{path}: {existing} is a file, and a run needs a folder; {_ANOTHER_PLACE}")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"{path}: no permission to write in {existing}; {_ANOTHER_PLACE}")
        found = sorted(entry.name for entry in path.iterdir()) if existing == path else []
    except OSError as error:
        raise _cannot_write(path, error) from error
    if found:
        raise ConfigError(
            f"{path}: this folder already holds {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}; choose "
            "another name with `--set logging.name=NAME`, or delete the folder"
        )


def open_run_folder(path: Path, recipe_text: str) -> None:
    """Make a run's folder and write the resolved recipe into it.

    Raises:
        ConfigError: as check_run_folder(), or another run took the folder in the meantime.
    """
    check_run_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / RECIPE).open("x", encoding="utf-8") as file:  # "x": of two runs started at once, one is refused
            file.write(recipe_text)
    except OSError as error:
        raise _cannot_write(path, error) from error


def lock_run_folder(path: Path) -> IO[str] | None:
    """Keep a run's folder for this process, until it closes the file or ends, however it ends.

    Returns:
        The open lock; None where the file system has no locks.
    Raises:
        ConfigError: another process trains in this folder.
    """
    try:
        file = (path / LOCK).open("w", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{path}: another process trains in this folder, perhaps one whose launcher was killed; wait for it or end "
            "it, or choose another name with `--set logging.name=NAME`"
        ) from None
    except OSError:
        return None
    return file


def check_unfinished(path: Path) -> None:
    """Raises ConfigError if the run in this folder is finished."""
    if (path / SUMMARY).exists():
        raise ConfigError(f"{path}: this run is finished ({SUMMARY} is there), and there is nothing to resume")


def leave_unfinished_run(path: Path) -> None:
    """Empty the folder of a run that ended before its first checkpoint, so that it can begin anew.

    Raises:
        ConfigError: the folder holds what no run writes.
    """
    if not path.exists():
        return
    found = {entry.name for entry in path.iterdir()}
    ours = {RECIPE, METRICS, WORKERS, CHECKPOINTS, LOCK, "model.safetensors", "model.tmp"}
    ours |= {f"{name}.tmp" for name in (METRICS, WORKERS, SUMMARY)}  # of a process that died while it wrote
    strange = sorted(name for name in found - ours if not name.startswith(_EVENTS))
    if strange:
        raise ConfigError(f"{path}: this folder holds {', '.join(strange[:3])}, which no run writes; {_ANOTHER_PLACE}")
    for name in found - {CHECKPOINTS}:
        (path / name).unlink()
    if CHECKPOINTS in found:  # no whole one is there; what a save that died has left begins with a dot
        for left in (path / CHECKPOINTS).glob(".*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        with suppress(OSError):
            (path / CHECKPOINTS).rmdir()


def cannot_finish(path: Path, error: Exception) -> ConfigError:
    """That the last files of a run, which is trained, cannot be written."""
    reason = getattr(error, "strerror", None) or error
    return ConfigError(
        f"{path}: cannot be written: {reason}. Training is done, and the run is not finished without this file: make "
        "room on this disk, then run the same command with `--resume`, which goes on from the last checkpoint "
        f"({path.parent / CHECKPOINTS}), or from the beginning where there is none"
    )


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot make this run's folder: {error.strerror or error}; {_ANOTHER_PLACE}")


@dataclass(frozen=True)
class Record:
    """One row of training metrics.

    In `metrics.jsonl` null stands for None, and also for a number that is not finite, which JSON cannot say: a null
    loss is a loss that diverged. TensorBoard gets such a number as it is.

    The three times are wall-clock seconds since training began, evaluation excluded, and add up to all of it.
    """

    step: int  # optimizer steps done
    images_seen: int  # samples, over all workers
    round: int
    period: int  # H of the round that this step belongs to
    lr: float
    loss: float  # mean over this rank's steps since the last record; the rank is rank 0
    averagings: int  # so far
    bytes_sent: float  # per rank, so far: a ring all-reduce over n ranks sends 2 (n - 1) / n of its payload
    communication_percent: float  # bytes sent so far, in % of what `parallel` would have sent
    seconds_compute: float
    seconds_averaging: float | None  # None where it cannot be told apart from compute, which then holds it
    seconds_data: float  # waiting for data
    images_per_second: float  # over all workers, since the last record
    relative_distance: float | None = None  # RMS over workers of ||x_k - mean|| / ||mean|| before the last averaging
    eval_accuracy: float | None = None  # %; None where this record has no evaluation
    eval_loss: float | None = None  # None likewise
    sharpness: float | None = None  # largest eigenvalue of the loss's Hessian at the average; None likewise
    data_percent: float | None = None  # of the time since the last record: rank 0 waited for data
    skipped_samples: int = 0  # bad samples that rank 0 has skipped so far
    checkpoints_failed: int = 0  # that could not be written, so far
    skipped_steps: int = 0  # updates skipped after an overflow, over all workers, as of the last boundary
    left_out: int = 0  # times so far that a worker's parameters were not finite and it was left out of an average


TAGS = {
    "train/loss": "loss",
    "train/lr": "lr",
    "local_steps/period": "period",
    "local_steps/round": "round",
    "local_steps/relative_distance": "relative_distance",
    "local_steps/skipped_steps": "skipped_steps",
    "checkpoints/failed": "checkpoints_failed",
    "local_steps/left_out": "left_out",
    "communication/averagings": "averagings",
    "communication/bytes_sent": "bytes_sent",
    "communication/percent_of_parallel": "communication_percent",
    "time/compute_seconds": "seconds_compute",
    "time/averaging_seconds": "seconds_averaging",
    "time/data_seconds": "seconds_data",
    "data/waiting_percent": "data_percent",
    "data/skipped_samples": "skipped_samples",
    "throughput/images_per_second": "images_per_second",
    "throughput/images_seen": "images_seen",
    "eval/accuracy": "eval_accuracy",
    "eval/loss": "eval_loss",
    "eval/sharpness": "sharpness",
}
"""TensorBoard's tag for every field of a record; the x axis is `step`."""


@dataclass(frozen=True)
class WorkersRecord:
    """What every worker did since the last such record: a list has one number a worker, in their order.

    Gathered at a boundary, so nobody waits for it elsewhere. Of a worker of several ranks: the mean over its ranks, and
    the sum of their skipped samples. Times are wall-clock seconds, evaluation and checkpoints excluded.
    """

    step: int  # optimizer steps done
    seconds: list[float]  # that passed
    loss: list[float]
    seconds_data: list[float]  # waiting for data
    seconds_waiting: list[float] | None  # at boundaries, for the last to come; None without local steps
    skipped_samples: list[int]  # so far


def _worker_scalars(record: WorkersRecord) -> Iterator[tuple[str, float]]:
    """TensorBoard's tags and values: the range over the workers, and each by itself where there are not too many."""
    curves = {"loss": record.loss, "data_percent": _percent(record.seconds_data, record.seconds)}
    if record.seconds_waiting is not None:
        curves["waiting_percent"] = _percent(record.seconds_waiting, record.seconds)
    for name, values in curves.items():
        yield from ((f"workers/{name}_{which.__name__}", which(values)) for which in (min, max))
        if len(values) <= _WORKERS_SHOWN:
            yield from ((f"workers_{name}/{worker}", value) for worker, value in enumerate(values))


def _percent(parts: list[float], wholes: list[float]) -> list[float]:
    return [100 * part / max(1e-9, whole) for part, whole in zip(parts, wholes, strict=True)]


_WORKERS_SHOWN = 32


class Monitor:
    """Writes the records of one run: a context manager, on rank 0.

    On a terminal it draws a progress bar, elsewhere it prints a line a record.

    Args:
        run_dir: the folder that open_run_folder() made.
        total_steps: optimizer steps of the whole run.
        tensorboard: write TensorBoard events too.
        enabled: False, on every rank but 0, does nothing at all.
        stream: where progress is shown; standard output where it is None.
        from_step: go on with a run that was saved at this step; records of later steps are dropped.

    Raises:
        FileExistsError: the folder holds the metrics of another run.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        *,
        tensorboard: bool = True,
        enabled: bool = True,
        stream: TextIO | None = None,
        from_step: int = 0,
    ) -> None:
        self._run_dir, self._total_steps, self._enabled = run_dir, total_steps, enabled
        self._stream = stream or sys.stdout
        self._open = ExitStack()
        self._bar: tqdm[Any] | None = None
        self._events: EventFile | None = None
        if not enabled:
            return
        if from_step:
            _drop_later_records(run_dir / METRICS, from_step)
            _drop_later_records(run_dir / WORKERS, from_step)
        self._metrics = self._open.enter_context(closing(AppendedFile(run_dir / METRICS, new=not from_step)))
        self._workers = self._open.enter_context(closing(AppendedFile(run_dir / WORKERS, new=not from_step)))
        if tensorboard:
            self._events = self._open.enter_context(closing(EventFile(run_dir, from_step=from_step)))
        if _is_terminal(self._stream):
            bar = tqdm(total=total_steps, initial=from_step, file=self._stream, dynamic_ncols=True, bar_format=_BAR)
            self._bar = self._open.enter_context(bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still buffered and close the files; again is harmless."""
        self._open.close()

    def log(self, record: Record) -> None:
        """Write one record everywhere; its line of JSON is on its way to disk when this returns, if there is room."""
        if not self._enabled:
            return
        row = asdict(record)
        self._metrics.write(_line(row))
        if self._events:
            self._events.add([(tag, row[name]) for tag, name in TAGS.items() if row[name] is not None], record.step)
        self._show(record)

    def log_workers(self, record: WorkersRecord) -> None:
        """Write what the workers told at a boundary, to workers.jsonl and TensorBoard."""
        if not self._enabled:
            return
        self._workers.write(_line(asdict(record)))
        if self._events:
            self._events.add(_worker_scalars(record), record.step)

    def summary(self, **values: Any) -> None:
        """Write the run's last figures to summary.json, whole or not at all; the run is then finished.

        Raises:
            ConfigError: it cannot be written; no part of it is left.
        """
        if not self._enabled:
            return
        try:
            _write_whole(self._run_dir / SUMMARY, _json(values, indent=2) + "\n")
        except OSError as error:
            raise cannot_finish(self._run_dir / SUMMARY, error) from error

    def _show(self, record: Record) -> None:
        accuracy = "" if record.eval_accuracy is None else f"  accuracy {record.eval_accuracy:.1f} %"
        if self._bar is not None:
            self._bar.update(record.step - self._bar.n)
            self._bar.set_postfix_str(f"loss {record.loss:.3g}  lr {record.lr:.3g}  H {record.period}{accuracy}")
            return
        print(
            f"step {record.step}/{self._total_steps}  round {record.round}  H {record.period}  lr {record.lr:.3g}  "
            f"loss {record.loss:.3g}  {record.images_per_second:.0f} images/s{accuracy}",
            file=self._stream,
            flush=True,
        )


def _drop_later_records(path: Path, step: int) -> None:
    """Keep the records up to this step; a line that a killed run left half written goes too.

    Raises:
        ConfigError: it cannot be written; the file is as it was.
    """
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    if "".join(kept) != text:
        try:
            _write_whole(path, "".join(kept))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror or error}; make room, and resume") from error


def _write_whole(path: Path, text: str) -> None:
    """Replace a file, which is as it was where this raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits into 80 columns


def _is_terminal(stream: TextIO) -> bool:
    """Whether it is a terminal of a known width: of 0 columns, as some containers give, tqdm would draw nothing."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


def _line(values: dict[str, Any]) -> bytes:
    return (_json(values) + "\n").encode()


def _json(values: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps(_finite(values), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """The same value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
