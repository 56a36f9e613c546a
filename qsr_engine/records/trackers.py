"""Where a run's values go, step by step: JSON lines, and files of TensorBoard's events (imported where one is opened).

A new tracker is one more class with `log(values, step)` and `close()`.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qsr_engine.config.strict import ConfigError
from qsr_engine.records.appending import AppendedFile
from qsr_engine.records.run_folder import write_whole


class Tracker(Protocol):
    """Keeps values over the step."""

    def log(self, values: Mapping[str, Any], step: int) -> None: ...

    def log_workers(self, values: Sequence[Mapping[str, float]], step: int) -> None:
        """Of each worker by itself, by the same tags; of too many workers there are none."""

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line; null stands for a number that is not finite.

    Args:
        from_step: lines of later steps are dropped; 0 in a new run, whose file must not be there yet.
    Raises:
        FileExistsError: it is there.
        ConfigError: later lines cannot be dropped; the file is as it was.
    """

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        if from_step:
            _drop_later_lines(path, from_step)
        self._file = AppendedFile(path, new=not from_step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Write the values and the step; the line is on its way to disk when this returns, if there is room."""
        self._file.write((as_json({**values, "step": step}) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class EventFile:
    """One event file of TensorBoard's.

    torch's SummaryWriter writes in a thread, which ends for good at its first error and leaves a part of an event.

    Args:
        folder: TensorBoard's run.
        from_step: events that other files of the folder hold for later steps do not count; 0 in a new run.
    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, folder: Path, *, from_step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # TensorBoard reads the files of a folder by their names, so the whole time comes first, in fixed width.
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name, new=True)
        self._records = RecordWriter(self._file)  # which makes one write of a record
        self._write(file_version="brain.Event:2")
        if from_step:
            self._write(step=from_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, *values: Any) -> None:
        """Write other summaries than scalars."""
        self._write(step=0, summary=self._summary(value=values))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write values by their tags; TensorBoard keeps them in fp32."""
        scalars = [self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._write(step=step, summary=self._summary(value=scalars))

    def close(self) -> None:
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())


def as_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON with null for every number that is not finite, and text for what JSON has no word for."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_later_lines(path: Path, step: int) -> None:
    """Keep the lines up to this step; one that a killed run left half written goes too."""
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
            write_whole(path, "".join(kept))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror or error}; make room, and resume") from error
