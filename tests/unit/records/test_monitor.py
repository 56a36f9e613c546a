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
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from qsr_engine.cli.main import main
from qsr_engine.config.strict import ConfigError
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.records import TAGS, Record, WorkersRecord
from qsr_engine.records.tensorboard import COUNTERS, About, TensorBoard
from tests.support.recipes import small_recipe

RECORD = Record(
    step=10,
    images_seen=5120,
    round=2,
    period=4,
    lr=0.0021,
    loss=0.532,
    averagings=2,
    bytes_sent=2.0**24 + 1,  # the first whole number that float32, TensorBoard's type, cannot hold
    averagings_percent=20.0,
    communication_percent=20.0,
    bytes_percent=35.6,
    seconds_compute=4.0,
    seconds_averaging=None,
    seconds_data=0.1,
    images_per_second=1234.4,
    data_percent=1.25,
)
FIRST = dataclasses.replace(RECORD, step=0, loss=None, images_per_second=None, eval_accuracy=10.0)
EVALUATED = dataclasses.replace(
    RECORD,
    step=20,
    bytes_sent=2.0**40 + 3,
    relative_distance=1e-3,
    largest_z=2.5,
    eval_accuracy=91.24,
    eval_top5_accuracy=99.5,
    eval_loss=0.31,
    best_accuracy=91.24,
    best_step=20,
    tokens_seen=327_680,
    tokens_per_second=79_001.5,
    eval_perplexity=1.36,
    eval_bits_per_byte=0.45,
    best_loss=0.31,
    sharpness=12.5,
    train_accuracy=70.5,
    loss_scale=1024.0,
    gradient_norm=0.5,
    parameter_norm=30.0,
    exp_avg_norm=1e-2,
    exp_avg_sq_norm=1e-6,
    momentum_buffer_norm=2.0,
    skipped_samples=2,
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
    # Every field but the x axis and an old name has a tag, and tags without any value don't exist.
    assert (
        {*TAGS.values(), "step", "communication_percent"}
        == {field.name for field in dataclasses.fields(Record)}
        == set(written[0])
    )
    nothing = {tag for tag in COUNTERS if not any(row[TAGS[tag]] for row in written)}
    assert nothing == COUNTERS - {"data/skipped_samples"}, "what went never wrong has no card"
    assert set(events.Tags()["scalars"]) == set(TAGS) - {"time/averaging_seconds"} - nothing
    for tag in events.Tags()["scalars"]:
        known = [(row["step"], row[TAGS[tag]]) for row in written if row[TAGS[tag]] is not None]
        expected = [(step, value) for step, value in known if value or tag not in COUNTERS]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], tag
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=2**-24), tag
    assert len(events.Scalars("eval/accuracy")) == 1


def test_every_name_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "records.md").read_text()
    rows = [row.split("|") for row in page.partition("## Names")[2].splitlines() if row.startswith("| `")]
    listed = {(tag, name) for row in rows for tag, name in zip(row[1].split(","), row[2].split(","), strict=True)}
    assert {(tag.strip(" `"), name.strip(" `")) for tag, name in listed} == set(TAGS.items())


def test_jsonl_is_exact_and_complete_after_every_record(tmp_path: Path) -> None:
    with Monitor(tmp_path, 660, tensorboard=False, stream=io.StringIO()) as monitor:
        monitor.log(EVALUATED)
        assert [Record(**row) for row in rows(tmp_path)] == [EVALUATED]
        monitor.log(RECORD)
        assert [Record(**row) for row in rows(tmp_path)] == [EVALUATED, RECORD]
    assert not list(tmp_path.glob("events*"))


def test_what_workers_told_is_in_tensorboard_one_by_one_and_as_a_range(tmp_path: Path) -> None:
    record = WorkersRecord(8, [4.0, 5.0], [0.5, 0.25], [1.0, 0.0], [0.5, 2.0], [0, 3], [60.0, 70.0])
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
    assert found["workers/accuracy_mean"] == [(8, 65.0)]
    assert found["workers/data_percent_max"] == [(8, 25.0), (16, 0.0)]
    assert found["workers/waiting_percent_min"] == [(8, 12.5)]
    assert sum(tag.startswith("worker") for tag in found) == 12, "no card a worker"
    each = [events_of(tmp_path / "tensorboard" / f"worker-{worker}") for worker in range(2)]
    assert [event.value for event in each[1].Scalars("worker/accuracy")] == [70.0]
    assert [event.value for event in each[1].Scalars("worker/waiting_percent")] == [40.0]
    assert [(e.step, e.value) for e in each[0].Scalars("worker/loss")] == [(8, 0.5)], "of 40, too many curves"
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_has_a_layout_the_recipe_and_what_it_leads_to(tmp_path: Path) -> None:
    about = About({"qsr": {"h_base": 4, "strategy": "qsr"}, "seed": 0, "b": True}, "qsr:\n  h_base: 4", [(1, 4, 0.5)])
    log(tmp_path, RECORD, about=about)
    log(tmp_path, EVALUATED, about=about, from_step=10)
    events = events_of(tmp_path)
    (layout,) = [
        layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        for event in events.Tensors("custom_scalars__config__")
    ]
    titles = [category.title for category in layout.category]
    assert titles[:5] == ["train", "eval", "H and learning rate", "communication", "time"]
    drawn = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    assert {tag.strip("^$") for tag in drawn} <= set(TAGS)
    margins = [series for chart in layout.category[-1].chart for series in chart.margin.series]
    told = WorkersRecord(8, [4.0], [0.5], [1.0], [0.5], [0], [60.0]).scalars()
    assert {tag for series in margins for tag in (series.value, series.lower, series.upper)} == set(told)
    (text,) = events.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val[0] == b"\tqsr:\n\t  h_base: 4\n"
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    keys = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    assert keys == {"qsr.h_base": 4, "qsr.strategy": "qsr", "seed": 0, "b": True}
    predicted = events_of(tmp_path / "tensorboard" / "predicted")
    assert [(event.step, event.value) for event in predicted.Scalars("local_steps/period")] == [(1, 4)]
    assert [(event.step, event.value) for event in predicted.Scalars("train/lr")] == [(1, 0.5)]


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


def test_plain_lines_where_no_terminal_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what takes time beside training, and how long the rest will at the pace so far."""
    stream = io.StringIO()
    now = [100.0]
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: now[0])
        with Monitor(tmp_path, 660, tensorboard=False, stream=stream) as monitor:
            for seconds, record in ((0, FIRST), (20, RECORD), (40, EVALUATED)):
                now[0] += seconds
                monitor.log(record)
            with monitor.phase("saving", 25):
                pass
            monitor.log(dataclasses.replace(RECORD, step=660))
    assert stream.getvalue().splitlines() == [
        "step 0/660  round 2  H 4  lr 0.0021  accuracy 10.0 %",
        "step 10/660  round 2  H 4  lr 0.0021  loss 0.532  1234 images/s  21.7 min left",
        "step 20/660  round 2  H 4  lr 0.0021  loss 0.532  1234 images/s  accuracy 91.2 %  32 min left",
        "saving after step 25",
        "step 660/660  round 2  H 4  lr 0.0021  loss 0.532  1234 images/s",
    ]


def test_a_run_ends_with_what_came_of_it(tmp_path: Path) -> None:
    known = {"steps": 660, "seconds_training": 192.0, "eval_accuracy": 91.24, "best_accuracy": 91.5, "best_step": 600}
    known |= {"averagings": 42, "averagings_percent": 6.36, "bytes_sent": 12_300_000}
    (tmp_path / "model.safetensors").touch()
    stream = io.StringIO()
    with Monitor(tmp_path, 660, tensorboard=False, stream=stream) as monitor:
        monitor.summary(**known, partial=False, eval_top5_accuracy=None)
    assert stream.getvalue().splitlines() == [
        "done after 660 steps and 3.2 min of training",
        "accuracy 91.24 %, best 91.50 % at step 600",
        "42 averagings, 6.4 % of the steps; 12.3 MB have left each worker",
        f"model: {tmp_path}/model.safetensors",
        f"pictures: qsr report {tmp_path}",
    ]


def read_to_the_end(reader: int) -> bytes:
    """What a terminal that is closed now was shown. One read gives what the kernel has passed on, which may be less."""
    found = b""
    with open(reader, "rb", buffering=0) as screen, suppress(OSError):  # Linux ends it with an error
        while part := screen.read(65536):
            found += part
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("columns", [80, 0])
def test_progress_bar_on_a_terminal(tmp_path: Path, columns: int) -> None:
    """tqdm draws nothing on a terminal that says it has 0 columns; plain lines are printed there."""
    import termios

    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, columns))
    with open(writer, "w") as terminal, Monitor(tmp_path, 660, tensorboard=False, stream=terminal) as monitor:
        if columns:
            monitor.log(FIRST)
            with monitor.phase("evaluating", 330):
                pass
        monitor.log(dataclasses.replace(EVALUATED, step=330))
    shown = read_to_the_end(reader).decode()
    if columns:
        last = shown.strip().split("\r")[-1].strip()
        assert last.startswith("50%|")
        assert " 330/660 [" in last
        assert ", lr 0.0021  H 4  accuracy 10.0 %]" in shown
        assert ", evaluating]" in shown
        assert last.endswith(", loss 0.532  lr 0.0021  H 4  accuracy 91.2 %]")
    else:
        assert shown.startswith("step 330/660  round 2  H 4  lr 0.0021  loss 0.532  1234 images/s  accuracy 91.2 %  ")


@pytest.mark.parametrize("fails", [False, True])
def test_a_service_gets_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Accelerate's own tracker, and a stand-in for the package of the service, which one run does not reach."""
    found: list[Any] = []

    def say(values: dict[str, float], step: int) -> None:
        if fails:
            raise ConnectionError("no way to the service")
        found.append((step, values))

    run = SimpleNamespace(log=say, finish=lambda: found.append("finished"))
    config = SimpleNamespace(update=lambda values, **_: found.append(values))

    def init(**options: Any) -> Any:
        found.append(options)
        return run

    service: Any = ModuleType("wandb")
    service.__spec__, service.init, service.config = ModuleSpec("wandb", None), init, config
    monkeypatch.setitem(sys.modules, "wandb", service)
    about = About({"qsr": {"h_base": 4, "averaging": {}}, "seed": 0})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        log(tmp_path, RECORD, EVALUATED, tensorboard=False, services=["wandb"], about=about)
    assert found[:2] == [
        {"project": "qsr_engine", "name": tmp_path.name, "dir": str(tmp_path)},
        {"qsr.h_base": 4, "qsr.averaging": "{}", "seed": 0},
    ]
    assert len(rows(tmp_path)) == 2
    told = [str(warning.message) for warning in said if "wandb" in str(warning.message)]
    if fails:
        assert told == ["wandb failed (no way to the service); training goes on without it"]
    else:
        assert found[2:] == [(10, RECORD.scalars()), (20, EVALUATED.scalars()), "finished"]


def test_services_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_recipe(tmp_path, tmp_path / "none")
    for trackers, words in (
        ("[dvclive]", "logging.trackers holds 'dvclive', and not installed is dvclive; write `pip install dvclive`"),
        ("[wandbb]", "logging.trackers"),
        ("[tensorboard]", "trackers holds 'tensorboard', and tensorboard is false"),
    ):
        sets = ["--set", f"logging.trackers={trackers}", "--set", "logging.tensorboard=false"]
        assert main(["train", str(recipe), "--dry-run", *sets]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"clearml cannot begin: .*or leave it out"):
        Monitor(tmp_path, 660, tensorboard=False, services=["clearml"], stream=io.StringIO())


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
    (board,) = monitor._trackers
    assert isinstance(board, TensorBoard)
    writers: list[Any] = [monitor._metrics, monitor._workers, board._main]
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
