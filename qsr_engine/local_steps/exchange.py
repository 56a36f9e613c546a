"""What members exchange at a boundary: their mean, in copies, and what goes to those who join. One rank's part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import Averager, CollectiveError, ring_bytes
from qsr_engine.averaging.errors import Group
from qsr_engine.averaging.tentative import Tentative
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.local_steps.averaged import Averaged, Buffers
from qsr_engine.local_steps.costs import Costs
from qsr_engine.local_steps.joining import Handover
from qsr_engine.membership.members import Plan
from qsr_engine.membership.quorum import Members


class Exchange:
    """The mean of parameters, buffers and averaged optimizer state, which put() makes what this rank holds.

    Args:
        replica: what else belongs to the parameters, in the averager's buckets.
        everybody: the ranks of this worker.
    """

    def __init__(
        self,
        qsr: QSRConfig,
        costs: Costs,
        averager: Averager,
        replica: Averaged,
        buffers: Buffers,
        members: Members,
        everybody: Group,
    ) -> None:
        self._qsr, self._costs, self._averager = qsr, costs, averager
        self._replica, self._buffers, self._members, self._everybody = replica, buffers, members, everybody
        self._handover = Handover(replica, averager, qsr.on_other_workers)
        self._grace = qsr.membership.grace_seconds is not None
        self._parameters = Tentative(averager.buckets, movement=self._grace)
        self._rest: Tentative | None = None  # of the exchange that was made last
        self._exact: list[tuple[Tensor, Tensor]] = []  # (its mean, the buffer)

    def run(self, key: str, found: Plan, name: str) -> str | None:
        """Why it failed on a rank of this worker; None where all have the mean. What they hold is as it was, unless
        they join.

        Args:
            key: of the quorum. name: of this worker.
        """
        names = tuple(one.name for one in found.members)
        groups = {one.group for one in found.members}
        usable = groups.pop() if len(groups) == 1 else ""
        first = next(one.name for one in found.members if one.name in found.giving)
        gives, late, giving = name in found.giving, name in found.late, len(found.giving)
        together = giving + len(found.late)
        self._exact = self._buffers.inside_mean() if found.source.joined else []  # before a rank of the worker may fail
        why = ""
        try:
            group = self._members.group(key, names, found.source.store, usable)
            adds = len(found.late) if name == first else 0
            self._parameters.average(group, together, gives=gives, late=late, adds=adds)
            due = self._qsr.averaging.states_due(found.source.position["round"]) if found.source.joined else []
            self._average_the_rest(group, together, due, gives=gives or late)
            if giving < len(names):
                joining = len(names) - together
                self._handover.run(group, names.index(first), giving, gives=gives, late=late, joining=joining)
        except CollectiveError as error:
            why = str(error).splitlines()[0]
        if not self._members.agree(not why):
            self._members.forget_group()
            return why or "on another rank of this worker"
        self._costs.bytes_sent += ring_bytes(self._parameters.nbytes, len(names)) * self._qsr.worker_size
        return None

    def _average_the_rest(self, group: dist.ProcessGroup, giving: int, due: list[str], *, gives: bool) -> None:
        """Buffers, in fp64, and the optimizer's state that is due; at the start nobody has any."""
        state = [value for name in due for value in self._replica.state_to_average(name)]
        self._rest = Tentative([value for value, _ in self._exact] + state)
        self._rest.average(group, giving, gives=gives)

    @torch.no_grad()
    def put(self, units: float | None) -> None:
        """It counts: this rank holds what all members hold.

        Args:
            units: how long the round is that ends, in units of outer.unit_steps; None at the start of the run.
        """
        assert self._rest is not None, "run() comes first"
        self._parameters.put()
        self._rest.put()
        for value, buffer in self._exact:
            buffer.copy_(value)
        if units is not None:
            self._averager.round_lasted(units)
            self._averager.average()  # of this worker alone, for the outer optimizer: it moves on from the mean
        if self._grace:
            self._parameters.begin()
        self._replica.refresh()
        self._buffers.same_everywhere()
        self._rest, self._exact = None, []

    def relative_distance(self, before: float, giving: int) -> Tensor:
        """How far the members were from their average, as averaging.distance.Squares tells it.

        Args:
            before: sum of squares of what all ranks of the members held who gave. giving: how many these were.
        """
        after = self._parameters.sum_of_squares()
        if self._qsr.worker_size > 1:
            after = after.to(self._averager.device)
            dist.all_reduce(after, group=self._everybody)
        return torch.where(after > 0, (before / (after * giving) - 1).clamp(min=0).sqrt(), 0.0)
