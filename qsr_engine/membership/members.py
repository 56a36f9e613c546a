"""What workers that come and go decide at a boundary: a pure function of what all of them have told.

torchft's lighthouse gives everybody who asks at the same time the same *quorum*: who is there, each with its telling.
So all of them draw the same conclusion, one of

    wait        too few are there, or somebody may still come: ask again
    exchange    average over these members; who joins adds nothing, and gets what the others get
    commit      all who took part in the last exchange, and are still there, have its result: it counts

An exchange and its commit are two quorums. Who dies between them is missed by nobody: the average stands. Whoever asks
for the second one with a failure makes all of them exchange again, with what they held before.

With grace (membership.grace_seconds) members go on without those who are late. Then
    - who stood together after the last boundary goes on when more than half of them are there and the grace of one of
      these is over, or when all of them are there who live. So two parts of a run never go on from one boundary;
    - who is late gives its movement to an exchange of those who went on, once: `counted` names whoever has given
      something and was not there any more when it was found to count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Telling:
    """What a worker tells when it asks for a quorum; plain values, which travel as JSON.

    name: which no other process has, ever. store: "host:port" where others may meet it.
    joined: whether it holds what members hold; False for one that has just started.
    facts: what must be the same on all members, in short, by what it is a fact of.
    attempt: the exchange that it took part in last; "" before the first one of this boundary. done: it has its result.
    group: the exchange whose process group it can use again; "" for none.
    finite: whether its parameters and buffers are. squares: sum of squares of its parameters; 0 where not finite.
    skipped: updates that it has skipped, as they overflowed. stop: it was asked to stop.
    launch: of workers that one launcher has started, which stop together; "" for a worker by itself.
    expected: workers for which it waits before the first step. impatient: it has waited for long enough.
    position: Rounds.state_dict(), and what the run has cost. loop: what the loop that trains goes on with.
    recorder: it writes the records of the run.

    And with grace:
    stood: the exchange after which it stands where it began its round. of: how many stood there together.
    living: how many of these it saw beat when it asked; of one that has not joined, how many workers at all.
    over: its grace is over. frozen: it was, for longer than the time-out, before it asked.
    counted: those whose movement counts, and who do not know.
    """

    name: str
    store: str
    step: int
    joined: bool
    facts: dict[str, str]
    attempt: str = ""
    done: bool = False
    group: str = ""
    finite: bool = True
    squares: float = 0.0
    skipped: int = 0
    stop: bool = False
    launch: str = ""
    expected: int = 1
    impatient: bool = False
    recorder: bool = False
    position: dict[str, Any] = dataclasses.field(default_factory=dict)
    loop: dict[str, Any] = dataclasses.field(default_factory=dict)
    stood: str = ""
    of: int = 0
    living: int = 0
    over: bool = False
    frozen: bool = False
    counted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Quorum:
    """Who asked at the same time, in the order of names, and `key`, which no other quorum has and which grows.

    living: with grace, the names of those who beat just before: what this worker saw, and no other, so that nothing is
    decided by it.
    """

    key: str
    there: tuple[Telling, ...]
    living: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from a quorum, the same for everybody in it.

    members: who takes part, in the order of names: in a commit, of those who have the result.
    giving: the names of those among them whose parameters are averaged. source: the first of them.
    attempt: in a commit, the exchange that counts.
    late: the names of those whose movement goes into the average, from an older one.
    """

    what: Literal["wait", "exchange", "commit"]
    members: tuple[Telling, ...]
    giving: frozenset[str]
    source: Telling
    why: str = ""  # it waits, in words
    attempt: str = ""
    late: frozenset[str] = frozenset()


def plan(quorum: Quorum, min_workers: int, *, grace: bool = False) -> Plan:
    """The conclusion of everybody in a quorum.

    Args:
        grace: whether there is any.
    """
    current = _current(quorum.there)
    source = current[0]
    alike = tuple(one for one in quorum.there if one.facts == source.facts)
    current = [one for one in current if one.facts == source.facts]
    attempt = max(one.attempt for one in current)
    of_it = [one for one in current if one.attempt == attempt]
    giving = frozenset(one.name for one in _giving(current))
    if attempt and all(one.done for one in of_it):
        having = tuple(one for one in alike if one.attempt == attempt and one.done)
        return Plan("commit", having, giving, source, attempt=attempt)
    if len(alike) < min_workers:
        here = f"{len(alike)} of at least {min_workers} workers (membership.min_workers) are there"
        return Plan("wait", alike, giving, source, f"{here}; waiting for {min_workers - len(alike)} more")
    if not source.joined and len(alike) < source.expected and not any(one.impatient for one in alike):
        return Plan("wait", alike, giving, source)
    if grace and _may_come(quorum.there, current):
        return Plan("wait", alike, giving, source)
    return Plan("exchange", alike, giving, source, late=_late(alike, source) if grace else frozenset())


def _current(there: Sequence[Telling]) -> list[Telling]:
    """Those who hold the run as it stands: the foremost members, or at the start whoever has come furthest."""
    joined = [one for one in there if one.joined] or list(there)
    foremost = max(one.step for one in joined)
    return [one for one in joined if one.step == foremost]


def _giving(current: Sequence[Telling]) -> list[Telling]:
    """Members give their average; at the start all take over what the first one holds. None where nobody's is finite.

    A member whose parameters are not finite gives nothing, and joins the others anew.
    """
    finite = [one for one in current if one.finite]
    return finite if current[0].joined else finite[:1]


def _may_come(there: Sequence[Telling], current: Sequence[Telling]) -> bool:
    """Whether somebody is waited for, with grace.

    Those who have not joined wait for everybody who lives: among these may be members, whose run they would leave.
    A view of who lives may be older than the death of somebody; then the next one tells.
    """
    living = max(one.living for one in current)
    if not current[0].joined:
        return len(there) < living
    together = [one for one in current if one.stood == current[0].stood]
    if len(together) >= living:
        return False
    return not (any(one.over for one in together) and 2 * len(together) > current[0].of)


def _late(alike: Sequence[Telling], source: Telling) -> frozenset[str]:
    """Members that are behind, and hold a movement that no average has.

    One that was frozen for so long that it had left joins anew, as where there is no grace.
    """
    behind = (one for one in alike if source.joined and one.joined and one.step < source.step)
    return frozenset(o.name for o in behind if o.finite and not o.frozen and o.name not in source.counted)


def leaving(members: Sequence[Telling]) -> frozenset[str]:
    """The names of those who stop at a boundary: they were asked to, or another worker of their launcher was.

    The others go on; where there are none, the run stops.
    """
    launches = {one.launch for one in members if one.stop and one.launch}
    return frozenset(one.name for one in members if one.stop or one.launch in launches)
