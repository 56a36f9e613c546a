"""A boundary of members: workers that come and go, and agree at each boundary on who is there (membership.members).

    ask           for a quorum; wait until enough are there
    exchange      the mean of what the members hold, in copies; who joins gets it too, with all else that members hold
    ask again     did all who are still there get it? Then it counts: copies take the place of the parameters
                  else exchange again, with what each held before, among those who are there now

With membership.grace_seconds the others go on without a member that is late. It keeps what it has done, and asks until
they come to their next boundary: its movement, x - what its own round began with, goes into that average. This is
another algorithm than the paper's: the movement comes from an older average. Sources: EDiT (Cheng et al., arXiv
2412.07210), Decoupled DiLoCo (Douillard et al., arXiv 2604.21428); that momentum and delay go badly together: Liu et
al., arXiv 2401.09135.

Between boundaries nothing crosses workers, and nothing is known of the others.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import Averager, CollectiveError
from qsr_engine.averaging.errors import Group
from qsr_engine.config.units import counted
from qsr_engine.local_steps.averaged import Averaged, Buffers
from qsr_engine.local_steps.costs import Costs
from qsr_engine.local_steps.exchange import Exchange
from qsr_engine.local_steps.header import BoundaryError
from qsr_engine.local_steps.rounds import Rounds
from qsr_engine.membership.members import Plan, Telling, leaving, plan
from qsr_engine.membership.quorum import Members

log = logging.getLogger(__name__)

_MOST_FAILURES = 3  # of exchanges with who joins, who might be what makes them fail
_POLL = 0.3  # seconds between quorums of those who wait for others
_SOON = 0.02  # likewise, where a grace is nearly over


class Loop:
    """What the loop that trains adds to a worker's part: facts that must be the same, and a state that who joins takes.

    As it stands it adds nothing.
    """

    def facts(self) -> dict[str, str]:
        """What must be the same on all members, in short, by what it is a fact of."""
        return {}

    def state(self) -> dict[str, Any]:
        """Plain values, which a member tells the others at a boundary."""
        return {}

    def take(self, state: dict[str, Any]) -> None:
        """Go on with the state() of a member that this worker joins."""

    def counted(self, source: dict[str, Any], given: list[dict[str, Any]]) -> None:
        """An average counts; called after take().

        Args:
            source: the state() of a member that stood at its boundary. given: of all whose work is in it.
        """


class JoinError(BoundaryError):
    """This worker cannot join the run: its recipe, model, data, versions or size are others than the members'."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where this worker stands among the members, after a boundary.

    names: of all members, in their order. place: of this one. recorder: whether it writes the records of the run.
    """

    names: tuple[str, ...] = ()
    place: int = 0
    recorder: bool = False


class MemberBoundary:
    """This rank's part in the boundaries of a worker that may lose others, or join them.

    Args:
        averager, replica, buffers, everybody: as Exchange has them.
        moved: called while others are waited for. asked: whether this rank was asked to stop.
    """

    def __init__(
        self,
        rounds: Rounds,
        costs: Costs,
        averager: Averager,
        replica: Averaged,
        buffers: Buffers,
        members: Members,
        everybody: Group,
        moved: Callable[[], None],
        asked: Callable[[], bool],
    ) -> None:
        self._asked = asked
        self._rounds, self._costs, self._qsr = rounds, costs, rounds.qsr
        self.members, self._moved = members, moved
        self._exchange = Exchange(rounds.qsr, costs, averager, replica, buffers, members, everybody)
        self._loop = Loop()
        self.joined = False
        self.begun = False  # with the first step of all, and did not join others
        self.stops = False  # this worker, here; the others go on without it, or stop too
        self._grace = rounds.qsr.membership.grace_seconds
        self._stood = ""  # the exchange after which it stands
        self._counted: tuple[str, ...] = ()  # as Telling has them
        self._missing: set[str] = set()  # who was not there at a boundary, and beat
        self._told_wait = False
        self.standing = Standing()
        self.events: list[dict[str, Any]] = []  # of the run, for whoever records them, and empties this
        self.repeated = 0  # exchanges that failed
        self._living: frozenset[str] = frozenset()  # as Quorum has it
        self._waited = 0.0

    def join(self, loop: Loop | None = None) -> None:
        """Take part, before the first step: begin with all others, or get what members hold at their next boundary.

        Raises:
            JoinError: the members run something else.
        """
        if not self.joined:
            self._loop = loop or self._loop
            self._meet(self._telling(finite=True, squares=0.0, expected=self.members.expected))

    def average(self, *, squares: float, finite: bool, skipped: int, stop: bool) -> tuple[bool, Tensor | None]:
        """Average with whoever is there; the parameters are then the same on all members.

        Args:
            squares: sum of squares of what all ranks of this worker hold. finite: whether it is, and the buffers are.
        Returns:
            (Whether this worker fell behind and took over what members hold, at their step; how far the members were
            from their average, None where it is not known: somebody was late, or died after it).
        Raises:
            BoundaryError: on every member, if parameters are not finite, and faults.not_finite says stop.
        """
        telling = self._telling(finite=finite, squares=squares, skipped=skipped, stop=stop)
        found = self._meet(telling)
        took_over = telling.name not in found.giving
        before = sum(one.squares for one in found.members if one.name in found.giving)
        known = not found.late and all(name in {one.name for one in found.members} for name in found.giving)
        return took_over, self._exchange.relative_distance(before, len(found.giving)) if known else None

    def seconds_waited(self) -> float:
        """For the others to come, since this was last called."""
        waited, self._waited = self._waited, 0.0
        return waited

    # --------------------------------------------------------------------------------------------------- a meeting

    def _telling(self, *, finite: bool, squares: float, expected: int = 1, **more: Any) -> Telling:
        members, counted = self.members, self._costs
        counts = {name: getattr(counted, name) for name in _COUNTS}
        return Telling(
            members.name,
            members.address,
            self._rounds.step,
            self.joined,
            {**members.facts, **self._loop.facts()},
            group=members.usable,
            finite=finite,
            squares=squares if finite else 0.0,
            expected=expected,
            launch=members.launch,
            recorder=self.standing.recorder,
            position={**self._rounds.state_dict(), **counts},
            loop=self._loop.state(),
            stood=self._stood,
            of=len(self.standing.names),
            counted=self._counted,
            **more,
        )

    def _meet(self, telling: Telling) -> Plan:
        """Ask and exchange until an exchange counts in which this worker took part."""
        patience, last, said, failed = time.monotonic() + self.members.patience, None, "", 0
        began = time.monotonic()
        while True:
            asked = time.monotonic()
            over = self._grace is not None and asked - began >= self._grace
            telling = dataclasses.replace(telling, stop=telling.stop or self._asked(), over=over)
            quorum = self.members.ask(telling, partial(self._while_waiting, began), self.standing.names)
            self._waited += time.monotonic() - asked
            found = plan(quorum, self.members.config.min_workers, grace=self._grace is not None)
            self._check(found, telling)
            self._living = quorum.living
            frozen = any(one.frozen for one in quorum.there if one.name == telling.name)
            telling = dataclasses.replace(telling, frozen=frozen)
            if found.what == "commit" and telling.name in {one.name for one in found.members}:
                assert last is not None
                self._commit(last, found, telling)
                return dataclasses.replace(last, members=found.members)
            if found.what == "commit":
                telling = self._behind(telling, found.attempt)
            elif found.what == "wait":
                if found.why and found.why != said:
                    said = found.why
                    self._say("step %d: %s", telling.step, found.why)
                rest = _POLL if self._grace is None or telling.over else began + self._grace - time.monotonic()
                time.sleep(min(_POLL, max(_SOON, rest)))
                telling = dataclasses.replace(telling, impatient=time.monotonic() > patience)
            else:
                last = found
                why = self._exchange.run(quorum.key, found, telling.name)
                failed = self._note_failure(found, why, failed + 1) if why else 0
                usable = self.members.usable
                telling = dataclasses.replace(telling, attempt=quorum.key, done=not why, group=usable)

    def _note_failure(self, found: Plan, why: str, failed: int) -> int:
        """An exchange failed, so many times in a row. Raises CollectiveError where this worker may be the reason."""
        self.repeated += 1
        self._happened("failed", "", why=why)
        members = len(found.members)
        self._say("step %d: averaging with %d members failed, and is repeated: %s", self._rounds.step, members, why)
        if failed == _MOST_FAILURES and found.source.joined and not self.joined:
            self.members.close()
            raise CollectiveError(
                f"this worker could not join the members {failed} times in a row, and leaves them alone; what failed "
                "is said above, and also comes of a model that makes its buffers later than at the start"
            )
        return failed

    def _while_waiting(self, began: float) -> None:
        """Others are waited for, since `began` at this boundary."""
        self._moved()
        waited, grace = time.monotonic() - began, self._grace
        if grace is not None and not self._told_wait and waited > grace + self.members.config.timeout_seconds:
            self._told_wait = True
            self._say(
                "step %d: waiting for %.0f s, longer than membership.grace_seconds (%g): no more than half of those "
                "who live have come. Where that is not so, the lighthouse was started without --grace-seconds",
                self._rounds.step,
                waited,
                grace,
            )

    def _behind(self, telling: Telling, attempt: str) -> Telling:
        """The others go on without this worker, with an exchange. With grace it is late, if it took no part in that
        one; else it joins them at their next boundary."""
        if self._grace is not None and telling.joined and telling.attempt != attempt:
            what = "which was frozen, and joins them anew" if telling.frozen else "and what it did counts later"
            self._say("step %d: the members went on without this worker, %s", telling.step, what)
            return dataclasses.replace(telling, attempt="", done=False)
        if telling.joined:
            self._say("step %d: the members went on without this worker, which joins them again", telling.step)
        return dataclasses.replace(telling, joined=False, attempt="", done=False)

    def _check(self, found: Plan, telling: Telling) -> None:
        """Raises JoinError or BoundaryError."""
        others = found.source.facts
        if telling.facts != others:
            keys = sorted({*others, *telling.facts})
            lines = [
                f"  {key}: {telling.facts.get(key, 'nothing')} here, {others.get(key, 'nothing')} on the members"
                for key in keys
                if telling.facts.get(key) != others.get(key)
            ]
            self.members.close()
            raise JoinError(
                "this worker cannot join the run, which members run otherwise:\n" + "\n".join(lines) + "\n"
                "Start it with the same recipe, data, versions and worker_size, or give it another lighthouse"
            )
        bad = [one.name for one in found.members if not one.finite and one.joined]
        if found.what == "exchange" and bad and (self._qsr.faults.not_finite == "stop" or not found.giving):
            raise BoundaryError(
                f"after step {telling.step} the parameters are not finite (NaN or infinity) on {', '.join(bad)}, or "
                "the buffers that are averaged with them have become so, and nothing was averaged. A lower learning "
                "rate, a longer warm-up or gradient clipping helps against divergence"
            )

    # ------------------------------------------------------------------------------------------------- afterwards

    def _commit(self, exchanged: Plan, found: Plan, telling: Telling) -> None:
        """The exchange counts."""
        begins = not exchanged.source.joined
        at = exchanged.source.position
        self._exchange.put(None if begins else self._rounds.units_of(at["round_start"], at["step"]))
        if telling.name not in exchanged.giving:
            self._take_position(exchanged.source, begins=begins)
        gave = exchanged.giving | exchanged.late
        self._loop.counted(exchanged.source.loop, [one.loop for one in exchanged.members if one.name in gave])
        self._costs.late += len(exchanged.late)
        self._take_standing(exchanged, found, telling, begins=begins)

    def _take_position(self, source: Telling, *, begins: bool) -> None:
        """Stand where the members stand: after their last step, before the round that begins now."""
        position = dict(source.position)
        for name in _COUNTS:
            setattr(self._costs, name, position.pop(name))
        if not begins and position["step"] < self._qsr.total_steps:
            position |= {"round": position["round"] + 1, "round_start": position["step"]}
        elif not begins:
            position |= {"round_start": position["step"]}
        self._rounds.load_state_dict(position)
        self._loop.take(source.loop)

    def _take_standing(self, exchanged: Plan, found: Plan, telling: Telling, *, begins: bool) -> None:
        names, leave = tuple(one.name for one in found.members), leaving(found.members)
        self.stops = telling.name in leave
        stay = [one for one in found.members if one.name not in leave] or found.members
        recorders = [one.name for one in stay if one.recorder and one.name in exchanged.giving]
        recorders += [one.name for one in stay if one.name in exchanged.giving] + [one.name for one in stay]
        before = set(self.standing.names)
        self.begun = self.begun or begins
        self.joined = True
        if self._grace is not None:
            gave = sorted(exchanged.giving | exchanged.late)
            self._counted = tuple(name for name in (*exchanged.source.counted, *gave) if name not in names)
            self._stood = found.attempt
        self.standing = Standing(names, names.index(telling.name), recorders[0] == telling.name)
        if not before and not begins:  # this one joins now, and does not know who was there
            before = set(names) - {one.name for one in found.members if not one.joined}
        if begins and self._rounds.step:
            self._happened("resume", "")
        round_of = {one.name: one.position["round"] for one in exchanged.members}
        for name in names:
            if name in exchanged.late:
                missed = exchanged.source.position["round"] - round_of[name]
                self._happened("late", name, rounds=missed)
                late = counted(missed, "round")
                self._record("step %d: %s came %s late, and what it did is in this average", name, late)
            elif name not in before:
                self._happened("join", name)
        self._note_gone((before | self._missing) - set(names))

    def _note_gone(self, names: set[str]) -> None:
        """They were members, and are not now: lost, or, where they beat, late."""
        missing = names & self._living
        for name in sorted(names):
            if name not in missing:
                self._happened("leave", name)
            elif name not in self._missing:
                self._happened("missing", name)
                self._record("step %d: the members went on without %s, which is late", name)
        self._missing = missing

    def _happened(self, event: str, member: str, **more: Any) -> None:
        what = {"step": self._rounds.step, "event": event, "member": member}
        self.events.append({**what, "members": len(self.standing.names), **more})

    def _record(self, text: str, *values: Any) -> None:
        """A line of the run, from the member that records it."""
        if self.standing.recorder:
            self._say(text, self._rounds.step, *values)

    def _say(self, text: str, *values: Any) -> None:
        if dist.get_rank() == 0:
            log.warning(text, *values)


_COUNTS = ("averagings", "bytes_sent", "parallel_bytes_so_far", "late")  # of Costs, which who joins goes on with
