"""What workers that come and go conclude from a quorum; no process, no torchft."""

from __future__ import annotations

from typing import Any

from qsr_engine.membership.members import Plan, Quorum, Telling, leaving, plan

FACTS = {"configuration": "1"}


def told(name: str, step: int = 6, **more: Any) -> Telling:
    known = {"joined": True, "facts": FACTS, **more}
    return Telling(name, f"{name}:1", step, **known)


def new(name: str, step: int = 0, **more: Any) -> Telling:
    return told(name, step, **{"joined": False, **more})


def of(*there: Telling, min_workers: int = 1) -> Plan:
    return plan(Quorum("2", there), min_workers)


def names(found: Plan) -> list[str]:
    return [one.name for one in found.members]


def test_members_at_the_same_step_average() -> None:
    found = of(told("a"), told("b"))
    assert found.what == "exchange"
    assert names(found) == ["a", "b"]
    assert found.giving == {"a", "b"}


def test_at_the_start_all_take_over_what_the_first_one_of_the_furthest_holds() -> None:
    found = of(new("a"), new("b", 4), new("c", 4))
    assert found.what == "exchange"
    assert found.giving == {"b"}
    assert found.source.name == "b"


def test_at_the_start_as_many_are_waited_for_as_were_started_until_somebody_has_waited_enough() -> None:
    assert of(new("a", expected=2)).what == "wait"
    assert of(new("a", expected=2, impatient=True)).what == "exchange"
    assert of(new("a", expected=2), new("b", expected=2)).what == "exchange"
    assert of(told("a", expected=2)).what == "exchange"  # later on nobody is


def test_who_joins_gives_nothing_whatever_its_step() -> None:
    found = of(told("a"), new("b", 9), told("c"), told("d", 4))
    assert found.what == "exchange"
    assert names(found) == ["a", "b", "c", "d"]
    assert found.giving == {"a", "c"}


def test_fewer_than_min_workers_wait_and_say_for_what() -> None:
    found = of(told("a"), min_workers=2)
    assert found.what == "wait"
    assert "1 of at least 2 workers" in found.why
    assert of(told("a"), new("b"), min_workers=2).what == "exchange"


def test_an_exchange_counts_where_all_who_are_there_have_its_result() -> None:
    done: dict[str, Any] = {"attempt": "1", "done": True}
    found = of(told("a", **done), told("b", **done), new("d"))
    assert found.what == "commit"
    assert names(found) == ["a", "b"]
    assert of(told("a", **done)).what == "commit"  # b died after it
    assert of(told("a", **done), new("d", 0, **done)).members[1].name == "d"


def test_an_exchange_that_failed_for_one_is_made_again_by_all() -> None:
    found = of(told("a", attempt="1", done=True), told("b", attempt="1"), told("c", attempt="1", done=True))
    assert found.what == "exchange"
    assert found.giving == {"a", "b", "c"}


def test_who_joins_and_failed_does_not_hold_the_members_up() -> None:
    done: dict[str, Any] = {"attempt": "1", "done": True}
    found = of(told("a", **done), told("b", **done), new("d", attempt="1"))
    assert found.what == "commit"
    assert names(found) == ["a", "b"]


def test_the_result_of_a_round_that_is_over_counts_no_more() -> None:
    """c was frozen between the exchange after step 4 and its end; the others are at step 6."""
    found = of(told("a"), told("b"), told("c", 4, attempt="1", done=True))
    assert found.what == "exchange"
    assert found.giving == {"a", "b"}


def test_a_member_that_is_not_finite_gives_nothing() -> None:
    assert of(told("a"), told("b", finite=False)).giving == {"a"}
    assert of(told("a", finite=False), told("b", finite=False)).giving == frozenset()


def test_who_runs_something_else_takes_no_part_and_does_not_count() -> None:
    other = {"configuration": "2"}
    found = of(told("a"), told("b"), new("d", facts=other))
    assert names(found) == ["a", "b"]
    assert of(told("a"), new("d", facts=other), min_workers=2).what == "wait"


def test_workers_of_one_launcher_stop_together_and_the_others_go_on() -> None:
    """One may have told before it was asked; those of another host were not asked."""
    members = [told("a", launch="1", stop=True), told("b", launch="1"), told("c", launch="2"), told("d")]
    assert leaving(members) == {"a", "b"}
    assert leaving([told("a", stop=True), told("b")]) == {"a"}  # of no launcher's
    assert leaving(members[2:]) == frozenset()


# ------------------------------------------------------------------------------------------------- with grace


def stands(name: str, step: int = 6, **more: Any) -> Telling:
    """One of three that stood together after the boundary "4", all of whom live."""
    return told(name, step, **{"stood": "4", "of": 3, "living": 3, **more})


def graced(*there: Telling, min_workers: int = 1) -> Plan:
    return plan(Quorum("6", there), min_workers, grace=True)


def test_those_who_stood_together_are_waited_for_until_the_grace_of_one_is_over() -> None:
    assert graced(stands("a"), stands("b")).what == "wait"
    assert graced(stands("a"), stands("b", over=True)).what == "exchange"
    assert graced(stands("a"), stands("b"), stands("c")).what == "exchange"
    assert of(stands("a"), stands("b")).what == "exchange"  # without grace the lighthouse has waited for all


def test_who_does_not_live_is_not_waited_for_whoever_saw_it_alive_before() -> None:
    assert graced(stands("a", living=2), stands("b", living=2)).what == "exchange"
    assert graced(stands("a", living=2), stands("b", living=3)).what == "wait"
    assert graced(stands("a", living=1)).what == "exchange"


def test_no_more_than_half_of_those_who_stood_together_wait_for_the_others_though_the_grace_is_over() -> None:
    assert graced(stands("a", over=True)).what == "wait"
    assert graced(stands("a", over=True, of=2, living=2)).what == "wait"
    four = [stands(name, over=True, of=4, living=4) for name in "abc"]
    assert graced(*four[:2]).what == "wait"
    assert graced(*four).what == "exchange"


def test_members_that_are_late_and_workers_that_join_do_not_make_a_run_of_their_own() -> None:
    """The lighthouse lets more than half of those who beat go on, whoever they are."""
    late = [stands("c", over=True), told("d", 4, stood="2", of=5, living=5, over=True)]
    joining = [new(name, living=9) for name in "xyz"]
    assert graced(*late, *joining).what == "wait"
    assert graced(*joining).what == "wait"
    assert graced(*(new(name, living=3) for name in "xyz")).what == "exchange"


def test_a_late_member_that_is_there_already_does_not_make_the_others_go_on_without_one_of_them() -> None:
    found = graced(stands("a"), told("c", 4, stood="2", of=4, living=4, over=True))
    assert found.what == "wait"


def test_who_is_late_gives_its_movement_and_is_not_the_source() -> None:
    late = told("a", 4, stood="2", of=4, living=4, over=True)
    found = graced(late, *(stands(name) for name in "bcd"), new("x"))
    assert found.what == "exchange"
    assert names(found) == ["a", "b", "c", "d", "x"]
    assert found.giving == {"b", "c", "d"}
    assert found.late == {"a"}
    assert found.source.name == "b"
    assert of(late, *(stands(name) for name in "bcd")).late == frozenset()  # without grace it joins anew


def test_who_joins_anew_though_it_is_behind_has_no_movement_to_give() -> None:
    on_time = [stands(name, counted=("counted",)) for name in "bcd"]
    kinds: dict[str, dict[str, Any]] = {"frozen": {"frozen": True}, "nan": {"finite": False}, "counted": {}}
    for name, more in kinds.items():
        found = graced(told(name, 4, stood="2", of=4, living=4, **more), *on_time)
        assert found.what == "exchange"
        assert not found.late
        assert found.giving == {"b", "c", "d"}
        assert name in names(found)


def test_a_frozen_member_that_is_not_behind_gives_as_the_others() -> None:
    found = graced(stands("a", frozen=True), stands("b"), stands("c"))
    assert found.giving == {"a", "b", "c"}
    assert not found.late


def test_an_exchange_of_a_late_member_counts_where_those_on_time_have_its_result() -> None:
    done: dict[str, Any] = {"attempt": "6", "done": True}
    on_time = [stands(name, **done) for name in "bcd"]
    found = graced(told("a", 4, stood="2", attempt="6"), *on_time)
    assert (found.what, found.attempt, names(found)) == ("commit", "6", ["b", "c", "d"])
    found = graced(told("a", 4, stood="2", **done), *on_time)
    assert (found.what, names(found)) == ("commit", ["a", "b", "c", "d"])


def test_an_exchange_that_failed_is_made_again_with_the_late_members_movement() -> None:
    late = told("a", 4, stood="2", attempt="6", done=True)
    found = graced(late, stands("b", attempt="6", done=True), stands("c", attempt="6"), stands("d", attempt="6"))
    assert found.what == "exchange"
    assert found.giving == {"b", "c", "d"}
    assert found.late == {"a"}


def test_fewer_than_min_workers_wait_however_long() -> None:
    assert graced(stands("a", of=1, living=1, over=True), min_workers=2).what == "wait"


def test_who_stands_elsewhere_does_not_count_among_those_who_stood_together() -> None:
    """Two parts of a run that went on from different boundaries, until they meet again at the same step."""
    found = graced(stands("a", over=True), told("d", stood="5", of=1, living=1, over=True))
    assert found.what == "wait"
