"""`qsr train --elastic`: a lighthouse and workers on one host, one of which is killed again and again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsr_engine.checkpoint.find import find_alone
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.data import read_index
from qsr_engine.data.loader import TrainLoader
from qsr_engine.membership.quorum import start_lighthouse
from qsr_engine.records.runs import read_run
from tests.support.launch import started_in, variables_of
from tests.support.pool import free_port
from tests.support.reads import Read, environment, reads_of
from tests.support.recipes import ELASTIC_STEPS as STEPS
from tests.support.recipes import elastic_recipe

pytestmark = pytest.mark.launch

LIMIT = 120.0  # seconds, for anything that is waited for


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    return elastic_recipe(tmp_path, digits)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`qsr train` with such words."""
    with started_in(tmp_path, LIMIT, **environment(tmp_path)) as start:
        yield partial(start, sys.executable, "-m", "qsr_engine", "train")


def wait_for(what: str, found: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    end = time.monotonic() + LIMIT
    while not (value := found()):
        assert time.monotonic() < end, f"{what} did not happen"
        assert process.poll() is None, f"it ended before {what}"
        time.sleep(0.05)
    return value


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved(run: Path) -> list[int]:
    """The steps of the checkpoints that are there."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def check_events(run: Path) -> None:
    """TensorBoard shows every record once, at its step, whoever has written it."""
    events, rows = EventAccumulator(str(run)).Reload(), lines(run / "metrics.jsonl")
    for tag, name in (("train/loss", "loss"), ("train/lr", "lr"), ("eval/accuracy", "eval_accuracy")):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [(row["step"], pytest.approx(row[name])) for row in rows if row[name] is not None]


def worker(process: subprocess.Popen[str], name: str) -> psutil.Process | None:
    """The newest process of a worker."""
    found = [child for child in psutil.Process(process.pid).children() if variables_of(child).get("QSR_WORKER") == name]
    return max(found, key=lambda child: child.create_time(), default=None)


def steps_read(folder: Path, worker: str) -> int:
    """Batches of one stream that the first process of a worker has been given."""
    return len(next(batches for name, batches in reads_of(folder).items() if name.startswith(worker)))


@pytest.mark.slow
def test_the_recorder_is_killed_and_started_again(
    tmp_path: Path, recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """One record of the run, without a gap, whoever dies; the others go on, and the one that is started again joins.

    They divide the step that three began with, so that every sample comes once an epoch, but for those of the round in
    which a worker died, which are counted.
    """
    run = tmp_path / "runs" / "run"
    process = start(str(recipe), "--elastic", "--ranks", "3", "--restarts", "2")

    def records_inside_a_round() -> bool:
        """It has recorded a step after a boundary, which the one that takes over records anew."""
        last = lines(run / "metrics.jsonl")[-1:]
        recorded = bool(last) and last[0]["step"] >= 60 and last[0]["step"] % 20 == 10
        return recorded and steps_read(tmp_path, "0.") % 20 in range(10, 17)

    wait_for("a record inside a round", records_inside_a_round, process)
    (first,) = {row["member"] for row in lines(run / "events.jsonl") if row["member"].startswith("0.")}
    victim = worker(process, "0")
    assert victim is not None
    victim.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT) == 0, (tmp_path / "output-0").read_text()[-3000:]
    steps = [row["step"] for row in lines(run / "metrics.jsonl")]
    assert steps == list(range(10, STEPS + 1, 10))
    events = [(row["event"], row["member"]) for row in lines(run / "events.jsonl")]
    assert Counter(event for event, _ in events)["leave"] >= 1
    assert ("leave", first) in events
    check_events(run)
    last = {row["step"]: row for row in lines(run / "metrics.jsonl")}[STEPS]
    assert last["eval_accuracy"] is not None
    found = read_run(run)
    assert found.finished
    assert find_alone(run / "checkpoints")[1].step == 200
    assert "worker 0 has died (signal 9) and is started again" in (tmp_path / "output-0").read_text()
    check_what_was_read(tmp_path, run)


def check_what_was_read(folder: Path, run: Path) -> None:
    """In the run of three workers, of which the first was killed once and started again."""
    rows = lines(run / "metrics.jsonl")
    assert [row["images_seen"] for row in rows] == [24 * row["step"] for row in rows]
    data = [event for event in lines(run / "events.jsonl") if event["event"] == "data"]
    counts = {name: sum(event[name] for event in data) for name in ("samples_lost", "samples_twice", "samples_missed")}
    assert counts == {"samples_lost": 20 * 8, "samples_twice": 0, "samples_missed": 0}  # a round of H = 20
    assert [event["members"] for event in data] in ([2], [2, 3])  # the run may be over before it joins
    assert not [event for event in lines(run / "events.jsonl") if event["event"] == "batch"]
    summary = json.loads((run / "summary.json").read_text())
    assert {name: summary[name] for name in counts} == counts
    reads = reads_of(folder)
    times = Counter(sample for batches in reads.values() for _, batch in batches for sample in batch)
    recipe = load_recipe(run / "recipe.yaml")
    index = read_index(recipe.data.shards)
    assigned = Counter[Read]()
    for stream in range(3):
        place = {"rank": stream, "ranks": 3, "batch_size": 8, "seed": recipe.seed}
        raw_batches = TrainLoader(recipe.data.shards, index, recipe.data, **place).raw_batches()
        assigned.update((item.shard, item.number) for batch in islice(raw_batches, STEPS) for item in batch.items)
    assert assigned.total() == 24 * STEPS
    assert times <= assigned
    began = [batches for batches in reads.values() if batches[0][0] == 0]
    assert len(began) == 3
    victim = next(batches for name, batches in reads.items() if name.startswith("0.") and batches[0][0] == 0)
    assert assigned.total() - times.total() == 8 * (20 - len(victim) % 20)  # nobody read the rest of its round
    undisturbed = Counter(sample for batches in began for _, batch in batches[:60] for sample in batch)
    samples = index.split(recipe.data.train).samples  # in an epoch, which ends in step 60
    assert (undisturbed.total(), len(undisturbed)) == (24 * 60, samples) == (1440, 1437)


@pytest.mark.slow
def test_all_are_stopped_and_go_on_from_the_last_checkpoint_with_fewer_workers(
    tmp_path: Path, recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "runs" / "run"
    words = (str(recipe), "--elastic", "--set", "qsr.faults.on_signal=finish_round", "--set", "engine=deepspeed")
    process = start(*words, "--ranks", "3")
    wait_for("step 60", lambda: any(row["step"] >= 60 for row in lines(run / "metrics.jsonl")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 75, (tmp_path / "output-0").read_text()[-3000:]
    stopped = find_alone(run / "checkpoints")[1].step
    assert stopped >= 60
    assert stopped % 20 == 0  # on a boundary
    assert [step for step in saved(run) if step % 100] == [stopped] * (stopped % 100 > 0)
    assert "where all have, the run goes on with `--resume`" in (tmp_path / "output-0").read_text()
    again = start(*words, "--ranks", "2", "--resume")
    assert again.wait(LIMIT) == 0, (tmp_path / "output-1").read_text()[-3000:]
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == list(range(10, STEPS + 1, 10))
    images = {row["step"]: row["images_seen"] for row in lines(run / "metrics.jsonl")}
    assert images == {step: 24 * step for step in images}  # two divide what three had: 16 samples, and 8
    events = [event["event"] for event in lines(run / "events.jsonl")]
    assert events == ["join"] * 3 + ["resume"] + ["join"] * 2  # and nothing of batch and data


@pytest.mark.slow
def test_a_stop_inside_a_round_leaves_one_checkpoint(
    tmp_path: Path, recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """The recorder is behind the others, which wait for it at the boundary when all are asked to stop. It saves its
    part of the round; they average without it, one of them takes over the records, and saves nothing."""
    run = tmp_path / "runs" / "run"
    sets = ("qsr.h_base=100", "logging.checkpoint_every=1000", "qsr.membership.timeout_seconds=8")
    process = start(str(recipe), "--elastic", "--ranks", "3", *(word for text in sets for word in ("--set", text)))
    wait_for("step 110", lambda: any(row["step"] >= 110 for row in lines(run / "metrics.jsonl")), process)
    recorder = worker(process, "0")
    assert recorder is not None
    recorder.send_signal(signal.SIGSTOP)
    time.sleep(3)  # in which the others come to the boundary; where they do not, they stop inside the round as well
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    recorder.send_signal(signal.SIGCONT)
    assert process.wait(LIMIT) == 75, (tmp_path / "output-0").read_text()[-3000:]
    (stopped,) = saved(run)
    assert 110 <= stopped < 200


@pytest.mark.slow
def test_all_workers_are_lost_and_the_run_goes_on_from_the_last_checkpoint(
    tmp_path: Path, recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    run = tmp_path / "runs" / "run"
    words = (str(recipe), "--elastic", "--ranks", "2")
    process = start(*words)
    wait_for("step 130", lambda: any(row["step"] >= 130 for row in lines(run / "metrics.jsonl")), process)
    victims = [worker(process, name) for name in "01"]
    for victim in victims:
        assert victim is not None
        victim.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT) == 128 + signal.SIGKILL, (tmp_path / "output-0").read_text()[-3000:]
    assert saved(run)[-1] in (100, 200)
    again = start(*words, "--resume")
    assert again.wait(LIMIT) == 0, (tmp_path / "output-1").read_text()[-3000:]
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == list(range(10, STEPS + 1, 10))
    assert all(row["images_seen"] == 24 * row["step"] for row in lines(run / "metrics.jsonl"))
    check_events(run)
    assert read_run(run).finished


@pytest.mark.slow
def test_a_host_that_is_stopped_leaves_and_the_other_one_goes_on(
    tmp_path: Path, recipe: Path, start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that leaves has recorded the run. It hands that over, and saves nothing; the other one, when it is
    stopped as well, saves at its next boundary."""
    run, port = tmp_path / "runs" / "run", free_port()
    lighthouse = start_lighthouse(port, 3.0)
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", f"http://127.0.0.1:{port}")
    sets = ("qsr.total_steps=1000000", "logging.checkpoint_every=1000000", "qsr.faults.on_signal=finish_round")
    words = (str(recipe), "--elastic", "--ranks", "1", *(word for text in sets for word in ("--set", text)))
    first = start(*words)
    wait_for("step 20", lambda: any(row["step"] >= 20 for row in lines(run / "metrics.jsonl")), first)
    second = start(*words)
    wait_for("a second member", lambda: any(row["members"] == 2 for row in lines(run / "events.jsonl")), second)
    first.send_signal(signal.SIGTERM)
    assert first.wait(LIMIT) == 75, (tmp_path / "output-0").read_text()[-3000:]
    assert saved(run) == []
    left = lines(run / "metrics.jsonl")[-1]["step"]
    wait_for("the other one", lambda: lines(run / "metrics.jsonl")[-1]["step"] >= left + 40, second)
    second.send_signal(signal.SIGTERM)
    assert second.wait(LIMIT) == 75, (tmp_path / "output-1").read_text()[-3000:]
    lighthouse.shutdown()
    (stopped,) = saved(run)
    assert stopped % 20 == 0
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == list(range(10, stopped + 1, 10))
    check_events(run)


@pytest.mark.slow
def test_the_recorder_is_late_and_another_worker_sleeps_until_the_others_have_ended(
    tmp_path: Path, recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Every step is recorded once, and who wakes up after the end leaves what the others have written as it is."""
    run, steps = tmp_path / "runs" / "run", 1500
    changes = {"qsr.membership.grace_seconds": 1, "qsr.membership.timeout_seconds": 20, "qsr.total_steps": steps}
    changes["qsr.h_base"] = 100  # a round is long beside an averaging, in which the others would wait for the time-out
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    process = start(str(recipe), "--elastic", "--ranks", "3", *sets)

    def events() -> list[tuple[str, str]]:
        return [(row["event"], row["member"][:1]) for row in lines(run / "events.jsonl")]

    def inside_a_round() -> bool:
        last = lines(run / "metrics.jsonl")[-1:]
        return bool(last) and last[0]["step"] > 100 and last[0]["step"] % 100 in range(10, 60)

    wait_for("step 110", lambda: any(row["step"] >= 110 for row in lines(run / "metrics.jsonl")), process)
    recorder, sleeper = worker(process, "0"), worker(process, "1")
    assert recorder is not None
    assert sleeper is not None
    wait_for("the inside of a round", inside_a_round, process)
    recorder.send_signal(signal.SIGSTOP)
    wait_for("going on without it", lambda: ("missing", "0") in events(), process)
    recorder.send_signal(signal.SIGCONT)
    wait_for("its movement", lambda: ("late", "0") in events(), process)
    sleeper.send_signal(signal.SIGSTOP)
    wait_for("the end", lambda: (run / "summary.json").exists(), process)
    files = [run / name for name in ("summary.json", "metrics.jsonl", "events.jsonl", "model.safetensors")]
    written = [file.read_bytes() for file in files]
    sleeper.send_signal(signal.SIGCONT)
    assert process.wait(LIMIT) == 0, (tmp_path / "output-0").read_text()[-3000:]
    assert [file.read_bytes() for file in files] == written
    every = list(range(10, steps + 1, 10))
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == every
    assert [point.step for point in EventAccumulator(str(run)).Reload().Scalars("train/loss")] == every
    assert lines(run / "metrics.jsonl")[-1]["late"] == events().count(("late", "0"))
    assert ("leave", "0") not in events()
    assert any("came late" in note for note in read_run(run).notes)
