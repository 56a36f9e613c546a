"""events.jsonl, of a run whose workers come and go: what `qsr report` says of it and draws."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import yaml

from qsr_engine.records.members import MemberEvent, counts, spans
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.plots import plots
from qsr_engine.records.records import Record
from qsr_engine.records.run_folder import EVENTS, leave_unfinished_run, open_run_folder
from qsr_engine.records.runs import read_run

LINES: list[dict[str, Any]] = [
    {"step": 0, "event": "join", "member": "0.a", "members": 2},
    {"step": 0, "event": "join", "member": "1.b", "members": 2},
    {"step": 10, "event": "failed", "member": "", "members": 2, "why": "gloo"},
    {"step": 10, "event": "leave", "member": "1.b", "members": 1},
    {"step": 10, "event": "data", "member": "", "members": 1, "samples_lost": 80, "samples_twice": 0},
    {"step": 12, "event": "data", "member": "", "samples_lost": 40, "samples_twice": 9, "samples_missed": 4},
    {"step": 12, "event": "data", "member": "", "samples_lost": "?"},
]


def write_run(folder: Path) -> Path:
    open_run_folder(folder, yaml.safe_dump({"qsr": {"strategy": "constant", "h_base": 10, "total_steps": 20}}))
    costs: dict[str, Any] = {
        "averagings": 1,
        "bytes_sent": 1,
        "averagings_percent": 10.0,
        "communication_percent": 10.0,
        "seconds_averaging": 1.0,
        "seconds_data": 1.0,
        "images_per_second": 1.0,
    }
    with Monitor(folder, 20, tensorboard=False, stream=io.StringIO()) as monitor:
        record = Record(
            step=20,
            images_seen=1,
            round=1,
            period=10,
            lr=0.1,
            loss=1.0,
            bytes_percent=1.0,
            seconds_compute=1.0,
            **costs,
        )
        monitor.log(record)
    torn = '{"step": 20, "ev'
    (folder / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in LINES) + torn)
    return folder


def test_at_a_resumption_those_who_were_there_have_left() -> None:
    events = [MemberEvent(0, "join", "a"), MemberEvent(0, "join", "b"), MemberEvent(4, "leave", "b")]
    events += [MemberEvent(6, "resume", ""), MemberEvent(6, "join", "c"), MemberEvent(6, "join", "d")]
    assert spans(events, 9) == {"a": [(0, 6)], "b": [(0, 4)], "c": [(6, 9)], "d": [(6, 9)]}
    assert counts(events, 9) == [(0, 2), (4, 1), (6, 2), (9, 2)]


def test_who_came_and_went_is_a_note_and_a_picture(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    found = [(one.step, one.event, one.member) for one in run.events]
    assert found == [(line["step"], line["event"], line["member"]) for line in LINES]
    assert [one.samples for one in run.events[-3:]] == [(80, 0, 0), (40, 9, 4), (0, 0, 0)]
    (note,) = (note for note in run.notes if note.startswith("members"))
    assert note == (
        "members: 1 left, 1 averagings failed and were repeated, of their samples 120 were lost, 9 came twice and 4 "
        "were missed (events.jsonl)"
    )
    drawn = plots([run], tmp_path)
    assert "members_over_steps.png" in {file.name for file in drawn}


def test_who_is_late_is_a_member_again_when_its_movement_has_come() -> None:
    events = [
        MemberEvent(0, "join", "0.a"),
        MemberEvent(0, "join", "1.b"),
        MemberEvent(4, "missing", "0.a"),
        MemberEvent(8, "late", "0.a"),
        MemberEvent(12, "missing", "1.b"),
        MemberEvent(16, "leave", "1.b"),
    ]
    assert spans(events, 20) == {"0.a": [(0, 4), (8, 20)], "1.b": [(0, 12)]}
    assert counts(events, 20) == [(0, 2), (4, 1), (8, 2), (12, 1), (20, 1)]


def test_late_movements_are_counted_in_a_note(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    more = [
        {"step": 10, "event": "missing", "member": "0.a"},
        {"step": 20, "event": "late", "member": "0.a", "rounds": 1},
    ]
    (folder / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in [*LINES, *more]))
    (note,) = (note for note in read_run(folder).notes if "members" in note)
    assert "1 left, 1 were not there in time, 1 movements came late, 1 averagings failed" in note


def test_a_run_of_fixed_workers_has_neither(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / EVENTS).unlink()
    run = read_run(folder)
    assert not [note for note in run.notes if "members" in note]
    assert "members_over_steps.png" not in {file.name for file in plots([run], tmp_path)}


def test_a_run_that_begins_anew_keeps_them_aside(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    leave_unfinished_run(folder)
    assert not (folder / EVENTS).exists()
    assert list(folder.glob(f"before-*/{EVENTS}"))
