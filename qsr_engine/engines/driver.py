"""The order within a step, once for both engines.

forward       in training it may wait for parameters that are still averaged; in evaluation it waits for all
backward      the framework's
step          after the last micro-batch of a step:
                the learning rate is as it was set, and an averaging behind the forward has ended
                before the switch of `post_local` gradients are averaged over the workers
                the framework updates; an update that it skips counts as a step
                the step is counted; at the end of a round parameters are averaged
                the next learning rate is set, and a boundary is recorded
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from qsr_engine.averaging import Averager, average_packed, bucket_bytes
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.engines.learning_rate import LearningRate
from qsr_engine.engines.replica import Replica, check_state_names, make_averager
from qsr_engine.local_steps.steps import LocalSteps
from qsr_engine.membership.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank stands among the others.

    Args:
        across: the ranks that hold the same part of the parameters, one from each worker; None is not to be used.
        inside: the ranks of this rank's worker.
        worker, workers: number of this rank's worker, and how many there are, as checkpoints count them: under
            `parallel` all ranks are one.
    """

    across: dist.ProcessGroup | None
    inside: dist.ProcessGroup | None
    worker: int
    workers: int


@dataclasses.dataclass(frozen=True)
class Update:
    """What the framework did at the end of a step: it skips an update whose gradients overflow."""

    skipped: bool = False
    loss_scale: Any = None  # afterwards
    step_scheduler: Callable[[], None] | None = None  # which the framework left out with the update


class Driver:
    """Drives a framework's engine through local steps.

    Args:
        config: digest of the configuration; it travels in the boundary's header.
        device: of the model.
        parallel_bytes: that a rank sends at one step of `parallel`.
        hidden: whether the framework averages gradients beside compute, where seconds cannot be told apart.
        record: writes (tag, value) pairs of a boundary to the framework's monitor.
    """

    def __init__(
        self,
        qsr: QSRConfig,
        replica: Replica,
        place: Place,
        *,
        config: int,
        device: torch.device,
        parallel_bytes: int,
        hidden: bool,
        record: Callable[[Mapping[str, float]], None],
    ) -> None:
        check_state_names(qsr.averaging.state, replica)
        watchdog = Watchdog.of_this_run(qsr.faults.timeout_seconds, place.across)
        averager = Averager([], None)
        self._local = qsr.strategy != "parallel"  # else the framework itself averages gradients over all ranks
        if self._local:
            assert place.across is not None, "local steps average over the workers"
            assert place.inside is not None
            averager = make_averager(replica, qsr, place.across, place.inside, device)
        self.local_steps = LocalSteps(
            qsr, averager, config, replica=replica, parallel_bytes=parallel_bytes, watchdog=watchdog
        )
        self.learning_rate = LearningRate(replica.optimizer, self.local_steps)
        self.place = place
        self.replica = replica
        self._hidden, self._record = hidden, record

    def begin_forward(self, *, training: bool) -> None:
        """The model's forward begins. Raises LostRankError."""
        if training:
            self.local_steps.begin_forward()
        else:
            self.local_steps.finish()

    def begin_evaluation(self) -> None:
        """The model is put into evaluation."""
        self.local_steps.finish()

    def step(self, *, last: bool, update: Callable[[], Update | None]) -> bool:
        """A micro-batch has ended.

        Args:
            last: whether it is the last one of its step.
            update: the framework's own step; None says that no step was taken.
        Returns:
            True at a boundary, False inside a round or inside gradient accumulation.
        Raises:
            BoundaryError: on every rank, as local_steps.header.exchange_headers() says; nothing was averaged.
            RuntimeError: the run has taken its total_steps already, or something else than qsr.lr set the learning
                rate; nothing was changed.
        """
        state = self.local_steps
        state.rounds.check_unfinished()
        if last:
            self.learning_rate.check()
            state.begin_update()
            if self._local and state.mode == "parallel":
                self._average_gradients()
        done = update()
        if done is None:
            return False
        if done.skipped:
            self._note_skipped(done)
        boundary = state.advance()
        self.learning_rate.set()
        if boundary:
            self._record({f"Train/LocalSteps/{name}": value for name, value in state.figures().items()})
        return boundary

    def _average_gradients(self) -> None:
        """Average over the workers what the framework reduced inside this one; the first phase of `post_local`."""
        with self.timed():
            across, bucket_mb = self.place.across, self.local_steps.qsr.averaging.bucket_mb
            average_packed(self.replica.gradients(), across, bucket_bytes(bucket_mb, across))
            self.replica.gradients_changed()

    def _note_skipped(self, update: Update) -> None:
        """The gradients overflowed on this worker, and the framework left out the update and the scheduler's step.

        The step counts here as on the other workers, so the scheduler takes it too: else the workers' learning rates
        would differ from now on, and with them their periods. Under the strategy `parallel` all ranks skip alike, and
        the framework's own way is left.
        """
        costs = self.local_steps.costs
        costs.skipped_steps += 1
        if not self._local:
            costs.skipped_steps_of_all_workers = costs.skipped_steps
            return
        if update.step_scheduler is not None:
            update.step_scheduler()
        if dist.get_rank(self.place.inside) == 0:
            log.warning(
                "step %d: the gradients of worker %d overflowed, so it skipped the update; the step counts (skipped so "
                "far: %d; loss scale now: %s)",
                self.local_steps.step,
                self.place.worker,
                costs.skipped_steps,
                update.loss_scale,
            )

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """What happens inside counts as averaging, where the clock can tell."""
        started = time.perf_counter()
        yield
        self.local_steps.costs.seconds_averaging += time.perf_counter() - started

    @property
    def seconds_averaging(self) -> float | None:
        return None if self._hidden else self.local_steps.costs.seconds_averaging

    def close(self) -> None:
        """Call it before the process group is destroyed."""
        self.local_steps.watchdog.close()
        self.local_steps.averager.close()
