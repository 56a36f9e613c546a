"""What a run tells: seconds, losses, and the records that rank 0 makes of them.

Rank 0 tells its own loss and times. What it says of other workers, they tell it at a boundary, where they meet anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import all_gather_flat
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.records.records import Record, WorkersRecord
from qsr_engine.schedule import learning_rate, rounds
from qsr_engine.training.from_recipe import Engine


@dataclass
class Clock:
    """Where the wall-clock time goes, in seconds; what is paused, evaluation and checkpoints, counts nowhere."""

    started: float = field(default_factory=time.perf_counter)
    data: float = 0.0  # waiting for data
    elsewhere: float = 0.0

    def training(self) -> float:
        return time.perf_counter() - self.started - self.elsewhere

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.elsewhere += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": [self.training(), self.data]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        training, self.data = state["seconds"]
        self.started -= training


class Figures:
    """Collects what happens and tells the monitor.

    Args:
        monitor: records.monitor.Monitor, or what can do the same.
        batch: samples of a step, over all ranks.
        unit: what throughput counts, "images" or "tokens".
        units: of them in a sample.
    """

    def __init__(
        self, engine: Engine, clock: Clock, monitor: Any, batch: int, *, unit: str = "images", units: int = 1
    ) -> None:
        self._engine, self._clock, self._monitor, self._batch = engine, clock, monitor, batch
        self._unit, self._units = unit, units
        # The loss and, where the task has one, the accuracy in %, on the device.
        self._step_seen: list[Tensor] = []  # of the micro-batches of the step under way
        self._seen: list[Tensor] = []  # of every step since the last record
        self._round_seen: list[Tensor] = []  # since the workers last told theirs
        self.train_accuracy: float | None = None  # mean over the workers, as they last told it
        self._told: tuple[float, ...] = (0.0, 0.0, 0.0)  # what _seconds() was then
        self._told_step = engine.local_steps.step
        # Of the last record: step, seconds of training and of waiting for data, and samples that all ranks had seen.
        self._logged = (engine.local_steps.step, 0.0, 0.0, engine.local_steps.step * batch)

    def state_dict(self) -> dict[str, Any]:
        """What has not been told yet; losses and accuracies are those of this rank's batches."""
        return {
            "logged": list(self._logged),
            "ranks": dist.get_world_size(),
            "seen": torch.stack(self._seen).tolist() if self._seen else [],
            "since_told": [value - told for value, told in zip(self._seconds(), self._told, strict=True)],
            "round_seen": torch.stack(self._round_seen).tolist() if self._round_seen else [],
            "told_step": self._told_step,
            "train_accuracy": self.train_accuracy,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After the clock's."""
        step, seconds, data, *images = state["logged"]
        now = self._engine.local_steps.step
        seen = state.get("images_seen", now * self._batch) - (now - step) * self._batch  # an older checkpoint's
        self._logged = (step, seconds, data, images[0] if images else seen)
        if state["ranks"] == dist.get_world_size():  # else they are rank 0's of other batches
            self._seen, self._round_seen = (
                [torch.tensor(values, device=self._engine.device) for values in state.get(name, ())]
                for name in ("seen", "round_seen")  # which an older checkpoint lacks
            )
        since = state.get("since_told", (0.0, 0.0, 0.0))
        self._told = tuple(value - before for value, before in zip(self._seconds(), since, strict=True))
        self._told_step, self.train_accuracy = state.get("told_step", now), state.get("train_accuracy")

    def begin_at(self, samples_seen: int) -> None:
        """Records begin here, after so many samples of all ranks: others have told what was before."""
        self._logged = (self._engine.local_steps.step, self._clock.training(), self._clock.data, samples_seen)

    def add(self, loss: Tensor, accuracy: Tensor | None, *, last: bool = True) -> None:
        """One micro-batch, perhaps the last of its step: its mean loss, and its accuracy in %.

        Steps count alike, however many micro-batches they have. Nothing waits for the device here.
        """
        self._step_seen.append(torch.stack([loss.detach().float(), *([] if accuracy is None else [accuracy])]))
        if last:
            values = self._step_seen[0] if len(self._step_seen) == 1 else torch.stack(self._step_seen).mean(0)
            self._step_seen.clear()
            self._seen.append(values)
            self._round_seen.append(values)

    def log(self, *, samples_seen: int, skipped_samples: int, **known: Any) -> float | None:
        """Tell a record, with the fields of Record that others know.

        Returns:
            The mean loss since the last one; None where no step has been taken since.
        """
        loss, accuracy = None, []
        if self._seen:
            loss, *accuracy = torch.stack(self._seen).mean(0).tolist()  # waits for the device: the times below are true
        self._seen.clear()
        state = self._engine.local_steps
        _, seconds, waited, samples = self._logged
        so_far = self.so_far(samples_seen) | self._engine.measured()
        self._logged = (state.step, self._clock.training(), self._clock.data, samples_seen)
        elapsed = max(1e-9, self._logged[1] - seconds)
        rate = None if loss is None else self._units * (samples_seen - samples) / elapsed
        self._monitor.log(
            Record(
                **known,
                **so_far,
                step=state.step,
                loss=loss,
                train_accuracy=accuracy[0] if accuracy else None,
                images_per_second=rate if self._unit == "images" else None,
                tokens_per_second=rate if self._unit == "tokens" else None,
                data_percent=100 * (self._clock.data - waited) / elapsed,
                skipped_samples=skipped_samples,
                relative_distance=state.relative_distance,
                skipped_steps=state.costs.skipped_steps_of_all_workers,
                left_out=sum(state.costs.left_out.values()),
                clipped=sum(state.costs.clipped.values()),
                late=state.costs.late,
                largest_z=state.largest_z,
            )
        )
        return loss

    def workers_are_due(self, every: int) -> bool:
        """Whether workers tell at this boundary: the first one after a multiple of so many steps."""
        return self._engine.local_steps.step // every > self._told_step // every

    def log_workers(self, skipped_samples: int, *, due: bool) -> None:
        """Gather what every rank did since the last time; on a boundary.

        Args:
            due: else a run tells because it stops here, and one that goes on with it tells this again with the rest.
        """
        state = self._engine.local_steps
        now = self._seconds()
        seconds, data, waiting = (value - before for value, before in zip(now, self._told, strict=True))
        mean = torch.stack(self._round_seen).mean(0).tolist()  # of the loss and, where there is one, the accuracy
        if due:
            self._told, self._told_step = now, state.step
            self._round_seen.clear()
        mine = torch.tensor([*mean, seconds, data, waiting, skipped_samples], dtype=torch.float64)
        mine = mine.to(self._engine.device)
        told = torch.empty(dist.get_world_size() * len(mine), dtype=mine.dtype, device=mine.device)
        all_gather_flat(told, mine)
        ranks = told.cpu().view(-1, state.qsr.worker_size, len(mine))  # (worker, rank of the worker, figure)
        losses, *accuracies, passed, waited_for_data, waited, _ = ranks.mean(1).T.tolist()
        self.train_accuracy = sum(accuracies[0]) / len(accuracies[0]) if accuracies else None
        self._monitor.log_workers(
            WorkersRecord(
                step=state.step,
                seconds=passed,
                loss=losses,
                accuracy=accuracies[0] if accuracies else None,
                seconds_data=waited_for_data,
                seconds_waiting=waited if state.costs.seconds_waiting else None,
                skipped_samples=[round(count) for count in ranks[:, :, -1].sum(1).tolist()],
            )
        )

    def so_far(self, samples_seen: int) -> dict[str, Any]:
        """What the run has cost."""
        state, averaging = self._engine.local_steps, self._engine.seconds_averaging
        training = self._clock.training()
        return {
            "images_seen": None,
            f"{self._unit}_seen": self._units * samples_seen,
            "averagings": state.averagings,
            "averagings_percent": state.averagings_percent,
            "communication_percent": state.averagings_percent,
            "bytes_sent": state.bytes_sent,
            "bytes_percent": state.bytes_percent,
            "seconds_compute": training - self._clock.data - (averaging or 0.0),
            "seconds_averaging": averaging,
            "seconds_data": self._clock.data,
        }

    def _seconds(self) -> tuple[float, float, float]:
        """Of training, of waiting for data, and of waiting for others at boundaries."""
        return self._clock.training(), self._clock.data, self._engine.local_steps.costs.seconds_waiting


_POINTS = 500  # rounds that a prediction draws, evenly spread


def predicted(qsr: QSRConfig) -> list[tuple[int, int, float]]:
    """(step, H, learning rate) at the beginning and the end of rounds to come; [] where the rates are the caller's."""
    if qsr.lr is None:
        return []
    found = list(rounds(qsr))
    points = []
    for round_ in found[:: -(-len(found) // _POINTS)]:
        for step in sorted({round_.start, round_.start + round_.length - 1}):
            # A record counts the steps that are done, and has the rate of the last of them.
            points.append((step + 1, round_.length, learning_rate(qsr.lr, step, qsr.total_steps)))
    return points
