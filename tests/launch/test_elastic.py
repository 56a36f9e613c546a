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
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsr_engine.checkpoint.find import find_alone
from qsr_engine.records.runs import read_run
from tests.support.launch import started_in

pytestmark = pytest.mark.launch

LIMIT = 120.0  # seconds, for anything that is waited for
STEPS = 300


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(f"""
model:
  name: timm/vit_tiny_patch16_224
  kwargs: {{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}}
engine: fsdp
data: {{shards: "{digits}", image_size: 8, augment: crop}}
batch: {{train_batch_size: 24, on_other_ranks: per_rank}}
optimizer: {{type: AdamW, gradient_clipping: 1.0}}
qsr:
  strategy: constant
  h_base: 20
  total_steps: {STEPS}
  lr: {{schedule: cosine, peak: 1e-3}}
  membership: {{way: torchft, timeout_seconds: 3}}
logging:
  {{dir: "{tmp_path / "runs"}", name: run, every: 10, eval_every: 150, checkpoint_every: 100, keep_checkpoints: 2}}
""")
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`qsr train` with such words."""
    with started_in(tmp_path, LIMIT) as start:
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


def worker(process: subprocess.Popen[str], name: str) -> psutil.Process | None:
    """The newest process of a worker."""
    found = [child for child in psutil.Process(process.pid).children() if child.environ().get("QSR_WORKER") == name]
    return max(found, key=lambda child: child.create_time(), default=None)


@pytest.mark.slow
def test_the_recorder_is_killed_and_started_again(
    tmp_path: Path, recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """One record of the run, without a gap, whoever dies; the others go on, and the one that is started again joins."""
    run = tmp_path / "runs" / "run"
    process = start(str(recipe), "--elastic", "--ranks", "3", "--restarts", "2")
    wait_for("step 60", lambda: any(row["step"] >= 60 for row in lines(run / "metrics.jsonl")), process)
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
    last = {row["step"]: row for row in lines(run / "metrics.jsonl")}[STEPS]
    assert last["eval_accuracy"] is not None
    found = read_run(run)
    assert found.finished
    assert find_alone(run / "checkpoints")[1].step == 200
    assert "worker 0 has died (signal 9) and is started again" in (tmp_path / "output-0").read_text()


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
    again = start(*words, "--ranks", "2", "--resume")
    assert again.wait(LIMIT) == 0, (tmp_path / "output-1").read_text()[-3000:]
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == list(range(10, STEPS + 1, 10))
    images = {row["step"]: row["images_seen"] for row in lines(run / "metrics.jsonl")}
    assert images[stopped] == 24 * stopped
    assert images[STEPS] == 24 * stopped + 16 * (STEPS - stopped)


@pytest.mark.slow
def test_the_recorder_is_late_and_another_worker_sleeps_until_the_others_have_ended(
    tmp_path: Path, recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Every step is recorded once, and who wakes up after the end leaves what the others have written as it is."""
    run, steps = tmp_path / "runs" / "run", 600
    changes = {"qsr.membership.grace_seconds": 1, "qsr.membership.timeout_seconds": 20, "qsr.total_steps": steps}
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    process = start(str(recipe), "--elastic", "--ranks", "3", *sets)

    def events() -> list[tuple[str, str]]:
        return [(row["event"], row["member"][0]) for row in lines(run / "events.jsonl")]

    wait_for("step 60", lambda: any(row["step"] >= 60 for row in lines(run / "metrics.jsonl")), process)
    recorder, sleeper = worker(process, "0"), worker(process, "1")
    assert recorder is not None
    assert sleeper is not None
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
