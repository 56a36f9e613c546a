"""What the ranks tell one another at a boundary before anything is averaged, and which workers that leaves out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist

from qsr_engine.averaging import Averager, LeftOut
from qsr_engine.averaging.errors import Group
from qsr_engine.local_steps.averaged import Buffers
from qsr_engine.local_steps.costs import Costs
from qsr_engine.local_steps.header import Header, Met, Purpose, exchange_headers
from qsr_engine.local_steps.rounds import Rounds
from qsr_engine.local_steps.stopwatch import Stopwatch
from qsr_engine.membership.watchdog import Watchdog

log = logging.getLogger(__name__)


class Meeting:
    """Makes this rank's header, exchanges it, and tells rounds and costs what the others said.

    Args:
        digest: of the configuration; it travels in the header.
        everybody: a group of all ranks.
    """

    def __init__(
        self,
        rounds: Rounds,
        costs: Costs,
        averager: Averager,
        buffers: Buffers,
        digest: int,
        watchdog: Watchdog,
        everybody: Group,
    ) -> None:
        self._rounds, self._costs, self._averager, self._buffers = rounds, costs, averager, buffers
        self._digest, self._watchdog, self._everybody = digest, watchdog, everybody
        self.waiting = Stopwatch(averager.device)
        self.asked_to_stop = False  # some rank was, as told at the end of the last round

    def before_averaging(
        self, purpose: Purpose, fragments: Collection[int]
    ) -> tuple[LeftOut, tuple[float, int] | None]:
        """Who is left out, and the sum of squares over so many ranks; None where it is not known.

        Workers that are left out get all parameters of the others, so then nobody may have any that are not finite.

        Raises:
            BoundaryError: on every rank, as exchange_headers() says.
        """
        qsr, everything = self._rounds.qsr, self._averager.fragments
        squares = self._squares(fragments)
        leave_out = qsr.faults.not_finite == "leave_out"
        if leave_out and (others := set(everything) - set(fragments)):
            unseen = ~self._averager.sum_of_squares(others).isfinite()
            squares = squares.masked_fill(unseen.to(squares.device), math.nan)
        with self.waiting.running():
            met = self.exchange(purpose, squares, leave_out=leave_out, worker_size=qsr.worker_size)
        self.asked_to_stop = met.stop and (self._rounds.at_end or self._rounds.on_boundary)
        self._rounds.agree(met.lr)
        self._costs.skipped_steps_of_all_workers = met.skipped // qsr.worker_size
        # Of these fragments; where all are averaged because a worker is left out, how far they were is not known.
        known = not met.left_out or len(fragments) == len(everything)
        return self._leave_out(met.left_out), (met.squares, met.ranks) if known else None

    def inside_worker(self, purpose: Purpose, agree: Callable[[bool], bool]) -> tuple[Met, bool]:
        """What the ranks of this worker tell one another, where it meets others as a member; and whether all that they
        hold is finite. `agree` tells whether something is so on all of them. Raises as exchange()."""
        squares = self._squares(self._averager.fragments)
        finite = agree(bool(squares.isfinite()))
        met = self.exchange(purpose, squares if finite else 0.0)
        self.asked_to_stop = met.stop and (self._rounds.at_end or self._rounds.on_boundary)
        return met, finite

    def _squares(self, fragments: Collection[int]) -> torch.Tensor:
        """The sum of squares of what this rank holds; NaN too where its buffers have diverged, which would spread
        though the parameters are finite."""
        squares, diverged = self._averager.sum_of_squares(fragments), self._buffers.have_diverged()
        return squares if diverged is None else squares.masked_fill(diverged.to(squares.device), math.nan)

    def exchange(self, purpose: Purpose, squares: torch.Tensor | float = 0.0, **options: Any) -> Met:
        """Raises BoundaryError on every rank, as exchange_headers() says."""
        rounds = self._rounds
        header = Header(
            rounds.step,
            rounds.period,
            rounds.learning_rate,
            self._digest,
            squares,
            self._averager.moved(),
            self._costs.skipped_steps,
            int(self._watchdog.halt.requested),
            purpose,
        )
        layout = self._buffers.layout()
        return exchange_headers(header, self._averager.device, self._everybody, buffers=layout, **options)

    def _leave_out(self, workers: list[int]) -> LeftOut:
        """Leave workers out of the averaging that begins; it gives them the mean of the others."""
        left_out = self._averager.left_out(workers)
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
                self._averager.workers - len(workers),
            )
        return left_out
