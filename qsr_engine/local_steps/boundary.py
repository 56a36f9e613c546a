"""What happens at a boundary: headers are exchanged, then parameters, buffers and optimizer state are averaged.

With `averaging.overlap` a boundary begins an averaging, and something else ends it:

    next_forward   begins at the boundary; the model's reads wait; ended before the next update. The same numbers.
    delayed        begins with the next forward, from a snapshot; delay_steps later, or at the next boundary if that is
                   earlier, (average - snapshot) is added. Another algorithm: what a worker does in these steps does not
                   know the average yet. Sources: DaSGD (Zhou et al., arXiv 2006.00441), CO2 (Sun et al., ICLR 2024),
                   Streaming DiLoCo (Douillard et al., arXiv 2501.18512).

`wait()` ends either at once, so that the parameters are the average; an evaluation or a checkpoint asks for it, and the
last boundary of the run does it itself.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from qsr_engine.averaging import NOBODY, Averager, CollectiveError, LeftOut
from qsr_engine.local_steps.averaged import Averaged, Buffers, OptimizerState
from qsr_engine.local_steps.costs import Costs
from qsr_engine.local_steps.header import Header, exchange_headers, not_finite
from qsr_engine.local_steps.rounds import Rounds
from qsr_engine.membership.watchdog import LostRankError, Watchdog

log = logging.getLogger(__name__)


class Boundary:
    """The averager of a rank, and the averaging that is under way.

    Args:
        rounds: where the run stands.
        digest: of the configuration; it travels in the header.
    """

    def __init__(
        self, rounds: Rounds, costs: Costs, averager: Averager, replica: Averaged, digest: int, watchdog: Watchdog
    ) -> None:
        self.averager = averager
        self._rounds, self._costs, self._replica = rounds, costs, replica
        self._digest, self._watchdog = digest, watchdog
        self._qsr = qsr = rounds.qsr
        self.buffers = Buffers(replica, average=qsr.averaging.buffers == "average", worker_size=qsr.worker_size)
        self._optimizer_state = OptimizerState(replica, qsr.averaging, averager.group)
        self.asked_to_stop = False  # some rank was, as told at the last boundary
        self._distance: torch.Tensor | None = None
        self._squares: list[float] = []  # of the parameters of every rank, before the averaging that is under way
        self._left_out: LeftOut = NOBODY  # of that averaging
        self._due = False  # a delayed averaging that begins with the next forward
        self._apply_at: int | None = None  # the step after which a delayed averaging takes effect

    @property
    def relative_distance(self) -> float | None:
        """Distance of the workers from their average, at the last averaging that has ended; None before the first."""
        return None if self._distance is None else self._distance.item()

    def average(self) -> None:
        """Average, or begin to, at the end of a round of local steps.

        Raises:
            BoundaryError: on every rank, as exchange_headers() says; nothing was averaged.
            CollectiveError: a collective failed or timed out; LostRankError, which is one, where ranks are lost.
        """
        if self.averager.device.type == "cuda":
            torch.cuda.synchronize()  # so that steps still under way do not count as averaging
        with self._timed():
            self.averager.step = self._rounds.step
            self._left_out = left_out = self._leave_out(self._exchange_headers())
            self._costs.bytes_sent += self.averager.bytes_per_averaging
            self._costs.bytes_sent += self.buffers.average(left_out) + self._optimizer_state.average(left_out)
            self.buffers.same_everywhere()
            overlap = "none" if self._rounds.finished else self._qsr.averaging.overlap
            if overlap == "delayed":
                self._due = True
            elif overlap == "none" or not self.averager.start(left_out):
                self.averager.average(left_out)
                self._averaged()

    def _exchange_headers(self) -> list[int]:
        """Returns the workers that are to be left out."""
        header, arrived = self._header(), time.perf_counter()
        size, leave_out = self._qsr.worker_size, self._qsr.faults.not_finite == "leave_out"
        headers = exchange_headers(header, self.averager.device, leave_out=leave_out, worker_size=size)
        self._costs.seconds_waiting += time.perf_counter() - arrived
        self.asked_to_stop = any(header.stop for header in headers)
        self._costs.skipped_steps_of_all_workers = sum(header.skipped for header in headers) // size
        self._squares = [header.sum_of_squares for header in headers]
        return not_finite(headers, size)

    def _header(self) -> Header:
        squares, moved = self.averager.sum_of_squares(), self.averager.moved()
        if self.buffers.have_diverged():  # they would spread, though the parameters are finite
            squares = math.nan
        rounds, asked = self._rounds, int(self._watchdog.halt.requested)
        skipped = self._costs.skipped_steps
        return Header(rounds.step, rounds.period, rounds.learning_rate, self._digest, squares, moved, skipped, asked)

    def _leave_out(self, workers: list[int]) -> LeftOut:
        """Leave workers out of the averaging that begins; it gives them the mean of the others."""
        left_out = self.averager.left_out(workers)
        if not workers:
            return left_out
        self._costs.leave_out(workers)
        if dist.get_rank() == 0:
            log.warning(
                "after step %d (round %d) the parameters of worker %s, or its buffers, are not finite: left out of the "
                "average, and given that of the other %d, with the mean of their optimizer states",
                self._rounds.step,
                self._rounds.round,
                ", ".join(map(str, workers)),
                self.averager.workers - len(workers),
            )
        return left_out

    def _averaged(self) -> None:
        self._distance = self.averager.relative_distance(self._squares, self._left_out)
        self._replica.refresh()

    def begin_forward(self) -> None:
        """A forward in training begins."""
        if self._due:
            with self._timed():
                self._due = False
                self._apply_at = self._rounds.step + (self._qsr.averaging.delay_steps or 1)
                self.averager.snapshot()
        else:
            self.averager.begin_forward()

    def begin_update(self) -> None:
        """The optimizer is about to change the parameters. Raises CollectiveError: the averaging failed."""
        if self._due:  # no forward was seen; the parameters are still those of the boundary
            self.begin_forward()
        self.finish()

    def stepped(self, *, at_the_end: bool) -> None:
        """A step has been taken: add a delayed average where it is due, at the latest at the end of the round."""
        self.buffers.changed()
        if self._apply_at is not None and (self._rounds.step == self._apply_at or at_the_end):
            with self._timed():
                self._apply_at = None
                self.averager.apply()
                self._averaged()

    def finish(self) -> None:
        """End an averaging that runs behind the forward. Only this rank waits. Raises CollectiveError: it failed."""
        self._watchdog.moved()
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
        if self._apply_at is not None and not self._rounds.on_boundary:
            raise RuntimeError(
                f"step {self._rounds.step} is inside a round, and the average of its first step takes effect after "
                f"step {self._apply_at}; call wait() on a boundary, when engine.step() has returned True"
            )
        if self._due or self._apply_at is not None:
            with self._timed():
                self.averager.finish()  # a snapshot's; no update has followed it
                self._due, self._apply_at = False, None
                self.averager.average()
                self._averaged()

    def abandon(self, relative_distance: float | None) -> None:
        """What is under way belongs to a run that is left; another one was loaded."""
        self.averager.finish()
        self._due, self._apply_at = False, None
        self.buffers.same_everywhere()
        distance = relative_distance
        self._distance = None if distance is None else torch.tensor(distance, dtype=torch.float64)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Seconds that the steps wait for averaging; a failure says at which step."""
        started = time.perf_counter()
        try:
            with self._watchdog.explained():
                yield
        except LostRankError:
            raise
        except CollectiveError as error:
            if str(error).startswith("after step"):
                raise
            raise CollectiveError(f"after step {self._rounds.step}: {error}") from error
        self._costs.seconds_averaging += time.perf_counter() - started
