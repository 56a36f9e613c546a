"""The state machine alone, without an engine: it follows the schedule, and goes on from any state."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from qsr_engine.averaging import Averager, CollectiveError, flat_buckets
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import validate
from qsr_engine.local_steps.steps import LocalSteps
from qsr_engine.schedule import averagings_percent, rounds
from tests.support.absent_ranks import give_up, soon_given_up, stay_away
from tests.support.bare_local_steps import BLOCKS, make
from tests.support.pool import Processes


def walk_job(block: dict[str, Any], break_at: int | None) -> dict[str, Any]:
    """(step, round, period, mode, boundary) of every step; at break_at, a new object goes on from the state."""
    state = make(block)
    seen = []
    while not state.finished:
        if state.step == break_at:
            saved = state.state_dict()
            state = make(block)
            state.load_state_dict(saved)
        position = (state.step, state.round, state.period, state.mode, state.on_boundary)
        seen.append((*position, state.advance()))
    return {
        "seen": seen,
        "averagings": state.averagings,
        "percents": (state.averagings_percent, state.bytes_percent),
    }


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block['strategy']}-{block['total_steps']}")
def test_it_follows_the_schedule(processes: Processes, block: dict[str, Any]) -> None:
    plan = list(rounds(validate(QSRConfig, block, where="test")))
    expected = [
        (step, number, r.length, r.mode, step == r.start, step + 1 == r.start + r.length)
        for number, r in enumerate(plan)
        for step in range(r.start, r.start + r.length)
    ]
    for result in processes.run(walk_job, block=block, break_at=None):
        assert result["seen"] == expected
        assert result["averagings"] == len(plan)
        # Gradients and parameters are as large here; before a switch the driver averages, and there is none.
        local = averagings_percent(plan) - 100 * sum(r.mode == "parallel" for r in plan) / block["total_steps"]
        shares = (averagings_percent(plan), 100 if block["strategy"] == "parallel" else local)
        assert result["percents"] == pytest.approx(shares)


@pytest.mark.parametrize("break_at", [1, 5, 11])
def test_it_goes_on_from_any_step(processes: Processes, break_at: int) -> None:
    whole = processes.run(walk_job, block=BLOCKS[0], break_at=None)
    assert processes.run(walk_job, block=BLOCKS[0], break_at=break_at) == whole


def absent_job(overlap: str) -> str:
    """Rank 1 comes to the boundary after step 4, and not to its averaging."""
    dist.init_process_group("gloo")
    across = cast(dist.ProcessGroup, dist.new_group([0, 1]))
    options = {"shared_memory": False, "overlap": overlap, **({"delay_steps": 1} if overlap == "delayed" else {})}
    qsr = validate(QSRConfig, {**BLOCKS[2], "averaging": options}, where="test")
    model = torch.nn.Linear(3, 2, bias=False)
    averager = Averager(flat_buckets(model.parameters(), 1000), across, qsr.averaging)
    if overlap == "next_forward":
        averager.overlap_with(model, [(model.weight, 0, 0, 6)], refresh=lambda part: None)
    state = LocalSteps(qsr, averager, digest=1)

    def not_here(*left_out: Any) -> None:
        stay_away(0)
        raise KeyError("it stayed away")

    if dist.get_rank() == 1:
        for name in ("average", "start", "snapshot"):
            setattr(averager, name, not_here)
    soon_given_up(across)
    try:
        for _ in range(6):
            state.begin_forward()
            model(torch.ones(1, 3))
            state.begin_update()
            state.advance()
    except CollectiveError as error:
        return str(error)
    except KeyError:
        return ""
    finally:
        give_up(dist.get_rank())
    return "nothing was raised"


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    ("overlap", "step", "what"),
    [
        ("none", 4, "averaging bucket 1 of 1 (0.0 MB)"),
        ("next_forward", 4, "agreeing on the order of the buckets"),
        ("delayed", 5, "averaging bucket 1 of 1 (0.0 MB)"),
    ],
)
def test_an_averaging_that_times_out_names_step_bucket_and_ranks(
    processes: Processes, overlap: str, step: int, what: str
) -> None:
    message, _ = processes.run(absent_job, seconds=60, overlap=overlap)
    assert message.startswith(f"after step {step}: {what} over the ranks [0, 1] failed on rank 0: ")


def refusals_job() -> list[str]:
    state = make(BLOCKS[2])
    saved = state.state_dict()
    messages = []
    inside = {**saved, "step": 10, "round_start": 8, "period": 4}
    for wrong in ({**saved, "step": 11}, {**saved, "round_start": 3}, inside, {"step": 3}, {**saved, "more": 1}):
        try:
            state.load_state_dict(wrong)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_states_of_other_runs_are_refused(processes: Processes) -> None:
    messages = processes.run(refusals_job, ranks=1)[0]
    assert len(messages) == 5
    assert "the state is at step 11" in messages[0]
    assert "this run has 10 steps" in messages[0]
    assert "round that began at step 3" in messages[1]
    assert "the state is inside a round, at step 10, with which this run ends" in messages[2]
    assert all("a local-step state has the keys" in message for message in messages[3:])
