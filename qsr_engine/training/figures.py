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
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.records import Record, WorkersRecord
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
        batch: samples of a step, over all ranks.
    """

    def __init__(self, engine: Engine, clock: Clock, monitor: Monitor, batch: int) -> None:
        self._engine, self._clock, self._monitor, self._batch = engine, clock, monitor, batch
        self._losses: list[Tensor] = []
        self._round_losses: list[Tensor] = []  # since the workers last told theirs
        self._told: tuple[float, ...] = (0.0, 0.0, 0.0)  # what _seconds() was then
        # Of the last record: step, seconds of training and of waiting for data, and images that all ranks had seen.
        self._logged = (engine.local_steps.step, 0.0, 0.0, engine.local_steps.step * batch)

    def state_dict(self) -> dict[str, Any]:
        """What has not been told yet; losses are those of this rank's batches."""
        return {
            "logged": list(self._logged),
            "ranks": dist.get_world_size(),
            "losses": [loss.item() for loss in self._losses],
            "since_told": [value - told for value, told in zip(self._seconds(), self._told, strict=True)],
            "round_losses": [loss.item() for loss in self._round_losses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After the clock's."""
        step, seconds, data, *images = state["logged"]
        now = self._engine.local_steps.step
        seen = state.get("images_seen", now * self._batch) - (now - step) * self._batch  # an older checkpoint's
        self._logged = (step, seconds, data, images[0] if images else seen)
        if state["ranks"] == dist.get_world_size():  # else they are rank 0's of other batches
            self._losses, self._round_losses = (
                [torch.tensor(loss, device=self._engine.device) for loss in state.get(name, ())]
                for name in ("losses", "round_losses")
            )
        since = state.get("since_told", (0.0, 0.0, 0.0))
        self._told = tuple(value - before for value, before in zip(self._seconds(), since, strict=True))

    def add_loss(self, loss: Tensor) -> None:
        """Of one micro-batch; nothing waits for the device here."""
        self._losses.append(loss)
        self._round_losses.append(loss)

    def log(self, *, images_seen: int, skipped_samples: int, **known: Any) -> float:
        """Tell a record, with the fields of Record that others know. Returns the mean loss since the last one."""
        loss = torch.stack(self._losses).mean().item()  # waits for the device, so the times below are true
        self._losses.clear()
        state = self._engine.local_steps
        _, seconds, waited, images = self._logged
        so_far = self.so_far(images_seen)
        self._logged = (state.step, self._clock.training(), self._clock.data, images_seen)
        elapsed = max(1e-9, self._logged[1] - seconds)
        self._monitor.log(
            Record(
                **known,
                **so_far,
                step=state.step,
                loss=loss,
                images_per_second=(images_seen - images) / elapsed,
                data_percent=100 * (self._clock.data - waited) / elapsed,
                skipped_samples=skipped_samples,
                relative_distance=state.relative_distance,
                skipped_steps=state.costs.skipped_steps_of_all_workers,
                left_out=sum(state.costs.left_out.values()),
            )
        )
        return loss

    def log_workers(self, skipped_samples: int) -> None:
        """Gather what every rank did since the last time; on a boundary."""
        state = self._engine.local_steps
        now = self._seconds()
        seconds, data, waiting = (value - before for value, before in zip(now, self._told, strict=True))
        self._told = now
        loss = torch.stack(self._round_losses).mean().item()
        self._round_losses.clear()
        mine = torch.tensor([loss, seconds, data, waiting, skipped_samples], dtype=torch.float64)
        mine = mine.to(self._engine.device)
        told = torch.empty(dist.get_world_size() * len(mine), dtype=mine.dtype, device=mine.device)
        all_gather_flat(told, mine)
        ranks = told.cpu().view(-1, state.qsr.worker_size, len(mine))  # (worker, rank of the worker, figure)
        losses, passed, waited_for_data, waited, _ = ranks.mean(1).T.tolist()
        self._monitor.log_workers(
            WorkersRecord(
                step=state.step,
                seconds=passed,
                loss=losses,
                seconds_data=waited_for_data,
                seconds_waiting=waited if state.costs.seconds_waiting else None,
                skipped_samples=[round(count) for count in ranks[:, :, -1].sum(1).tolist()],
            )
        )

    def so_far(self, images_seen: int) -> dict[str, Any]:
        """What the run has cost."""
        state, averaging = self._engine.local_steps, self._engine.seconds_averaging
        training = self._clock.training()
        return {
            "images_seen": images_seen,
            "averagings": state.averagings,
            "bytes_sent": state.bytes_sent,
            "communication_percent": 100 * state.bytes_sent / max(1, state.costs.parallel_bytes_so_far),
            "seconds_compute": training - self._clock.data - (averaging or 0.0),
            "seconds_averaging": averaging,
            "seconds_data": self._clock.data,
        }

    def _seconds(self) -> tuple[float, float, float]:
        """Of training, of waiting for data, and of waiting for others at boundaries."""
        return self._clock.training(), self._clock.data, self._engine.local_steps.costs.seconds_waiting
