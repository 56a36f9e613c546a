"""What a run writes is read back here with TensorBoard's own reader and with json."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsr_engine.config.strict import ConfigError
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.records import TAGS, Record, WorkersRecord

RECORD = Record(
    step=10,
    images_seen=5120,
    round=2,
    period=4,
    lr=0.0021,
    loss=0.532,
    averagings=2,
    bytes_sent=2.0**24 + 1,  # the first whole number that float32, TensorBoard's type, cannot hold
    communication_percent=20.0,
    seconds_compute=4.0,
    seconds_averaging=None,
    seconds_data=0.1,
    images_per_second=1234.4,
    data_percent=1.25,
)
EVALUATED = dataclasses.replace(
    RECORD, step=20, bytes_sent=2.0**40 + 3, relative_distance=1e-3, eval_accuracy=91.24, eval_loss=0.31, sharpness=12.5
)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").open()]


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def log(folder: Path, *records: Record, **options: Any) -> str:
    """Write the records and return what was printed."""
    stream = options.pop("stream", io.StringIO())
    with Monitor(folder, 660, stream=stream, **options) as monitor:
        for record in records:
            monitor.log(record)
    return str(stream.getvalue())


def test_tensorboard_holds_the_values_of_the_jsonl(tmp_path: Path) -> None:
    log(tmp_path, RECORD, EVALUATED)
    events = events_of(tmp_path)
    written = rows(tmp_path)
    assert [row["step"] for row in written] == [10, 20]
    # Every field but the x axis has a tag, and tags without any value don't exist.
    assert {*TAGS.values(), "step"} == {field.name for field in dataclasses.fields(Record)} == set(written[0])
    assert set(events.Tags()["scalars"]) == set(TAGS) - {"time/averaging_seconds"}
    for tag in events.Tags()["scalars"]:
        expected = [(row["step"], row[TAGS[tag]]) for row in written if row[TAGS[tag]] is not None]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], tag
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=2**-24), tag
    assert len(events.Scalars("eval/accuracy")) == 1


def test_jsonl_is_exact_and_complete_after_every_record(tmp_path: Path) -> None:
    with Monitor(tmp_path, 660, tensorboard=False, stream=io.StringIO()) as monitor:
        monitor.log(EVALUATED)
        assert [Record(**row) for row in rows(tmp_path)] == [EVALUATED]
        monitor.log(RECORD)
        assert [Record(**row) for row in rows(tmp_path)] == [EVALUATED, RECORD]
    assert not list(tmp_path.glob("events*"))


def test_what_workers_told_is_in_tensorboard_one_by_one_and_as_a_range(tmp_path: Path) -> None:
    record = WorkersRecord(8, [4.0, 5.0], [0.5, 0.25], [1.0, 0.0], [0.5, 2.0], [0, 3])
    many = WorkersRecord(16, [4.0] * 40, [float(worker) for worker in range(40)], [0.0] * 40, None, [0] * 40)
    with Monitor(tmp_path, 660, stream=io.StringIO()) as monitor:
        monitor.log_workers(record)
        monitor.log_workers(many)
    lines = (tmp_path / "workers.jsonl").read_text().splitlines()
    assert [WorkersRecord(**json.loads(line)) for line in lines] == [record, many]
    events = events_of(tmp_path)
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["workers/loss_min"] == [(8, 0.25), (16, 0.0)]
    assert found["workers/loss_max"] == [(8, 0.5), (16, 39.0)]
    assert found["workers/data_percent_max"] == [(8, 25.0), (16, 0.0)]
    assert found["workers/waiting_percent_min"] == [(8, 12.5)]
    assert found["workers_waiting_percent/1"] == [(8, 40.0)]
    assert found["workers_loss/0"] == [(8, 0.5)], "of 40 workers, a curve each would be too many"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_diverged_loss_is_null_in_json_and_itself_in_tensorboard(tmp_path: Path, loss: float) -> None:
    printed = log(tmp_path, dataclasses.replace(RECORD, loss=loss))
    assert rows(tmp_path)[0]["loss"] is None
    (event,) = events_of(tmp_path).Scalars("train/loss")
    assert str(event.value) == str(loss)
    assert f"loss {loss}" in printed


def test_a_disabled_monitor_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stream = io.StringIO()
    with Monitor(folder, 660, enabled=False, stream=stream) as monitor:
        monitor.log(RECORD)
        monitor.summary(accuracy=1.0)
    assert not folder.exists()
    assert not stream.getvalue()


def test_summary_is_written_whole(tmp_path: Path) -> None:
    with Monitor(tmp_path, 660, tensorboard=False, stream=io.StringIO()) as monitor:
        monitor.summary(accuracy=91.2, losses=[0.3, math.nan], nested={"loss": math.inf}, folder=Path("a"))
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary == {"accuracy": 91.2, "losses": [0.3, None], "nested": {"loss": None}, "folder": "a"}
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "workers.jsonl", "summary.json"}


def _log_and_fail(monitor: Monitor) -> None:
    monitor.log(RECORD)
    raise ZeroDivisionError


def test_files_are_closed_when_training_fails(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 660, stream=io.StringIO())
    with pytest.raises(ZeroDivisionError), monitor:
        _log_and_fail(monitor)
    monitor.close()
    assert len(events_of(tmp_path).Scalars("train/loss")) == 1
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(ValueError, match="closed"):
        monitor.log(RECORD)


def test_metrics_of_two_runs_never_mix(tmp_path: Path) -> None:
    log(tmp_path, RECORD, tensorboard=False)
    with pytest.raises(FileExistsError):
        log(tmp_path, RECORD, tensorboard=False)


def test_plain_lines_where_no_terminal_is(tmp_path: Path) -> None:
    assert log(tmp_path, RECORD, EVALUATED, tensorboard=False).splitlines() == [
        "step 10/660  round 2  H 4  lr 0.0021  loss 0.532  1234 images/s",
        "step 20/660  round 2  H 4  lr 0.0021  loss 0.532  1234 images/s  accuracy 91.2 %",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("columns", [80, 0])
def test_progress_bar_on_a_terminal(tmp_path: Path, columns: int) -> None:
    """tqdm draws nothing on a terminal that says it has 0 columns; plain lines are printed there."""
    import termios

    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    with open(writer, "w") as terminal, open(reader, "rb", buffering=0) as screen:
        with Monitor(tmp_path, 660, tensorboard=False, stream=terminal) as monitor:
            monitor.log(dataclasses.replace(EVALUATED, step=330))
        shown = screen.read(65536).decode()
    if columns:
        last = shown.strip().split("\r")[-1].strip()
        assert last.startswith("50%|")
        assert " 330/660 [" in last
        assert last.endswith(", loss 0.532  lr 0.0021  H 4  accuracy 91.2 %]")
    else:
        assert shown == "step 330/660  round 2  H 4  lr 0.0021  loss 0.532  1234 images/s  accuracy 91.2 %\r\n"


def test_importing_monitor_and_report_leaves_torch_out() -> None:
    code = "import sys, qsr_engine.records.monitor, qsr_engine.records.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------- a disk that is full


class FullDisk:
    """A file of AppendedFile's on a disk with so much room, and one that cannot even shorten it, if so said. A stub."""

    def __init__(self, file: Any, room: int, frozen: bool = False) -> None:
        self._file, self.room, self.frozen = file, room, frozen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> int:
        part = bytes(content)[: self.room]
        if not part:
            raise OSError(28, "No space left on device")
        self.room -= len(part)
        return int(self._file.write(part))

    def truncate(self, size: int) -> int:
        if self.frozen:
            raise OSError(30, "Read-only file system")
        return int(self._file.truncate(size))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("room", [*range(0, 40, 7), 700, 2000])
def test_records_wait_while_the_disk_is_full(tmp_path: Path, room: int, frozen: bool) -> None:
    """At no time is there a part of a record, unless the file cannot be shortened; then it goes before the next one."""
    monitor = Monitor(tmp_path, 660, stream=io.StringIO())
    writers: list[Any] = [monitor._metrics, monitor._workers, *monitor._trackers]
    files = [writer._file for writer in writers]
    told = WorkersRecord(8, [4.0, 5.0], [0.5, 0.25], [1.0, 0.0], None, [0, 3])
    disks = [FullDisk(file._file, room, frozen) for file in files]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for file, disk in zip(files, disks, strict=True):
            file._file = disk
        for step in range(10, 50, 10):
            monitor.log(dataclasses.replace(EVALUATED, step=step))
            monitor.log_workers(dataclasses.replace(told, step=step))
            if not frozen:
                assert [row["step"] for row in rows(tmp_path)] == list(range(10, 50, 10))[: len(rows(tmp_path))]
        failed = [text for text in map(str, (warning.message for warning in said)) if "training goes on" in text]
        assert len(failed) == len(set(failed)) == sum(disk.room == 0 for disk in disks), "each file says it once"
        said.clear()
        for disk in disks:
            disk.room, disk.frozen = 10**9, False
        monitor.log(dataclasses.replace(EVALUATED, step=50))
        monitor.log_workers(dataclasses.replace(told, step=50))
        monitor.close()
        assert len([warning for warning in said if "is written again" in str(warning.message)]) == len(failed)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 30, 40, 50]
    assert len((tmp_path / "workers.jsonl").read_text().splitlines()) == 5
    assert [event.step for event in events_of(tmp_path).Scalars("eval/accuracy")] == [10, 20, 30, 40, 50]


def test_records_that_never_find_room_are_said_to_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real limit of the kernel on the size of a file; the oldest go where too many wait."""
    import resource

    monkeypatch.setattr("qsr_engine.records.appending.MOST_WAITING", 2000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings(record=True) as said, Monitor(tmp_path, 660, stream=io.StringIO()) as monitor:
        warnings.simplefilter("always")
        monitor.log(RECORD)
        try:
            limit = (tmp_path / "metrics.jsonl").stat().st_size + 100  # a part of the next record
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            for step in range(20, 120, 10):
                monitor.log(dataclasses.replace(RECORD, step=step))
            monitor.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["step"] for row in rows(tmp_path)] == [10]
    assert any("metrics.jsonl: 10 records are lost" in str(warning.message) for warning in said)
    assert [event.step for event in events_of(tmp_path).Scalars("train/loss")][:1] == [10]


def test_a_resumed_run_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    log(tmp_path, RECORD, EVALUATED)
    for name in ("metrics.jsonl", "workers.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"step": 20, "torn\xff')
    log(tmp_path, dataclasses.replace(RECORD, step=20), from_step=10)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    assert not (tmp_path / "workers.jsonl").read_bytes()
    assert [event.step for event in events_of(tmp_path).Scalars("train/loss")] == [10, 20]


def test_a_later_event_file_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a stub: a run resumed within a second, where the time has a digit more than before."""
    began = time.time_ns() // 10**9 * 10**9
    now = [began + 99_999_999]
    with monkeypatch.context() as patched:
        patched.setattr(time, "time_ns", lambda: now[0])
        log(tmp_path, RECORD, EVALUATED)
        now[0] += 1
        log(tmp_path, dataclasses.replace(RECORD, step=20), from_step=10)
        now[0] = began + 10**9  # the next second
        log(tmp_path, dataclasses.replace(RECORD, step=30), from_step=20)
    assert [event.step for event in events_of(tmp_path).Scalars("train/loss")] == [10, 20, 30]


def test_what_cannot_be_replaced_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping records used to empty the file first. The failure of fsync is a stub."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    log(tmp_path, RECORD, EVALUATED, tensorboard=False)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be written: No space .*make room, and resume"):
        log(tmp_path, from_step=10, tensorboard=False)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    log(tmp_path, from_step=20, tensorboard=False)  # nothing is to be dropped, so nothing is written
    with pytest.raises(ConfigError, match="room on this disk, then run the same command with `--resume`"):
        Monitor(tmp_path, 660, tensorboard=False, stream=io.StringIO(), from_step=20).summary(accuracy=1.0)
    assert not [path.name for path in tmp_path.iterdir() if "summary" in path.name or "tmp" in path.name]
