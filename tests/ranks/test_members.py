"""Workers that come and go: real processes and kills, gloo, torchft's lighthouse, both engines."""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.member_runs import OUTER, ROUNDS, check_equal, flat, simulated
from tests.support.members import cluster
from tests.support.pool import Processes
from tests.support.training import QSR

TIMEOUT = 2.0


def qsr(min_workers: int = 1, **more: Any) -> dict[str, Any]:
    return {**QSR, "membership": {"way": "torchft", "timeout_seconds": TIMEOUT, "min_workers": min_workers}, **more}


WAYS = [  # engine's ZeRO stage (None: FSDP), ranks in a worker, optimizer state of who joins, outer optimizer
    pytest.param(None, 1, "mean", None, id="fsdp, 1"),
    pytest.param(None, 2, "mean", OUTER, id="fsdp, 2", marks=pytest.mark.slow),
    pytest.param(0, 1, "fresh", OUTER, id="deepspeed, 1", marks=pytest.mark.slow),
    pytest.param(2, 2, "mean", None, id="deepspeed, 2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "worker_size", "states", "outer"), WAYS)
def test_workers_die_inside_rounds_and_another_joins(
    tmp_path: Path, stage: int | None, worker_size: int, states: str, outer: dict[str, Any] | None
) -> None:
    """b dies in the third round, c in the fourth; a waits for a second worker, and d begins the fifth round with it."""
    block = qsr(min_workers=2, worker_size=worker_size, on_other_workers=states, outer=outer)
    with cluster(tmp_path, TIMEOUT, expected=3) as run:
        start = partial(run.start, worker_size=worker_size, qsr=block, stage=stage)
        start("a", part=0)
        start("b", part=10, dies_at=5)
        start("c", part=20, dies_at=7)
        run.ended("c")
        start("d", part=30, seed=9)
        assert run.ended("a", "d") == [0] * 2 * worker_size
        there = {"a": (0, 12), "b": (0, 4), "c": (0, 6), "d": (8, 12)}
        expected, _ = simulated(there, worker_size=worker_size, joins_fresh=states == "fresh", outer=outer)
        check_equal(run, "ad", expected, worker_size)
        at = run.boundaries("a")
        assert [len(at[step]["names"]) for step in ROUNDS] == [3, 3, 2, 2, 2]
        assert at[6]["took"] < TIMEOUT + 3  # what a death costs
        assert [line["round"] for line in run.said("d") if line["what"] == "joined"] == [4]
        events = [(one["step"], one["event"], one["member"][0]) for step in ROUNDS for one in at[step]["events"]]
        later = [event for event in events if event[0] > 2]
        assert later == [(6, "leave", "b"), (8, "join", "d"), (8, "leave", "c")]


@pytest.mark.parametrize(
    ("where", "in_round"),
    [pytest.param("exchange", False, id="in the averaging"), pytest.param("commit", True, id="after it")],
)
def test_a_worker_dies_at_a_boundary(tmp_path: Path, where: str, in_round: bool) -> None:
    """While buckets are averaged: those who are left do it again. After it: what the dead worker gave counts."""
    with cluster(tmp_path, TIMEOUT, expected=3) as run:
        run.start("a", qsr=qsr(), part=0)
        run.start("b", qsr=qsr(), part=10, dies_in=(where, 6))
        run.start("c", qsr=qsr(), part=20)
        assert run.ended("a", "c") == [0, 0]
        expected, _ = simulated({"a": (0, 12), "b": (0, 6 if in_round else 4), "c": (0, 12)})
        check_equal(run, "ac", expected)
        events = [(one["event"], one["member"][:1]) for one in run.boundaries("a")[6]["events"]]
        assert events == ([] if in_round else [("failed", "")]) + [("leave", "b")]


@pytest.mark.slow
def test_all_but_one_die_in_the_same_round(tmp_path: Path) -> None:
    """The third goes on alone, and loses nothing."""
    with cluster(tmp_path, TIMEOUT, expected=3) as run:
        run.start("a", qsr=qsr(), part=0)
        run.start("b", qsr=qsr(), part=10, dies_at=5)
        run.start("c", qsr=qsr(), part=20, dies_at=4)
        assert run.ended("a") == [0]
        expected, _ = simulated({"a": (0, 12), "b": (0, 4), "c": (0, 4)})
        check_equal(run, "a", expected)
        at = run.boundaries("a")
        assert [len(at[step]["names"]) for step in ROUNDS] == [3, 3, 1, 1, 1]
        assert at[6]["took"] < TIMEOUT + 3  # both deaths cost one time-out
        assert sorted(one["member"][:1] for one in at[6]["events"] if one["event"] == "leave") == ["b", "c"]


def test_many_join_at_once(tmp_path: Path) -> None:
    """Three start at the same time. What one member sends is what the collectives of all take, whoever joins."""
    block = qsr(min_workers=3, alpha=0.0, h_base=5, total_steps=25)
    with cluster(tmp_path, TIMEOUT, expected=3) as run:
        start = partial(run.start, qsr=block, model_name="wide", seconds=0.2)
        for number, name in enumerate("abc"):
            start(name, part=10 * number, dies_at=7 if name == "c" else None)
        for number, name in enumerate("def"):
            start(name, part=10 * number + 30, seed=9, waits_for=tmp_path / "now")
        run.ended("c")
        (tmp_path / "now").touch()
        assert run.ended(*"abdef") == [0] * 5
        of_each = {name: run.boundaries(name) for name in "abdef"}
        joined = {line["step"] for name in "def" for line in run.said(name) if line["what"] == "joined"}
        assert joined in ({10}, {15}, {10, 15})  # a and b wait at 10 for a third one
        for step in range(5, 26, 5):
            assert len({one[step]["digest"] for one in of_each.values() if step in one}) == 1
        ends = [next(line["values"] for line in run.said(name) if line["what"] == "finished") for name in "abdef"]
        assert all(end == ends[0] for end in ends)
        # A ring of n ranks takes 2 (n - 1) / n of the bytes: of the parameters, and of AdamW's two states for who
        # joins. Beside them go descriptions and counts, and messages to the lighthouse. Were the two states sent to
        # each who joins, it would be 7.6 times the parameters in place of 4.8 where three join at once, and 5.6 where
        # two do.
        nbytes = 4 * flat(ends[0]).numel()
        for name in "ab":
            at = of_each[name][max(joined)]
            assert len(at["names"]) == 5
            assert at["sent"] / nbytes == pytest.approx(2 * 4 / 5 * 3, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("grace", [None, 1.0])
def test_the_lighthouse_dies_and_a_worker_freezes(tmp_path: Path, grace: float | None) -> None:
    """Without a lighthouse members wait at the boundary, together. One that was frozen joins as a new one."""
    last = 80 if grace else 60
    block = qsr(total_steps=last, alpha=0.0, h_base=5)
    block["membership"]["grace_seconds"] = grace
    with cluster(tmp_path, TIMEOUT, expected=3, grace=grace) as run:
        for number, name in enumerate("abc"):
            run.start(name, qsr=block, part=10 * number, seconds=0.1, freezes_at=22 if name == "c" else None)
        run.wait("a", lambda line: line["what"] == "step" and line["step"] == 6)
        run.darken()
        time.sleep(1.5)
        run.light()
        at = run.wait("a", lambda line: line["what"] == "boundary" and line["step"] == 10)
        assert len(at["names"]) == 3  # nobody went on alone
        run.wait("a", lambda line: line["what"] == "boundary" and line["step"] == 30)
        time.sleep(TIMEOUT if grace else 0)  # with grace the others have not waited until it had left
        run.send("c", signal.SIGCONT)
        assert run.ended("a", "b", "c") == [0, 0, 0]
        of_each = [run.boundaries(name) for name in "abc"]
        assert [len(of_each[0][step]["names"]) for step in (20, 25, 30, last)] == [3, 2, 2, 3]
        for step in range(5, last + 1, 5):
            assert len({one[step]["digest"] for one in of_each if step in one}) == 1
        ends = [next(line for line in run.said(name) if line["what"] == "finished") for name in "abc"]
        assert ends[0]["values"] == ends[1]["values"] == ends[2]["values"]
        assert [one[last]["late"] for one in of_each] == [0, 0, 0]  # what it did while the others went on is lost


def test_who_runs_something_else_is_refused_and_who_is_not_finite_joins_anew(tmp_path: Path) -> None:
    block = qsr(faults={"not_finite": "leave_out"})
    with cluster(tmp_path, TIMEOUT, expected=2) as run:
        run.start("a", qsr=block, part=0, seconds=0.2)
        run.start("b", qsr=block, part=10, nan_at=3)
        run.start("z", qsr={**block, "alpha": 0.05}, part=20)
        assert run.ended("a", "b") == [0, 0]
        (error,) = (line for line in run.said("z") if line["what"] == "error")
        assert error["type"] == "JoinError"
        assert "configuration" in error["text"]
        expected, _ = simulated({"a": (0, 12), "b": (0, 2)})
        assert run.boundaries("a")[4]["digest"] == run.boundaries("b")[4]["digest"]
        assert [line["what"] for line in run.said("b")].count("finished") == 1
        assert expected.isfinite().all()


@pytest.mark.slow
def test_another_size_other_data_and_another_version_are_refused_by_name(tmp_path: Path) -> None:
    """Three ask to join a run of two members, which go on without them, and average nothing of theirs."""
    block, facts = qsr(alpha=0.0, h_base=2, total_steps=40), {"data": "1"}
    others: dict[str, dict[str, Any]] = {
        "x": {"qsr": {**block, "worker_size": 2}, "worker_size": 2},
        "y": {"facts": {"data": "2"}},
        "z": {"versions": {"torch": "1.0"}},
    }
    with cluster(tmp_path, TIMEOUT, expected=2) as run:
        for number, name in enumerate("ab"):
            run.start(name, qsr=block, part=10 * number, facts=facts, seconds=0.15)
        for name, more in others.items():
            run.start(name, **{"qsr": block, "part": 30, "facts": facts, "waits_for": tmp_path / "now", **more})
        run.wait("a", lambda line: line["what"] == "boundary")
        (tmp_path / "now").touch()
        assert run.ended("a", "b") == [0, 0]
        said = {name: [line for line in run.said(name) if line["what"] == "error"] for name in others}
        assert [error["type"] for errors in said.values() for error in errors] == ["JoinError"] * 3
        assert "  worker_size: 2 here, 1 on the members\n" in said["x"][0]["text"]
        assert "  data: 2 here, 1 on the members\n" in said["y"][0]["text"]
        assert "  torch: 1.0 here, " in said["z"][0]["text"]
        of_each = [run.boundaries(name) for name in "ab"]
        assert all(len(at["names"]) == 2 for at in of_each[0].values())
        assert {step: at["digest"] for step, at in of_each[0].items()} == {
            step: at["digest"] for step, at in of_each[1].items()
        }


@pytest.mark.slow
def test_who_joins_gets_the_buffers_too(tmp_path: Path) -> None:
    """Batch norm's statistics are averaged, and its counts of batches are those of a member."""
    with cluster(tmp_path, TIMEOUT, expected=2) as run:
        start = partial(run.start, qsr=qsr(min_workers=2), model_name="resnet")
        start("a", part=0)
        start("b", part=10, dies_at=5)
        run.ended("b")
        start("d", part=30, seed=9)
        assert run.ended("a", "d") == [0, 0]
        of_a, of_d = run.boundaries("a"), run.boundaries("d")
        assert set(of_d) == {8, 12}
        assert [of_d[step]["digest"] for step in (8, 12)] == [of_a[step]["digest"] for step in (8, 12)]


def refused_job(block: dict[str, Any]) -> str:
    from tests.support import fsdp_engine

    try:
        fsdp_engine.start(block)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def test_a_worker_without_a_lighthouse_and_two_workers_in_one_job_are_refused(processes: Processes) -> None:
    (said,) = processes.run(refused_job, ranks=1, block=qsr())
    assert "ConfigError: qsr.membership is 'torchft', and TORCHFT_LIGHTHOUSE is not set" in said
    for said in processes.run(refused_job, ranks=2, block=qsr()):
        assert "ConfigError: qsr.membership is 'torchft', where every worker is a job of its own" in said
    for said in processes.run(refused_job, ranks=2, block=qsr(worker_size=2)):  # rank 0 tells the other one
        assert "TORCHFT_LIGHTHOUSE is not set" in said
