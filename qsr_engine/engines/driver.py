"""The order within a step, once for both engines.

forward       in training it may wait for parameters that are still averaged; in evaluation it waits for all. Where
              evaluate_the_average() was called, the model is the workers' average from eval() to train()
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

from qsr_engine.averaging import Averager, average_tensors, bucket_bytes, ring_bytes
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.engines.groups import OwnGroups
from qsr_engine.engines.learning_rate import LearningRate
from qsr_engine.engines.replica import Replica, check_state_names, make_averager
from qsr_engine.local_steps.member import Loop
from qsr_engine.local_steps.steps import LocalSteps
from qsr_engine.local_steps.traffic import Traffic
from qsr_engine.membership.quorum import Members
from qsr_engine.membership.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank stands among the others.

    Args:
        own: the groups of the averaging.
        worker, workers: number of this rank's worker, and how many there are, as checkpoints count them: under
            `parallel` all ranks are one, and so are those of a member.
        members: the other workers, where they come and go; None where all ranks are in one process group.
    """

    own: OwnGroups
    worker: int
    workers: int
    members: Members | None = None


@dataclasses.dataclass(frozen=True)
class Update:
    """What the framework did at the end of a step: it skips an update whose gradients overflow."""

    skipped: bool = False
    loss_scale: Any = None  # afterwards; None where nothing scales the loss
    gradient_norm: Any = None  # before it was clipped, of the unscaled gradients; None where it was not computed
    step_scheduler: Callable[[], None] | None = None  # which the framework left out with the update


class Driver:
    """Drives a framework's engine through local steps.

    Args:
        config: digest of the configuration; it travels in the boundary's header.
        device: of the model.
        parallel_bytes: that leave a worker at one step of `parallel`.
        hidden: whether the framework averages gradients beside compute, where seconds cannot be told apart.
        record: writes (tag, value) pairs of a boundary to the framework's monitor.
        stand_at: lets the engine stand after so many steps, with which it joins the other members.
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
        stand_at: Callable[[int], None],
    ) -> None:
        check_state_names(list(qsr.averaging.state_periods), replica.optimizer, replica.masters()[0].device)
        own = place.own
        watchdog = Watchdog.of_this_run(qsr.faults.timeout_seconds, own.across, own.inside, own.everybody)
        averager, traffic = Averager([], None), Traffic(parallel=parallel_bytes)
        self.place, self._device = place, device
        self._local = qsr.strategy != "parallel"  # else the framework itself averages gradients over all ranks
        if self._local:
            averager = make_averager(replica, qsr, own.across, own.inside, device)
            state = ring_bytes(sum(master.nbytes for master in replica.masters()), averager.workers)
            each = [averager.bytes_of(fragment) for fragment in averager.fragments]
            state, *each = self._of_the_worker(state, *each)
            traffic = Traffic(sum(each), state, parallel_bytes, tuple(each))
        self.local_steps = LocalSteps(
            qsr,
            averager,
            config,
            replica=replica,
            traffic=traffic,
            watchdog=watchdog,
            everybody=own.everybody,
            members=place.members,
        )
        self._member, self._stand_at = self.local_steps.boundary.member, stand_at
        self.learning_rate = LearningRate(replica.optimizer, self.local_steps)
        self.replica = replica
        self._gradient_bytes: int | None = None  # that leave the worker where gradients are averaged, once known
        self._hidden, self._record = hidden, record
        self.closed = False
        self.measuring = False  # whether the norms at the next update are asked for
        self._measured: dict[str, Any] = {}
        self._evaluates_average = False
        self._is_average = False  # the model, by averaged() or by an evaluation
        self._evaluation: contextlib.ExitStack | None = None  # in which the model is the average

    def begin_forward(self, *, training: bool) -> None:
        """The model's forward begins. Raises LostRankError."""
        if training:
            self.join()
            self.end_evaluation()  # some loops set `training` themselves, and call no train()
            self.local_steps.begin_forward()
        else:
            self.local_steps.finish()

    def join(self, loop: Loop | None = None) -> None:
        """Where workers come and go, take part, if this one does not yet. Raises as MemberBoundary.join()."""
        if self._member is not None and not self._member.joined:
            with self.own_parameters("join()"), self.local_steps.watchdog.busy():
                self._member.join(loop)
            self._stand_at(self.local_steps.step)

    def evaluate_the_average(self) -> None:
        """From now on begin_evaluation() enters LocalSteps.averaged(), and every rank must call it."""
        self._evaluates_average = True

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """As LocalSteps.averaged(); where the model is the average already, nothing is done."""
        if self._is_average:
            yield
            return
        with self.local_steps.averaged():
            self._is_average = True
            try:
                yield
            finally:
                self._is_average = False

    def begin_evaluation(self) -> None:
        """The model is put into evaluation. Again is harmless."""
        self.local_steps.finish()
        if self._evaluates_average and not self._is_average:
            with contextlib.ExitStack() as entered:
                entered.enter_context(self.averaged())
                self._evaluation = entered.pop_all()

    def end_evaluation(self) -> bool:
        """The model is put into training: it is this worker's own again. Returns whether it was the average."""
        if self._evaluation is None:
            return False
        evaluation, self._evaluation = self._evaluation, None
        evaluation.close()
        return True

    def check_own(self, what: str) -> None:
        """Raises RuntimeError where the model is the workers' average; `what` needs a worker's own parameters."""
        if self._is_average:
            raise RuntimeError(
                f"{what} inside `with engine.averaged():`, where no worker has its own parameters; call it after the "
                "block, or, in an evaluation, after train() of the model"
            )

    @contextlib.contextmanager
    def own_parameters(self, what: str) -> Iterator[None]:
        """Inside, an evaluation under way is interrupted; every rank must enter.

        Raises:
            RuntimeError: the caller has entered averaged(); `what` is to be done outside of it.
        """
        interrupted = self.end_evaluation()
        self.check_own(what)
        yield
        if interrupted:
            self.begin_evaluation()

    def step(self, *, last: bool, update: Callable[[], Update | None]) -> bool:
        """A micro-batch has ended.

        Args:
            last: whether it is the last one of its step.
            update: the framework's own step; None says that no step was taken.
        Returns:
            True at the end of a round, False inside one or inside gradient accumulation.
        Raises:
            BoundaryError: on every rank, as local_steps.header.exchange_headers() says; nothing was averaged.
            RuntimeError: the run has taken its total_steps already, the model is the average, or something else than
                qsr.lr set the learning rate; nothing was changed.
        """
        state = self.local_steps
        state.rounds.check_unfinished()
        if self._is_average:
            raise RuntimeError(
                f"step {state.step}: the model is the workers' average, for an evaluation, and would lose an update; "
                "leave engine.averaged(), or call train() of the model, before the forward"
            )
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
        self._measure(done)
        step = state.step + 1
        boundary = state.advance()
        if state.step != step:  # it was behind the other members, and stands where they do
            self._stand_at(state.step)
        self.learning_rate.set()
        if boundary:
            self._record_boundary()
        return boundary

    def measure_next_step(self) -> None:
        """The norms of the next update are asked for."""
        self.measuring = True

    def _measure(self, update: Update) -> None:
        """Between the update and an averaging, when nothing else changes the masters. No collective crosses workers."""
        self._measured = {"loss_scale": update.loss_scale}
        if self.measuring:
            self.measuring = False
            self._measured |= {"gradient_norm": update.gradient_norm, **self.replica.norms()}

    def measured(self) -> dict[str, float]:
        """As Surface.measured()."""
        return {name: float(value) for name, value in self._measured.items() if value is not None}

    def end_round(self) -> bool:
        """All ranks: average now. Returns whether a round was ended. Raises as LocalSteps.end_round()."""
        with self.own_parameters("end_round()"):
            ended = self.local_steps.end_round()
        if ended:
            self.learning_rate.set()
            self._record_boundary()
        return ended

    def _record_boundary(self) -> None:
        self._record({f"Train/LocalSteps/{name}": value for name, value in self.local_steps.figures().items()})

    def _average_gradients(self) -> None:
        """Average over the workers what the framework reduced inside this one; the first phase of `post_local`."""
        with self.timed():
            across, bucket_mb = self.place.own.across, self.local_steps.qsr.averaging.bucket_mb
            sent = average_tensors(self.replica.gradients(), across, bucket_bytes(bucket_mb, across))
            self.replica.gradients_changed()
            if self._gradient_bytes is None:
                (self._gradient_bytes,) = self._of_the_worker(sent)
        self.local_steps.costs.bytes_sent += self._gradient_bytes

    def _of_the_worker(self, *sent: int) -> list[int]:
        """Sums over the ranks of this one's worker, which may hold parts of several sizes; all of them call it."""
        if dist.get_world_size(self.place.own.inside) == 1:
            return list(sent)
        total = torch.tensor(sent, dtype=torch.int64, device=self._device)
        dist.all_reduce(total, group=self.place.own.inside)
        return [int(value) for value in total.tolist()]

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
        if dist.get_rank(self.place.own.inside) == 0:
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
        self.closed = True
        self._evaluation = None  # nobody reads the model any more
        self.local_steps.watchdog.close()
        if self.place.members is not None:
            self.place.members.close()
        self.local_steps.averager.close()
