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
from qsr_engine.local_steps.outliers import Outliers
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
        outlier = rounds.qsr.faults.outlier
        self.outliers = Outliers(outlier) if outlier is not None else None
        # Which workers are left out, and get all parameters of the others, is known after the exchange only.
        self._leaves_out = rounds.qsr.faults.not_finite == "leave_out"
        self._may_leave_out = self._leaves_out or (outlier is not None and outlier.then == "leave_out")

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
        if self._may_leave_out and (others := set(everything) - set(fragments)):
            unseen = ~self._averager.sum_of_squares(others).isfinite()
            squares = squares.masked_fill(unseen.to(squares.device), math.nan)
        movement = self._averager.movement.squares(fragments) if self._averager.movement is not None else None
        told: dict[str, Any] = {"leave_out": self._leaves_out, "worker_size": qsr.worker_size, "movement": movement}
        with self.waiting.running():
            met = self.exchange(purpose, squares, **told)
        self.asked_to_stop = met.stop and (self._rounds.at_end or self._rounds.on_boundary)
        self._rounds.agree(met.lr)
        self._costs.skipped_steps_of_all_workers = met.skipped // qsr.worker_size
        far = self._judge(met, fragments)
        gone = sorted([*met.left_out, *(far if self._outlier_is("leave_out") else ())])
        if met.left_out:
            self._tell_left_out("the parameters of worker %s, or its buffers, are not finite", met.left_out, gone)
        # Of these fragments; where all are averaged because a worker is left out, how far they were is not known. Nor
        # is it where there are outliers, which these squares are of.
        known = not far and (not gone or len(fragments) == len(everything))
        return self._averager.left_out(gone), (met.squares, met.ranks) if known else None

    def _outlier_is(self, then: str) -> bool:
        outlier = self._rounds.qsr.faults.outlier
        return outlier is not None and outlier.then == then

    def _judge(self, met: Met, fragments: Collection[int]) -> dict[int, float]:
        """The outliers among the workers that are not left out already, and the share of its movement that is none.

        Where outliers are clipped, one here has done so by now.
        """
        if self.outliers is None:
            return {}
        far = self.outliers.judge(met.movements, met.left_out)
        if far and self._outlier_is("leave_out"):
            gone = [*met.left_out, *far]
            self._tell_left_out("worker %s moved too far for one among the others", list(far), gone)
        elif far:
            self._costs.clip(list(far))
            here = dist.get_rank(self._averager.group)
            if here in far and self._averager.movement is not None:
                self._averager.movement.hold_back(far[here], fragments)
            shares = ", ".join(f"{worker} to {100 * share:.3g} %" for worker, share in far.items())
            self._warn("workers moved too far for ones among the others, and their movement was clipped: %s", shares)
        return far

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

    def _tell_left_out(self, what: str, workers: list[int], gone: Collection[int]) -> None:
        """Workers are left out of the averaging that begins; it gives them the mean of the others.

        Args:
            gone: all who are.
        """
        self._costs.leave_out(workers)
        others = self._averager.workers - len(gone)
        self._warn(
            f"{what}: left out of the average, and given that of the other %d, with the mean of their optimizer states",
            ", ".join(map(str, workers)),
            others,
        )

    def _warn(self, what: str, *values: object) -> None:
        """On rank 0."""
        if dist.get_rank() == 0:
            log.warning(f"after step %d (round %d) {what}", self._rounds.step, self._rounds.round, *values)
