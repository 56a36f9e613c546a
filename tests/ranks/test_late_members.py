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
