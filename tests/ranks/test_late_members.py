"""Members that are late at a boundary (membership.grace_seconds): real processes, gloo, torchft's lighthouse.

Which boundary a member misses is arranged, not timed: it waits inside its round for what another one says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.member_runs import OUTER, ROUNDS, check_equal, simulated
from tests.support.members import cluster
from tests.support.training import QSR

TIMEOUT, GRACE = 5.0, 1.0
HELD_UP = GRACE + 2.0  # seconds: the grace, two quorums and a step, on cores that do other things too


def qsr(**more: Any) -> dict[str, Any]:
    return {**QSR, "membership": {"way": "torchft", "timeout_seconds": TIMEOUT, "grace_seconds": GRACE}, **more}


def misses(worker: int, round_start: int, boundaries: int) -> Callable[[int, int], int]:
    """That worker, with the round that begins there."""
    return lambda k, start: boundaries if (k, start) == (worker, round_start) else 0


WAYS = [  # engine's ZeRO stage (None: FSDP), ranks in a worker, outer optimizer
    pytest.param(None, 1, None, id="fsdp, 1"),
    pytest.param(None, 2, OUTER, id="fsdp, 2", marks=pytest.mark.slow),
    pytest.param(0, 1, OUTER, id="deepspeed, 1", marks=pytest.mark.slow),
    pytest.param(2, 2, None, id="deepspeed, 2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "worker_size", "outer"), WAYS)
def test_the_others_go_on_and_what_a_late_member_did_counts_at_their_next_boundary(
    tmp_path: Path, stage: int | None, worker_size: int, outer: dict[str, Any] | None
) -> None:
    """a is late with the round of steps 4 and 5. It recorded the run, and c does from then on."""
    block = qsr(worker_size=worker_size, outer=outer)
    with cluster(tmp_path, TIMEOUT, expected=3, grace=GRACE) as run:
        start = partial(run.start, worker_size=worker_size, qsr=block, stage=stage)
        start("a", part=0, waits={5: ("c", "boundary", 6)})
        start("c", part=10, waits={7: ("a", "asks", 6)})
        start("d", part=20, waits={7: ("a", "asks", 6)})
        assert run.ended("a", "c", "d") == [0] * 3 * worker_size
        there = dict.fromkeys("acd", (0, 12))
        expected, distances = simulated(there, worker_size=worker_size, outer=outer, late=misses(0, 4, 1))
        check_equal(run, "acd", expected, worker_size)
        at = run.boundaries("c")
        assert [len(at[step]["names"]) for step in ROUNDS] == [3, 3, 2, 3, 3]
        assert GRACE <= at[6]["took"] < HELD_UP
        assert at[8]["took"] < HELD_UP
        assert at[6]["distance"] == pytest.approx(distances[2], rel=1e-4)  # of squares that are sums in fp32
        assert at[8]["distance"] is None  # of those on time from a mean with older movements it would be
        assert at[12]["distance"] == pytest.approx(distances[4], rel=1e-4)
        later = [(one["step"], one["event"], one["member"][0]) for step in ROUNDS[1:] for one in at[step]["events"]]
        assert later == [(6, "missing", "a"), (8, "late", "a")]
        assert [one["rounds"] for one in at[8]["events"]] == [1]
        assert [line["step"] for line in run.said("a") if line["what"] == "step"] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
        assert [[one[step]["recorder"] for step in (4, 8)] for one in map(run.boundaries, "acd")] == [
            [True, False],
            [False, True],
            [False, False],
        ]
        assert [one[12]["late"] for one in map(run.boundaries, "acd")] == [1, 1, 1]


@pytest.mark.slow
def test_who_misses_two_boundaries_keeps_its_movement_until_the_next_one(tmp_path: Path) -> None:
    with cluster(tmp_path, TIMEOUT, expected=3, grace=GRACE) as run:
        run.start("a", qsr=qsr(), part=0, waits={5: ("c", "boundary", 8)})
        for number, name in enumerate("cd", start=1):
            run.start(name, qsr=qsr(), part=10 * number, waits={9: ("a", "asks", 6)})
        assert run.ended("a", "c", "d") == [0, 0, 0]
        expected, _ = simulated(dict.fromkeys("acd", (0, 12)), late=misses(0, 4, 2))
        check_equal(run, "acd", expected)
        at = run.boundaries("c")
        assert [len(at[step]["names"]) for step in ROUNDS] == [3, 3, 2, 2, 3]
        assert [(one["event"], one["rounds"]) for one in at[12]["events"]] == [("late", 2)]


@pytest.mark.slow
def test_one_is_late_and_another_joins_at_the_same_boundary(tmp_path: Path) -> None:
    """Who joins gets the mean of the optimizer states of those who are not late."""
    with cluster(tmp_path, TIMEOUT, expected=3, grace=GRACE) as run:
        run.start("b", qsr=qsr(), part=0, waits={5: ("c", "boundary", 6)})
        run.start("c", qsr=qsr(), part=10, waits={7: ("b", "asks", 6)})
        run.start("d", qsr=qsr(), part=20, waits={7: ("a", "asks", 0)})
        run.wait("c", lambda line: line["what"] == "boundary" and line["step"] == 6)  # else it would join there
        run.start("a", qsr=qsr(), part=30, seed=9)
        assert run.ended("a", "b", "c", "d") == [0] * 4
        there = {"b": (0, 12), "c": (0, 12), "d": (0, 12), "a": (8, 12)}
        expected, _ = simulated(there, late=misses(0, 4, 1))
        check_equal(run, "abcd", expected)
        at = run.boundaries("c")
        assert [len(at[step]["names"]) for step in ROUNDS] == [3, 3, 2, 4, 4]
        assert [(one["event"], one["member"][0]) for one in at[8]["events"]] == [("join", "a"), ("late", "b")]


@pytest.mark.slow
def test_a_late_member_is_killed_while_it_waits(tmp_path: Path) -> None:
    with cluster(tmp_path, TIMEOUT, expected=3, grace=GRACE) as run:
        run.start("a", qsr=qsr(), part=0, waits={5: ("c", "boundary", 6)})
        for number, name in enumerate("cd", start=1):
            run.start(name, qsr=qsr(), part=10 * number, waits={7: ("test", "killed", 6)})
        run.wait("a", lambda line: line["what"] == "asks" and line["step"] == 6)
        run.kill("a")
        run.say("test", "killed", 6)
        assert run.ended("c", "d") == [0, 0]
        expected, _ = simulated(dict.fromkeys("acd", (0, 12)), late=misses(0, 4, 99))
        check_equal(run, "cd", expected)
        at = run.boundaries("c")
        assert [len(at[step]["names"]) for step in ROUNDS] == [3, 3, 2, 2, 2]
        assert at[8]["took"] < TIMEOUT + 3  # if the lighthouse has just answered it, the averaging is repeated
        assert [one[12]["late"] for one in map(run.boundaries, "cd")] == [0, 0]


@pytest.mark.slow
def test_what_was_averaged_counts_once_though_its_member_did_not_come_for_the_result(tmp_path: Path) -> None:
    """a takes part in the averaging after step 6, and then hangs: the others do not wait for longer than the grace."""
    with cluster(tmp_path, TIMEOUT, expected=3, grace=GRACE) as run:
        run.start("a", qsr=qsr(), part=0, waits_in=("commit", 6, ("c", "boundary", 6)))
        for number, name in enumerate("cd", start=1):
            run.start(name, qsr=qsr(), part=10 * number, waits={7: ("a", "asks", 6)}, seconds=0.3)
        assert run.ended("a", "c", "d") == [0, 0, 0]
        expected, _ = simulated(dict.fromkeys("acd", (0, 12)), away=("a", 6, 8))
        check_equal(run, "acd", expected)
        at = run.boundaries("c")
        assert [len(at[step]["names"]) for step in ROUNDS] == [3, 3, 2, 3, 3]
        assert at[6]["took"] < HELD_UP
        assert [(one["event"], one["member"][0]) for one in at[8]["events"]] == [("join", "a")]
