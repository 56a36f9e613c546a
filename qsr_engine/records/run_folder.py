"""The folder of a run: what is in it, and who may write there.

recipe.yaml      the resolved recipe
metrics.jsonl    one `Record` a line
workers.jsonl    one `WorkersRecord` a line
events.out.*     TensorBoard's, of the same values
checkpoints/
model.safetensors
summary.json     the last figures; it exists once the run is finished
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from qsr_engine.config.strict import ConfigError

RECIPE, METRICS, WORKERS, SUMMARY = "recipe.yaml", "metrics.jsonl", "workers.jsonl", "summary.json"
MODEL = "model.safetensors"
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
    ours = {RECIPE, METRICS, WORKERS, CHECKPOINTS, LOCK, MODEL, "model.tmp"}
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
