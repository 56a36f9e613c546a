"""The monitor of a run, on rank 0: every record goes to the run's folder, to the trackers and to who watches.

What it says of other workers, they told rank 0 at a boundary. Imports no torch, so that the command line starts
quickly. Where the disk is full, training goes on without records, which are written when there is room again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

from qsr_engine.records.progress import Progress, closing_words, progress
from qsr_engine.records.records import Record, WorkersRecord
from qsr_engine.records.run_folder import METRICS, SUMMARY, WORKERS, cannot_finish, write_whole
from qsr_engine.records.services import Service
from qsr_engine.records.tensorboard import About, TensorBoard
from qsr_engine.records.trackers import JsonLines, Tracker, as_json


class Monitor:
    """Writes the records of one run: a context manager, on rank 0.

    Args:
        run_dir: the folder that open_run_folder() made.
        total_steps: optimizer steps of the whole run.
        tensorboard: write TensorBoard events too.
        enabled: False, on every rank but 0, does nothing at all.
        services: names of trackers of others that get the figures too.
        stream: where progress is shown; standard output where it is None.
        from_step: go on with a run that was saved at this step; records of later steps are dropped.
        about: what is known of it before its first step, for who shows that too.
        origin: what the run began with, which its first record in the folder says as "from".

    Raises:
        FileExistsError: the folder holds the metrics of another run.
        ConfigError: later records cannot be dropped, or a service cannot begin.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        *,
        tensorboard: bool = True,
        services: Sequence[str] = (),
        enabled: bool = True,
        stream: TextIO | None = None,
        from_step: int = 0,
        origin: dict[str, Any] | None = None,
        about: About | None = None,
    ) -> None:
        self._run_dir, self._enabled, self._open = run_dir, enabled, ExitStack()
        self._first = {"from": origin} if origin else {}
        if not enabled:
            return
        self._metrics = self._open.enter_context(closing(JsonLines(run_dir / METRICS, from_step=from_step)))
        self._workers = self._open.enter_context(closing(JsonLines(run_dir / WORKERS, from_step=from_step)))
        self._trackers: list[Tracker] = []  # of scalars by their tags
        if tensorboard:
            board = TensorBoard(run_dir, from_step=from_step, about=about)
            self._trackers.append(self._open.enter_context(closing(board)))
        for name in services:
            service = Service(name, run_dir, about.recipe if about else {})
            self._trackers.append(self._open.enter_context(closing(service)))
        self._stream = stream or sys.stdout
        shown: Progress = progress(self._stream, total_steps, from_step=from_step)
        self._progress = self._open.enter_context(closing(shown))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is still buffered and close the files; again is harmless."""
        self._open.close()

    def log(self, record: Record) -> None:
        """Write one record everywhere."""
        if self._enabled:
            self._write(self._metrics, record, self._first)
            self._first = {}
            self._progress.show(record)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Show who watches that after a step none is taken for a while: `evaluating`, `saving`."""
        if self._enabled:
            self._progress.begin(name, step)
        yield
        if self._enabled:
            self._progress.end()

    def log_workers(self, record: WorkersRecord) -> None:
        """Write what the workers told at a boundary."""
        if self._enabled:
            self._write(self._workers, record, {})
            for tracker in self._trackers:
                tracker.log_workers(record.of_each(), record.step)

    def _write(self, lines: JsonLines, record: Record | WorkersRecord, more: dict[str, Any]) -> None:
        lines.log({**asdict(record), **more}, record.step)
        for tracker in self._trackers:
            tracker.log(record.scalars(), record.step)

    def summary(self, **values: Any) -> None:
        """Write the run's last figures to summary.json, whole or not at all; the run is then finished, and says so.

        Raises:
            ConfigError: it cannot be written; no part of it is left.
        """
        if not self._enabled:
            return
        try:
            write_whole(self._run_dir / SUMMARY, as_json(values, indent=2) + "\n")
        except OSError as error:
            raise cannot_finish(self._run_dir / SUMMARY, error) from error
        self._progress.close()
        print(closing_words(self._run_dir, values), file=self._stream, flush=True)
