"""Who is lost, by made-up beats and times; test_lost_ranks.py has real ranks."""

from __future__ import annotations

from typing import Any

import pytest

from qsr_engine.membership.beats import Beat
from qsr_engine.membership.halt import target
from qsr_engine.membership.judge import Judge, verdict_of


def beats(**changes: Any) -> dict[int, Beat]:
    return {rank: Beat(**{"state": "running", **changes.get(f"rank_{rank}", {})}) for rank in range(3)}


def looks(judge: Judge, seen: dict[int, Beat], start: float, end: float) -> dict[int, str]:
    """What a judge finds that looks every half second."""
    found: dict[int, str] = {}
    for half_seconds in range(round(2 * start), round(2 * end) + 1):
        found = judge.lost(seen, now=half_seconds / 2)
    return found


MOVING: dict[str, dict[str, Any]] = {f"rank_{rank}": {"number": 1, "moves": 1} for rank in (0, 1)}


def test_a_judge_goes_by_its_own_clock() -> None:
    judge = Judge(10.0, 0.5)
    assert judge.lost(beats(), now=0.0) == {}
    assert looks(judge, beats(**MOVING), 0.5, 10.0) == {}
    found = looks(judge, beats(**MOVING), 10.5, 10.5)
    assert list(found) == [2]
    assert found[2].startswith("no sign of life for 10.5 s")


def test_a_judge_that_was_stopped_itself_does_not_count_that_time() -> None:
    judge = Judge(10.0, 0.5)
    assert looks(judge, beats(**MOVING), 0.0, 5.0) == {}
    assert looks(judge, beats(**MOVING), 1000.0, 1003.0) == {}, "5 s, a look of at most 2 s, and 3 s"
    assert list(looks(judge, beats(**MOVING), 1003.5, 1006.0)) == [0, 1, 2]


def test_a_rank_that_never_gave_a_sign_is_lost() -> None:
    judge = Judge(10.0, 0.5)
    assert list(looks(judge, {**beats(**MOVING), 2: Beat()}, 0.0, 9.5)) == []
    assert 2 in looks(judge, {**beats(**MOVING), 2: Beat()}, 10.0, 10.5)


@pytest.mark.parametrize(
    ("state", "other", "lost"),
    [
        ("finished", {}, False),  # it may have left
        ("finished", {"waiting": True}, True),
        ("closed", {"waiting": True}, False),  # perhaps for something that is not ours
        ("closed", {"state": "failed"}, True),
    ],
)
def test_silence_after_the_end_matters_to_who_needs_that_rank(state: str, other: dict[str, Any], lost: bool) -> None:
    judge = Judge(10.0, 0.5)
    found: dict[int, str] = {}
    for second in range(13):
        seen = beats(rank_0={"number": second, **other}, rank_1={"number": second}, rank_2={"state": state})
        found = judge.lost(seen, now=float(second))
    assert (2 in found) is lost


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"number": 1}, True),  # lives: the number grows; does not get on
        ({"number": 1, "waiting": True}, False),  # for others
        ({"number": 1, "state": "starting"}, False),  # compiles
        ({"number": 1, "state": "finished"}, False),
        ({"state": "closed"}, False),
        ({"state": "ended"}, False),  # and nobody waits for it
    ],
)
def test_who_is_stalled(changes: dict[str, Any], lost: bool) -> None:
    judge = Judge(10.0, 0.5)
    found: dict[int, str] = {}
    for half_seconds in range(22):
        rank_2 = {**changes, "number": half_seconds if "number" in changes else 0}
        found = judge.lost(beats(**MOVING, rank_2=rank_2), now=half_seconds / 2)
    assert (2 in found) is lost
    assert not lost or found[2].startswith("no progress for 10.5 s")


@pytest.mark.parametrize("state", ["starting", "finished"])
@pytest.mark.parametrize(
    ("waiter", "mine", "lost"),
    [
        ({"waiting": True, "begun": 1}, {}, True),
        ({"waiting": True}, {}, False),  # it does not train yet: perhaps for data that this rank makes
        ({"begun": 1}, {}, False),  # nobody waits
        ({"waiting": True, "begun": 1}, {"waiting": True}, False),
        ({"waiting": True, "begun": 1}, {"busy": True}, False),
    ],
)
def test_before_the_first_step_and_after_the_last_only_who_is_waited_for_is_stalled(
    state: str, waiter: dict[str, Any], mine: dict[str, Any], lost: bool
) -> None:
    judge = Judge(10.0, 0.5)
    for half_seconds in range(24):
        numbers = {"number": half_seconds}
        seen = beats(
            rank_0={**numbers, **waiter},
            rank_1={**numbers, "waiting": True},
            rank_2={**numbers, **mine, "state": state},
        )
        found = judge.lost(seen, now=half_seconds / 2)
        assert not found or half_seconds > 20
    assert (2 in found) is lost
    assert not lost or found[2].startswith("no progress for 11.5 s")


def test_a_disk_may_be_slow_and_not_hang() -> None:
    judge = Judge(10.0, 0.5)
    lost_at = [
        second
        for second in range(70)
        if judge.lost(
            beats(**{f"rank_{rank}": {"number": second, "busy": rank == 2, "waiting": rank != 2} for rank in range(3)}),
            now=float(second),
        )
    ]
    assert lost_at == list(range(61, 70))


def test_who_dies_in_a_long_step_is_silent() -> None:
    """Its step is over the limit before its silence is, and is not what is wrong."""
    judge = Judge(10.0, 0.5)
    for second in range(4):
        assert judge.lost(beats(rank_2={"number": second}), now=float(second)) == {}
    seen = beats(**MOVING, rank_2={"number": 3})
    assert looks(judge, seen, 3.5, 13.0) == {}
    assert looks(judge, seen, 13.5, 13.5)[2].startswith("no sign of life for 10.5 s")


def test_whoever_waits_for_an_ended_rank_learns_it_soon() -> None:
    judge = Judge(600.0, 0.5)
    waits = {"rank_0": {"waiting": True}, "rank_2": {"state": "ended"}}
    assert judge.lost(beats(**waits), now=0.0) == {}
    assert list(looks(judge, beats(**waits), 0.5, 3.0)) == [2]


def test_the_step_at_which_all_halt() -> None:
    assert target(beats()) is None
    assert target(beats(rank_0={"halted": 5}, rank_1={"begun": 8}, rank_2={"begun": 3})) == (8, False)
    assert target(beats(**{f"rank_{r}": {"halted": 8, "begun": 8} for r in range(3)})) == (8, True)
    logs = {"step": 8, "begun": 8, "waiting": True}
    assert target(beats(**{f"rank_{r}": {"halted": 8, "begun": 8} for r in (0, 1)}, rank_2=logs)) == (9, False)


def test_many_lost_ranks_are_counted() -> None:
    text = verdict_of(dict.fromkeys(range(50), "gone"), {rank: Beat(host="h") for rank in range(50)})
    assert text.startswith("ranks 0, 1, 2")
    assert text.endswith("... and 30 more")
    assert len(text.splitlines()) == 22
