"""The folder of a run: what is in it, and who may write there.

recipe.yaml      the resolved recipe
from.json        the checkpoint of another run with which this one began; not there if it began at step 0
metrics.jsonl    one `Record` a line
workers.jsonl    one `WorkersRecord` a line
events.jsonl     who joined and left, a line each, where workers come and go
events.out.*     TensorBoard's, of the same values
tensorboard/     those that it shows beside them: of each worker, and what was predicted
checkpoints/
model.safetensors
summary.json     the last figures; it exists once the run is finished, or has stopped where its recipe says
before-...       what an attempt wrote that ended before its first checkpoint
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO

from qsr_engine.config.strict import ConfigError

RECIPE, METRICS, WORKERS, SUMMARY = "recipe.yaml", "metrics.jsonl", "workers.jsonl", "summary.json"
EVENTS = "events.jsonl"
MODEL = "model.safetensors"
ORIGIN = "from.json"
CHECKPOINTS = "checkpoints"  # a folder
TENSORBOARD = "tensorboard"  # likewise
LOCK = ".lock"  # held by the process that trains
RECORDER = ".recorder"  # the name of the member that writes here, where workers come and go
_TFEVENTS = "events.out.tfevents"
_BEFORE = re.compile(r"before-\d{8}-\d{6}(-\d+)?")  # a folder

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
        found = [name for name in found if not _BEFORE.fullmatch(name)]
    except OSError as error:
        raise _cannot_write(path, error) from error
    if found:
        raise ConfigError(
            f"{path}: this folder already holds {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}; choose "
            "another name with `--set logging.name=NAME`, go on with the run that is there (--resume), or delete the "
            "folder"
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


def stopped_at(path: Path) -> int | None:
    """The step where the run in this folder has stopped because its recipe says so; None: there is no such run."""
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        return int(summary["steps"]) if summary["partial"] else None
    except (OSError, ValueError, KeyError, TypeError):  # it has a summary of an older version, or none
        return None


def is_finished(path: Path, last_step: int) -> bool:
    """Whether the run in this folder has come to its end, or to a step from which last_step is not further on."""
    stopped = stopped_at(path)
    return (path / SUMMARY).exists() and (stopped is None or stopped >= last_step)


def check_unfinished(path: Path, last_step: int) -> None:
    """Raises ConfigError if the run in this folder is finished, or has stopped where it is to stop."""
    if not is_finished(path, last_step):
        return
    if stopped_at(path) is None:
        raise ConfigError(f"{path}: this run is finished ({SUMMARY} is there), and there is nothing to resume")
    raise ConfigError(
        f"{path}: this run has stopped at step {stopped_at(path)}, and stop_at_step is {last_step}; to go on, write a "
        "later step, or null (`--set stop_at_step=null`)"
    )


def leave_unfinished_run(path: Path) -> None:
    """Clear the folder of a run that ended before its first checkpoint, so that it can begin anew.

    What it has recorded is kept aside in a folder inside, with its recipe, and a warning says where.

    Raises:
        ConfigError: the folder holds what no run writes.
    """
    if not path.exists():
        return
    found = {entry.name for entry in path.iterdir() if not _BEFORE.fullmatch(entry.name)}
    ours = {
        RECIPE,
        METRICS,
        WORKERS,
        EVENTS,
        SUMMARY,
        ORIGIN,
        CHECKPOINTS,
        TENSORBOARD,
        LOCK,
        RECORDER,
        MODEL,
        "model.tmp",
    }
    ours |= {
        f"{name}.tmp" for name in (METRICS, WORKERS, EVENTS, SUMMARY, ORIGIN)
    }  # of a process that died while it wrote
    strange = sorted(name for name in found - ours if not name.startswith(_TFEVENTS))
    if strange:
        raise ConfigError(f"{path}: this folder holds {', '.join(strange[:3])}, which no run writes; {_ANOTHER_PLACE}")
    kept_names = (METRICS, WORKERS, EVENTS, SUMMARY, MODEL, TENSORBOARD)
    recorded = {name for name in found if name in kept_names or name.startswith(_TFEVENTS)}
    if any((path / name).stat().st_size for name in recorded):
        kept = _keep_aside(path, recorded | (found & {RECIPE}))
        warnings.warn(
            f"{path}: there is no checkpoint to go on from, so the run begins anew; what it had recorded is in {kept}",
            stacklevel=4,
        )
        found -= {entry.name for entry in kept.iterdir()}
    for name in found - {CHECKPOINTS}:
        (path / name).unlink()
    if CHECKPOINTS in found:  # no whole one is there; what a save that died has left begins with a dot
        for left in (path / CHECKPOINTS).glob(".*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        with suppress(OSError):
            (path / CHECKPOINTS).rmdir()


def _keep_aside(path: Path, names: set[str]) -> Path:
    """Move files of a run's folder into a new one inside it. Returns that."""
    stem = time.strftime("before-%Y%m%d-%H%M%S")
    names_of_it = (path / f"{stem}{more}" for more in itertools.chain([""], map("-{}".format, itertools.count(2))))
    folder = next(place for place in names_of_it if not place.exists())
    folder.mkdir()
    for name in sorted(names):
        (path / name).rename(folder / name)
    return folder


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


def write_whole(path: Path, text: str) -> None:
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
