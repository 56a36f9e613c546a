"""What `qsr train` adds where workers come and go: batches for who is there, and one set of records whoever dies.

Every worker runs the same loop. At a boundary it learns who is there (`engine.standing`), and

    data         goes on where the samples seen so far would end if those who are there now had seen them all
    records      are written by one member, the recorder; where it dies, the next one goes on from that boundary
    evaluation   and checkpoints are the recorder's, at the first boundary at or after their step
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from qsr_engine.checkpoint.find import any_here, find_alone
from qsr_engine.config.batch import Batch
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_batch import resolve_recipe_batch
from qsr_engine.config.strict import ConfigError
from qsr_engine.data.order import seed_for
from qsr_engine.local_steps.member import Loop, Standing
from qsr_engine.membership.quorum import EXPECTED
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.recorder import Recorder
from qsr_engine.records.records import Record, WorkersRecord
from qsr_engine.records.run_folder import CHECKPOINTS, EVENTS, METRICS
from qsr_engine.records.trackers import JsonLines
from qsr_engine.training.batches import Batches


def batch_of_worker(recipe: Recipe, ranks: int, *, resume: bool, workers: int | None = None) -> Batch:
    """Batch sizes of one worker of so many ranks, the same whoever else is there.

    batch.train_batch_size is that of as many workers as `--ranks` starts, or membership.min_workers if more. A run that
    goes on from a checkpoint leaves every rank its part, whatever it says.

    Args:
        workers: that `--ranks` starts; None where it has started this one.
    Raises:
        ConfigError: the recipe asks for what cannot be so, or its batch cannot be divided among them.
    """
    if recipe.stop_at_step is not None:
        raise ConfigError("stop_at_step is given, where members would stop inside a round; leave it out")
    if recipe.batch.on_other_ranks == "keep":
        raise ConfigError(
            "batch.on_other_ranks is 'keep', and members come and go while every worker's batch stays as it is; write "
            "per_rank (`--set batch.on_other_ranks=per_rank`), or membership 'fixed'"
        )
    if recipe.data.loader is not None:
        raise ConfigError(
            "data.loader is given, and a loader of your own cannot be told that other members are there now; leave it "
            "out, or write membership 'fixed'"
        )
    if resume and any_here(recipe.run_dir / CHECKPOINTS):
        saved = find_alone(recipe.run_dir / CHECKPOINTS)[1].config
        micro, accumulation = int(saved["train_micro_batch_size_per_gpu"]), int(saved["gradient_accumulation_steps"])
        return Batch(micro * accumulation * ranks, micro, accumulation)
    started = int(os.environ.get(EXPECTED, "1")) if workers is None else workers
    workers = max(recipe.qsr.membership.min_workers, started)
    all_of_them = resolve_recipe_batch(recipe, workers * ranks)
    return Batch(all_of_them.micro * all_of_them.accumulation * ranks, all_of_them.micro, all_of_them.accumulation)


class Attendance(Loop):
    """This worker's part in the loop, on one of its ranks.

    Args:
        told: facts that must be the same on all members, by their names.
    """

    def __init__(self, recipe: Recipe, told: dict[str, Any], batches: Batches) -> None:
        self._recipe, self._told, self._batches = recipe, told, batches

    def facts(self) -> dict[str, str]:
        return {key: str(value) for key, value in self._told.items()}

    def state(self) -> dict[str, Any]:
        return {"images_seen": self._batches.samples_seen}

    def take(self, state: dict[str, Any]) -> None:
        self._batches.samples_seen = state["images_seen"]

    def stand(self, standing: Standing, step: int, rank: int, ranks: int) -> None:
        """Who is there has been learnt, after so many steps; `rank` of the `ranks` of this worker."""
        self._batches.take_place(standing.place * ranks + rank, len(standing.names) * ranks)
        if step == 0 or not standing.names:
            return
        # Workers that go on from one checkpoint have its random state, and dropout would be the same on all of them.
        torch.manual_seed(seed_for("member", self._recipe.seed, step, standing.place, rank) % 2**62)


class Records:
    """The monitor of a run whose recorder may die: as records.monitor.Monitor, and nothing where another one records.

    Args:
        begin: begins the run's folder at step 0, and gives its lock, if there is one.
        make: the monitor that goes on from a step.
        has_left: whether this worker was frozen, and another one records the run by now.
        name: of this worker, which no other one has.
    """

    def __init__(
        self,
        recipe: Recipe,
        begin: Callable[[int], IO[str] | None],
        make: Callable[[int], Monitor],
        has_left: Callable[[], bool],
        name: str,
        *,
        writes: bool,
    ) -> None:
        self._recipe, self._begin, self._make, self._has_left = recipe, begin, make, has_left
        self._recorder, self._writes = Recorder(recipe.run_dir, name), writes
        self._kept: list[Record] = []  # of the round under way, where another member records it
        self._monitor: Monitor | None = None
        self._events: JsonLines | None = None
        self._lock: IO[str] | None = None

    def stand(self, standing: Standing, step: int, before: int, events: list[dict[str, Any]]) -> None:
        """At a boundary: take over the records, leave them to another member, or write what has happened.

        Args:
            before: the step of the boundary before, from which on this worker has kept records of its own.
        """
        if not self._writes:
            return
        if not standing.recorder:
            self.close()
        elif self._monitor is None:
            self._take_over(step, before)
        self._kept.clear()
        if self._events is not None:
            for event in events:
                self._events.log(event, event["step"])

    def _take_over(self, step: int, before: int) -> None:
        """What the member has written that recorded the run, up to the boundary before; then what this one has kept."""
        self._lock = self._begin(step)
        self._recorder.begin()
        known = min(step, max(1, before))  # a file that is there is not opened at step 0
        self._monitor = self._make(known)
        self._events = JsonLines(self._recipe.run_dir / EVENTS, from_step=known)
        written = _last_step(self._recipe.run_dir / METRICS)
        for record in self._kept:
            if record.step > written:
                self._monitor.log(record)

    def log(self, record: Record) -> None:
        if self._monitor is not None:
            if self._has_left():
                return
            with self._recorder.writes() as writes:
                if writes:  # else this worker is late, and another one records the run by now
                    self._monitor.log(record)
        elif self._writes:
            self._kept.append(record)

    def log_workers(self, record: WorkersRecord) -> None:
        if self._monitor is not None:
            self._monitor.log_workers(record)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        if self._monitor is None:
            yield
        else:
            with self._monitor.phase(name, step):
                yield

    def summary(self, **values: Any) -> None:
        if self._monitor is not None:
            self._monitor.summary(**values)

    def close(self) -> None:
        """Again is harmless."""
        for file in (self._monitor, self._events, self._lock):
            if file is not None:
                file.close()
        self._monitor = self._events = self._lock = None


def _last_step(path: Path) -> int:
    """Of the last whole line of a file of records; 0 where there is none."""
    with suppress(OSError, ValueError, IndexError, KeyError):
        return int(json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["step"])
    return 0
