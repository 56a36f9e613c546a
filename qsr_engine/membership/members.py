"""What workers that come and go decide at a boundary: a pure function of what all of them have told.

torchft's lighthouse gives everybody who asks at the same time the same *quorum*: who is there, each with its telling.
So all of them draw the same conclusion, one of

    wait        too few are there, or before the first step somebody may still come: ask again
    exchange    average over these members; who joins adds nothing, and gets what the others get
    commit      all who took part in the last exchange, and are still there, have its result: it counts

An exchange and its commit are two quorums. Who dies between them is missed by nobody: the average stands. Whoever asks
for the second one with a failure makes all of them exchange again, with what they held before.
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


@dataclasses.dataclass(frozen=True)
class Quorum:
    """Who asked at the same time, in the order of names, and `key`, which no other quorum has and which grows."""

    key: str
    there: tuple[Telling, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from a quorum, the same for everybody in it.

    members: who takes part, in the order of names: in a commit, of those who have the result.
    giving: the names of those among them whose parameters are averaged. source: the first of them.
    """

    what: Literal["wait", "exchange", "commit"]
    members: tuple[Telling, ...]
    giving: frozenset[str]
    source: Telling
    why: str = ""  # it waits, in words


def plan(quorum: Quorum, min_workers: int) -> Plan:
    """The conclusion of everybody in a quorum."""
    current = _current(quorum.there)
    source = current[0]
    alike = tuple(one for one in quorum.there if one.facts == source.facts)
    current = [one for one in current if one.facts == source.facts]
    attempt = max(one.attempt for one in current)
    of_it = [one for one in current if one.attempt == attempt]
    giving = frozenset(one.name for one in _giving(current))
    if attempt and all(one.done for one in of_it):
        having = tuple(one for one in alike if one.attempt == attempt and one.done)
        return Plan("commit", having, giving, source)
    if len(alike) < min_workers:
        here = f"{len(alike)} of at least {min_workers} workers (membership.min_workers) are there"
        return Plan("wait", alike, giving, source, f"{here}; waiting for {min_workers - len(alike)} more")
    if not source.joined and len(alike) < source.expected and not any(one.impatient for one in alike):
        return Plan("wait", alike, giving, source)
    return Plan("exchange", alike, giving, source)


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


def leaving(members: Sequence[Telling]) -> frozenset[str]:
    """The names of those who stop at a boundary: they were asked to, or another worker of their launcher was.

    The others go on; where there are none, the run stops.
    """
    launches = {one.launch for one in members if one.stop and one.launch}
    return frozenset(one.name for one in members if one.stop or one.launch in launches)
