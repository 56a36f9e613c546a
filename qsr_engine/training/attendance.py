"""What `qsr train` adds where workers come and go: batches for who is there, and one set of records whoever dies.

Every worker runs the same loop. At a boundary it learns who is there (`engine.standing`), and

    batch        is divided among those who are there, or every rank keeps its part (config.batch.Dealing)
    data         goes on where the samples seen so far would end if those who are there now had seen them all; what
                 comes twice of it, is missed, or is lost with a member is counted
    records      are written by one member, the recorder; where it dies, the next one goes on from that boundary
    evaluation   and checkpoints are the recorder's, at the first boundary at or after their step
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from qsr_engine.checkpoint.find import any_here, find_alone
from qsr_engine.config.batch import Batch, Dealing, Part
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_batch import resolve_recipe_batch
from qsr_engine.config.strict import ConfigError
from qsr_engine.data.coverage import Coverage
from qsr_engine.data.order import seed_for
from qsr_engine.engines.surface import Surface
from qsr_engine.local_steps.member import Loop, Standing
from qsr_engine.membership.quorum import EXPECTED
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.recorder import Recorder
from qsr_engine.records.records import Record, WorkersRecord
from qsr_engine.records.run_folder import CHECKPOINTS, EVENTS, METRICS
from qsr_engine.records.trackers import JsonLines
from qsr_engine.training.batches import Batches

log = logging.getLogger(__name__)


def batch_of_worker(recipe: Recipe, ranks: int, *, resume: bool, workers: int | None = None) -> tuple[Batch, Dealing]:
    """Batch sizes with which every worker of so many ranks starts, and how members divide a step when they are there.

    batch.train_batch_size is that of as many workers as `--ranks` starts, or membership.min_workers if more. Where
    batch.on_other_ranks is `keep` it stays, whoever is there. A run that goes on from a checkpoint has micro-batches of
    the size that the recipe says, or else that it had; under `per_rank` every rank has its part of then, whatever the
    recipe says.

    Args:
        workers: that `--ranks` starts; None where it has started this one.
    Raises:
        ConfigError: the recipe asks for what cannot be so, or its batch cannot be divided among those that start.
    """
    if recipe.stop_at_step is not None:
        raise ConfigError("stop_at_step is given, where members would stop inside a round; leave it out")
    if recipe.data.loader is not None:
        raise ConfigError(
            "data.loader is given, and a loader of your own cannot be told that other members are there now; leave it "
            "out, or write membership 'fixed'"
        )
    keep = recipe.batch.on_other_ranks == "keep"
    if resume and any_here(recipe.run_dir / CHECKPOINTS):
        saved = find_alone(recipe.run_dir / CHECKPOINTS)[1].config
        micro, accumulation = int(saved["train_micro_batch_size_per_gpu"]), int(saved["gradient_accumulation_steps"])
        if keep:
            micro = recipe.batch.train_micro_batch_size_per_gpu or micro
    else:
        started = int(os.environ.get(EXPECTED, "1")) if workers is None else workers
        all_of_them = resolve_recipe_batch(recipe, max(recipe.qsr.membership.min_workers, started) * ranks)
        micro, accumulation = all_of_them.micro, all_of_them.accumulation
    dealing = Dealing(micro, ranks, accumulation, recipe.batch.train_batch_size if keep else None)
    return Batch(micro * accumulation * ranks, micro, accumulation), dealing


class Attendance(Loop):
    """This worker's part in the loop, on one of its ranks: which of the data it reads, and what becomes of the data.

    samples_lost      that were read in a round by members whose parameters are in no average of its end: they had died,
                      were frozen, or were not finite. As many as the steps of the round have, wherever they died
    samples_twice     that come more than once in an epoch, and
    samples_missed    that do not come in it, because the data was divided anew on the way (data.coverage)

    Args:
        told: facts that must be the same on all members, by their names.
        samples: of an epoch.
    """

    def __init__(
        self, recipe: Recipe, told: dict[str, Any], batches: Batches, dealing: Dealing, engine: Surface, samples: int
    ) -> None:
        self._recipe, self._told, self._batches, self._dealing = recipe, told, batches, dealing
        self._engine = engine
        self.accumulation = dealing.accumulation
        buffer = recipe.data.shuffle_buffer if recipe.data.shuffle == "buffer" else 1
        self._coverage = Coverage(samples, recipe.seed, buffer)
        self._standing: Standing | None = None
        self._step_samples = 0  # of all members in a step of this round; 0 before the first round
        self._own = 0  # of this worker in it
        self._round_began = 0  # samples of all members before it
        self._lost_now = 0
        self.counts = dict.fromkeys(("samples_lost", "samples_twice", "samples_missed"), 0)

    def facts(self) -> dict[str, str]:
        return {key: str(value) for key, value in self._told.items()}

    def state(self) -> dict[str, Any]:
        seen = self._batches.samples_seen
        in_round = seen - self._round_began
        own = in_round * self._own // self._step_samples if self._step_samples else 0
        return {
            "images_seen": seen,
            "round_began": self._round_began,
            "own": own,
            "counts": dict(self.counts),
            **self._coverage.state_dict(),
        }

    def take(self, state: dict[str, Any]) -> None:
        self._batches.samples_seen, self._round_began = state["images_seen"], state["round_began"]
        self.counts = dict(state["counts"])
        self._coverage.load_state_dict(state)

    def counted(self, source: dict[str, Any], given: list[dict[str, Any]]) -> None:
        assigned = source["images_seen"] - source["round_began"]
        self._lost_now = assigned - sum(one["own"] for one in given)
        self.counts["samples_lost"] += self._lost_now

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"members_data": {**self.state(), "step_samples": self._step_samples, "own_of_a_step": self._own}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After that of the batches. A checkpoint that no member has written has none of it."""
        if "members_data" not in state:
            self._round_began = self._batches.samples_seen
            return
        kept = state["members_data"]
        self.take(kept)
        self._step_samples, self._own = kept["step_samples"], kept["own_of_a_step"]

    def stand(self, standing: Standing, step: int, rank: int) -> list[dict[str, Any]]:
        """Who is there has been learnt, after so many steps, and from now on this worker takes its part of a step.

        Args:
            rank: of those of this worker.
        Returns:
            What has become of the data and of the batch, as events of the run; on the first rank.
        """
        dealing = self._dealing
        part = dealing.part(standing.place, len(standing.names))
        events = self._count(part, standing, step) if rank == 0 else []
        self._batches.take_place(part, rank)
        own = part.accumulation * dealing.micro * dealing.ranks
        if part.accumulation != self.accumulation:
            self._engine.set_train_batch_size(own)
        self.accumulation, self._own, self._step_samples = part.accumulation, own, part.samples
        self._round_began, self._lost_now, self._standing = self._batches.samples_seen, 0, standing
        if step == 0:
            return events
        # Workers that go on from one checkpoint have its random state, and dropout would be the same on all of them.
        torch.manual_seed(seed_for("member", self._recipe.seed, step, standing.place, rank) % 2**62)
        return events

    def _count(self, part: Part, standing: Standing, step: int) -> list[dict[str, Any]]:
        """Count what a boundary has lost, and what the members who are there now make of the epoch under way."""
        what = {"step": step, "member": "", "members": len(standing.names)}
        now = {"samples_lost": self._lost_now, "samples_twice": 0, "samples_missed": 0}
        if not self._engine.local_steps.finished:
            divided = self._coverage.divide(part.streams, self._dealing.micro, self._batches.samples_seen)
            now["samples_twice"], now["samples_missed"] = divided
        for name in ("samples_twice", "samples_missed"):
            self.counts[name] += now[name]
        events: list[dict[str, Any]] = []
        if any(now.values()) or (self._standing is not None and standing.names != self._standing.names):
            events.append({**what, "event": "data", **now, "exact": self._coverage.exact})
        kept = self._dealing.kept
        if part.samples != (self._step_samples or kept or part.samples) and not self._engine.local_steps.finished:
            events.append({**what, "event": "batch", "samples": part.samples})
            if kept is not None and standing.recorder:
                log.warning(
                    "after step %d a step has %d samples, as %d members divide it in micro-batches of %d on each of "
                    "their ranks (batch.train_batch_size: %d)",
                    *(step, part.samples, len(standing.names), self._dealing.micro, kept),
                )
        return events


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
