"""The state machine of a round: it counts steps, asks the rule for the period, and averages at the boundary.

    begin a round          H = period(step, lr of this step)
    H optimizer steps      of the worker's own optimizer; no communication between workers
    boundary               headers exchanged, parameters averaged; the next round begins

For every optimizer step (not micro-batch) an engine calls `begin_forward()` before the forward, `begin_update()` before
its optimizer changes the parameters, and `advance()` after it. In a `parallel` round the engine averages the gradients
itself, and its boundary exchanges nothing. Strategies that change mode during a run follow from the schedule: `mode`
says what the current step is.

With `averaging.overlap` a boundary begins an averaging, and something else ends it:

    next_forward   begins in advance(); the model's reads wait; ended by begin_update(). The same numbers.
    delayed        begins in begin_forward(), from a snapshot; delay_steps later, or at the next boundary if that is
                   earlier, advance() adds (average - snapshot). Another algorithm: what a worker does in these steps
                   does not know the average yet. Sources: DaSGD (Zhou et al., arXiv 2006.00441), CO2 (Sun et al.,
                   ICLR 2024), Streaming DiLoCo (Douillard et al., arXiv 2501.18512).

`wait()` ends either at once, so that the parameters are the average; an evaluation or a checkpoint asks for it, and the
last boundary of the run does it itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from qsr_engine.averaging import (
    NOBODY,
    Averager,
    CollectiveError,
    LeftOut,
    average_in_place,
    average_packed,
    bucket_bytes,
)
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.local_steps.header import Header, exchange_headers, not_finite
from qsr_engine.membership.watchdog import Liveness, LostRankError
from qsr_engine.schedule import Mode, Round, learning_rate, mode, period

log = logging.getLogger(__name__)


class LocalSteps:
    """Position in the run, and what its averagings cost so far.

    Args:
        qsr: the run.
        averager: the parameters, in buckets, and the group of ranks to average over.
        digest: of the configuration; it travels in the boundary header.
        optimizer_lr: reads the optimizer's learning rate; asked only where the configuration has no `lr` block.
        buffers: gives the floating-point tensors averaged beside the parameters (batch-norm statistics); a module may
            hold others at every boundary.
        optimizer_state: gives the state tensors that are averaged with the parameters; empty if the state is local.
        replace_state: called on every rank where workers are left out of an averaging; gives these the mean of the
            others' optimizer state, beside `optimizer_state`, and returns the bytes that this rank sent.
        after_averaging: called once the parameters are averaged; refreshes what derives from them.
        parallel_bytes: bytes that a rank sends at one step of `parallel`.
        liveness: tells lost ranks and requests to stop; without one, this process is by itself.
    """

    def __init__(
        self,
        qsr: QSRConfig,
        averager: Averager,
        digest: int,
        *,
        optimizer_lr: Callable[[], float],
        buffers: Callable[[], list[torch.Tensor]] = lambda: [],
        optimizer_state: Callable[[], list[torch.Tensor]] = lambda: [],
        replace_state: Callable[[LeftOut], int] = lambda left_out: 0,
        after_averaging: Callable[[], None] = lambda: None,
        parallel_bytes: int = 0,
        liveness: Liveness | None = None,
    ) -> None:
        self.qsr = qsr
        self.averager = averager
        self._optimizer_lr = optimizer_lr
        self._digest = digest
        self._buffers = buffers
        self._optimizer_state = optimizer_state
        self._replace_state = replace_state
        self._after_averaging = after_averaging
        self._parallel_bytes = parallel_bytes
        self.liveness = liveness or Liveness(None, 0, 1, None)
        self.stopping = False  # at a boundary: some rank was asked to stop, and all know it; save and exit
        self.step = 0
        self.round = 0
        self.averagings = 0
        self.bytes_sent = 0
        self.seconds_averaging = 0.0
        self.seconds_waiting = 0.0  # of these: in this process, for the last worker to come to a boundary
        self.parallel_bytes_so_far = 0  # that a rank would have sent by now under `parallel`
        self.skipped_steps = 0  # of this worker, because its gradients overflowed; they count as steps
        self.skipped_steps_of_all_workers = 0  # as told at the last boundary
        self.left_out: dict[int, int] = {}  # how often a worker was left out of an averaging, by its number
        self._distance: torch.Tensor | None = None
        self._buffers_differ = False
        self._not_finite = _count_not_finite(buffers())  # elements when the buffers were the same everywhere (a mask)
        self._headers: list[Header] = []  # of the averaging that is due or under way
        self._without: LeftOut = NOBODY  # of that averaging
        self._due = False  # a delayed averaging that begins with the next forward
        self._apply_at: int | None = None  # the step after which a delayed averaging takes effect
        self._round = self._begin()

    @property
    def period(self) -> int:
        """H of the current round; after the last step, of the last round."""
        return self._round.length

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        if self.qsr.lr is None:
            return self._optimizer_lr()
        return learning_rate(self.qsr.lr, self.step, self.qsr.total_steps)

    @property
    def finished(self) -> bool:
        return self.step >= self.qsr.total_steps

    @property
    def mode(self) -> Mode:
        """Whether the current step averages gradients (`parallel`) or is a local step."""
        return self._round.mode

    @property
    def on_boundary(self) -> bool:
        """Whether it stands between two rounds: the parameters are the same on every worker, after wait()."""
        return self.finished or self.step == self._round.start

    @property
    def relative_distance(self) -> float | None:
        """Distance of the workers from their average, at the last averaging that has ended; None before the first."""
        return None if self._distance is None else self._distance.item()

    def check_unfinished(self) -> None:
        """Raises RuntimeError if the run has taken its total_steps."""
        if self.finished:
            raise RuntimeError(
                f"the run ended at step {self.step}, which is qsr.total_steps; a longer run needs a larger total_steps "
                "from its start, since the learning rate and the last round depend on it"
            )

    def figures(self) -> dict[str, float]:
        """What a monitor shows of a boundary; the distance only where it is known."""
        figures: dict[str, float] = {
            "period": self.period,
            "averagings": self.averagings,
            "bytes_sent": self.bytes_sent,
            "skipped_steps": self.skipped_steps_of_all_workers,
            "left_out": sum(self.left_out.values()),
        }
        if self.relative_distance is not None:
            figures["relative_distance"] = self.relative_distance
        return figures

    def advance(self) -> bool:
        """Count one optimizer step; at the end of the round, average. Returns True at a boundary.

        Raises:
            BoundaryError: on every rank, as exchange_headers() says; nothing was averaged.
            CollectiveError: a collective failed or timed out; LostRankError, which is one, where ranks are lost.
            RuntimeError: the run has ended already.
        """
        self.check_unfinished()
        self.step += 1
        self.liveness.done(self.step, self.round, finished=self.finished)
        self.parallel_bytes_so_far += self._parallel_bytes
        self._buffers_differ = True
        if self.mode == "parallel":
            self.bytes_sent += self._parallel_bytes
        at_the_end = self._is_cut() or self.step == self._round.start + self._round.length
        if self._apply_at is not None and (self.step == self._apply_at or at_the_end):
            self._apply()
        if not at_the_end:
            return False
        if self.mode == "local":
            self._average()
        self.averagings += 1
        if not self.finished:
            was = self.mode
            self.round += 1
            self._round = self._begin()
            if was == "parallel" and self.mode == "local":
                self.averager.begin_local()
        return True

    def request_stop(self) -> None:
        """Ask all ranks to stop, as qsr.faults.on_signal says; `stopping` is then True at a boundary, on every rank.

        A handler of a signal may call it.
        """
        self.liveness.request_stop()

    def _is_cut(self) -> bool:
        """Whether the round ends here because the run is to stop, the same on every rank.

        Ranks that meet at every step cannot tell one another in a header. Where local steps end by themselves, the
        header of the boundary tells it.
        """
        local = self.mode == "local"
        by_itself = self.step == self._round.start + self._round.length
        if not self.liveness.stop_requested or self.finished or (local and by_itself):
            return False
        if (local and self.qsr.faults.on_signal == "finish_round") or not self.liveness.halt(self.step):
            return False
        self._round = dataclasses.replace(self._round, length=self.step - self._round.start)
        self.stopping = True
        return True

    def _begin(self) -> Round:
        return Round(self.step, period(self.qsr, self.step, self.learning_rate), mode(self.qsr, self.step))

    def _average(self) -> None:
        if self.averager.device.type == "cuda":
            torch.cuda.synchronize()  # so that steps still under way do not count as averaging
        with self._timed():
            self.averager.step = self.step
            header, arrived = self._header(), time.perf_counter()
            size, leave_out = self.qsr.worker_size, self.qsr.faults.not_finite == "leave_out"
            self._headers = exchange_headers(header, self.averager.device, leave_out=leave_out, worker_size=size)
            self.seconds_waiting += time.perf_counter() - arrived
            self.stopping = any(header.stop for header in self._headers)
            self.skipped_steps_of_all_workers = sum(h.skipped for h in self._headers) // size
            self._without = left_out = self._leave_out(not_finite(self._headers, size))
            self.bytes_sent += self.averager.bytes_per_averaging
            self.bytes_sent += self.average_buffers(left_out) + self._average_state(left_out)
            self._not_finite = _count_not_finite(self._buffers())
            overlap = "none" if self.finished else self.qsr.averaging.overlap
            if overlap == "delayed":
                self._due = True
            elif overlap == "none" or not self.averager.start(left_out):
                self.averager.average(left_out)
                self._averaged()

    def _header(self) -> Header:
        squares, moved = self.averager.sum_of_squares(), self.averager.moved()
        if _count_not_finite(self._buffers()) > self._not_finite:  # they would spread, though the parameters are finite
            squares = math.nan
        asked = int(self.liveness.stop_requested)
        rate, skipped = self.learning_rate, self.skipped_steps
        return Header(self.step, self.period, rate, self._digest, squares, moved, skipped, asked)

    def _leave_out(self, workers: list[int]) -> LeftOut:
        """Workers to leave out of the averaging that begins; it gives them the mean of the others."""
        left_out = self.averager.left_out(workers)
        if not workers:
            return left_out
        self.left_out = {**self.left_out, **{worker: self.left_out.get(worker, 0) + 1 for worker in workers}}
        if dist.get_rank() == 0:
            log.warning(
                "after step %d (round %d) the parameters of worker %s, or its buffers, are not finite: left out of the "
                "average, and given that of the other %d, with the mean of their optimizer states",
                self.step,
                self.round,
                ", ".join(map(str, workers)),
                self.averager.workers - len(workers),
            )
        return left_out

    def _average_state(self, left_out: LeftOut) -> int:
        """Average the optimizer's state that averaging.state names. Returns the bytes that this rank sent."""
        tensors, group = self._optimizer_state(), self.averager.group
        capacity = bucket_bytes(self.qsr.averaging.bucket_mb, group)
        sent = average_in_place(tensors, group, capacity, left_out) if tensors else 0
        return sent + self._replace_state(left_out) if left_out.ranks else sent

    def _averaged(self) -> None:
        squares = [header.sum_of_squares for header in self._headers]
        self._distance = self.averager.relative_distance(squares, self._without)
        self._after_averaging()

    def begin_forward(self) -> None:
        """A forward in training begins. Raises LostRankError."""
        self.liveness.begin(self.step, self.round)
        if self._due:
            with self._timed():
                self._due = False
                self._apply_at = self.step + (self.qsr.averaging.delay_steps or 1)
                self.averager.snapshot()
        else:
            self.averager.begin_forward()

    def begin_update(self) -> None:
        """The optimizer is about to change the parameters.

        The round's first step fixes H: a scheduler that steps after the engine has done so by now.

        Raises:
            CollectiveError: the averaging in the background failed.
        """
        if self.qsr.lr is None and self.step == self._round.start:
            self._round = self._begin()
        if self._due:  # no forward was seen; the parameters are still those of the boundary
            self.begin_forward()
        self.finish()

    def finish(self) -> None:
        """End an averaging that runs behind the forward. Only this rank waits.

        Raises:
            CollectiveError: the averaging failed.
        """
        self.liveness.moved()
        if self.averager.in_background and self._apply_at is None:
            with self._timed():
                self.averager.finish()
                self._averaged()

    def wait(self) -> None:
        """End the averaging that the boundary just passed began: the parameters are the average on every worker.

        Every rank must call it, on a boundary: a delayed averaging is then done at once, without delay.

        Raises:
            CollectiveError: the averaging failed.
            RuntimeError: a delayed averaging is under way inside a round.
        """
        self.finish()
        if self._apply_at is not None and not self.on_boundary:
            raise RuntimeError(
                f"step {self.step} is inside a round, and the average of its first step takes effect after step "
                f"{self._apply_at}; call wait() on a boundary, when engine.step() has returned True"
            )
        if self._due or self._apply_at is not None:
            with self._timed():
                self.averager.finish()  # a snapshot's; no update has followed it
                self._due, self._apply_at = False, None
                self.averager.average()
                self._averaged()

    def _apply(self) -> None:
        with self._timed():
            self._apply_at = None
            self.averager.apply()
            self._averaged()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Seconds that the steps wait for averaging; a failure says at which step."""
        started = time.perf_counter()
        try:
            with self.liveness.explained():
                yield
        except LostRankError:
            raise
        except CollectiveError as error:
            if str(error).startswith("after step"):
                raise
            raise CollectiveError(f"after step {self.step}: {error}") from error
        self.seconds_averaging += time.perf_counter() - started

    def average_buffers(self, left_out: LeftOut = NOBODY) -> int:
        """Average the buffers over all ranks; after a `parallel` round, an evaluation asks for it.

        Also inside a worker: its ranks average gradients, and each has seen batches of its own. In fp64, so that a
        buffer that is the same everywhere keeps its bits, also one that holds the largest number of its type (a mask).

        Args:
            left_out: the workers that are left out, of the averager's group; their ranks get the mean of the others'.
        Returns:
            Bytes that this rank sent.
        """
        buffers = self._buffers() if self._buffers_differ else []
        self._buffers_differ = False
        if not buffers:
            return 0
        exact = [buffer.to(torch.float64, copy=True) for buffer in buffers]
        sent = average_packed(exact, None, left_out=left_out.with_all_ranks(self.qsr.worker_size))
        for buffer, mean in zip(buffers, exact, strict=True):
            buffer.copy_(mean)
        return sent

    @contextlib.contextmanager
    def buffers_averaged(self) -> Iterator[None]:
        """Inside, the buffers are the average; afterwards they are as they were. Every rank must enter."""
        differ, buffers = self._buffers_differ, self._buffers()
        before = [buffer.clone() for buffer in buffers]
        self.average_buffers()
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            self._buffers_differ = differ

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on, as plain numbers; the round is part of it."""
        state = {key: getattr(self, key) for key in _STATE}
        return {**state, "round_start": self._round.start, "period": self.period, "mode": self.mode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), also from the middle of a round.

        On a boundary the next round begins by the rule of this run, which may differ from the one that was saved; so it
        does after the last step of a run, where this one is longer.

        Raises:
            ValueError: keys are missing or unknown, or the state lies outside this run.
        """
        state = {"left_out": {}, **state}  # a checkpoint of an older version has none
        expected = {*_STATE, "round_start", "period", "mode"}
        if set(state) != expected:
            raise ValueError(f"a local-step state has the keys {sorted(expected)}; found {sorted(state)}")
        if not 0 <= state["round_start"] <= state["step"] <= self.qsr.total_steps:
            raise ValueError(
                f"the state is at step {state['step']} of a round that began at step {state['round_start']}, and this "
                f"run has {self.qsr.total_steps} steps"
            )
        end = state["round_start"] + state["period"]
        if state["step"] > state["round_start"] and end > self.qsr.total_steps:
            raise ValueError(
                f"the state is inside a round that ends at step {end}, and this run has {self.qsr.total_steps} steps; "
                "go on from a state that was saved on a boundary"
            )
        self.averager.finish()
        self._due, self._apply_at = False, None  # what was under way belongs to the run that is left
        for key in _COUNTS:
            setattr(self, key, state[key])
        self._not_finite = _count_not_finite(self._buffers())
        distance = state["relative_distance"]
        self._distance = None if distance is None else torch.tensor(distance, dtype=torch.float64)
        if state["step"] in (state["round_start"], end) and not self.finished:
            self._round = self._begin()
        else:
            self._round = Round(state["round_start"], state["period"], state["mode"])


_COUNTS = (
    "step",
    "round",
    "averagings",
    "bytes_sent",
    "seconds_averaging",
    "parallel_bytes_so_far",
    "skipped_steps",
    "skipped_steps_of_all_workers",
    "left_out",
)
_STATE = (*_COUNTS, "relative_distance")


def _count_not_finite(tensors: list[torch.Tensor]) -> int:
    """Elements that are NaN or infinite; the host waits once for each device."""
    found: dict[torch.device, torch.Tensor] = {}
    for tensor in tensors:
        count = (~tensor.detach().isfinite()).sum()
        found[tensor.device] = found[tensor.device] + count if tensor.device in found else count
    return sum(int(count) for count in found.values())
