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
