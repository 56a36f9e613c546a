"""One set of records, whoever writes it: a member that records is late, and another one goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsr_engine.config.strict import ConfigError
from qsr_engine.local_steps.member import Standing
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.records import Record
from qsr_engine.records.run_folder import EVENTS, METRICS, leave_unfinished_run, lock_run_folder, open_run_folder
from qsr_engine.training.attendance import Records

COSTS: dict[str, Any] = {
    "images_seen": 1,
    "round": 0,
    "period": 4,
    "lr": 0.1,
    "averagings": 1,
    "averagings_percent": 1.0,
    "communication_percent": 1.0,
    "bytes_sent": 1.0,
    "bytes_percent": 1.0,
    "seconds_compute": 1.0,
    "seconds_averaging": 1.0,
    "seconds_data": 1.0,
    "images_per_second": 1.0,
}


def record(step: int, loss: float) -> Record:
    return Record(step=step, loss=loss, **COSTS)


def records(run: Path, name: str) -> Records:
    """Of a member, as train_as_member() makes them."""

    def begin(step: int) -> IO[str] | None:
        if step == 0:
            open_run_folder(run, "{}")
        try:
            return lock_run_folder(run)
        except ConfigError:
            return None

    def monitor(step: int) -> Monitor:
        return Monitor(run, 20, from_step=step, stream=io.StringIO())

    recipe: Any = SimpleNamespace(run_dir=run)
    return Records(recipe, begin, monitor, lambda: False, name, writes=True)


BOTH, A_ALONE, B_ALONE = ("a", "b"), ("a",), ("b",)


@pytest.fixture(params=[4, 6])
def late(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Records, Records]:
    """a has recorded up to such a step, and is late with the round of steps 5 to 8; b goes on from its end.

    Where a has recorded something of this round, b writes the file anew, and a has the old one, which is no more there.
    """
    run = tmp_path / "run"
    a, b = records(run, "a"), records(run, "b")
    a.stand(Standing(BOTH, 0, recorder=True), 0, 0, [])
    b.stand(Standing(BOTH, 1), 0, 0, [])
    for step in range(1, 5):
        a.log(record(step, loss=1.0))
        b.log(record(step, loss=2.0))
    a.stand(Standing(BOTH, 0, recorder=True), 4, 0, [])
    b.stand(Standing(BOTH, 1), 4, 0, [])
    for step in range(5, request.param + 1):
        a.log(record(step, loss=1.0))
    for step in range(5, 9):
        b.log(record(step, loss=2.0))
    missing = {"step": 8, "event": "missing", "member": "a", "members": 1}
    b.stand(Standing(B_ALONE, 0, recorder=True), 8, 4, [missing])
    return run, a, b


def test_a_recorder_that_is_late_writes_no_more_and_every_step_is_there_once(
    late: tuple[Path, Records, Records],
) -> None:
    run, a, b = late
    for step in (7, 8, 9):
        a.log(record(step, loss=1.0))
    for step in (9, 10):
        b.log(record(step, loss=2.0))
    a.stand(Standing(BOTH, 0), 10, 4, [{"step": 10, "event": "late", "member": "a", "members": 2}])
    b.stand(Standing(BOTH, 1, recorder=True), 10, 8, [{"step": 10, "event": "late", "member": "a", "members": 2}])
    a.log(record(11, loss=1.0))
    b.log(record(11, loss=2.0))
    a.close()
    b.close()
    expected = [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 12)]
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == expected
    drawn = EventAccumulator(str(run)).Reload().Scalars("train/loss")
    assert [(point.step, point.value) for point in drawn] == expected
    events = [json.loads(line) for line in (run / EVENTS).read_text().splitlines()]
    assert [(event["step"], event["event"]) for event in events] == [(8, "missing"), (10, "late")]


def test_the_file_that_names_the_recorder_is_one_that_a_run_writes(late: tuple[Path, Records, Records]) -> None:
    run, a, b = late
    a.close()
    b.close()
    with pytest.warns(UserWarning, match="begins anew"):
        leave_unfinished_run(run)
    assert [entry.name[:7] for entry in run.iterdir()] == ["before-"]
