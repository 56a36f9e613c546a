"""Which launcher `qsr train` starts, what the ranks find in their environment, and how they end with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qsr_engine.cli import launcher
from qsr_engine.cli.launched import first_to_say
from qsr_engine.data.writing.processes import usable_cores

GPUS, CPU, THREADS = "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS"
SHARE = {THREADS: str(max(1, usable_cores() // 2))}
NUM_GPUS, RANKS = "--num_gpus 2", "--nproc-per-node 2"


@pytest.mark.parametrize(
    ("environment", "engine", "ranks", "restarts", "words", "more"),
    [
        ({}, "deepspeed", 2, 0, NUM_GPUS, {}),
        ({}, "fsdp", 2, 0, RANKS, SHARE),
        ({}, "deepspeed", 2, 3, "--max-restarts 3 " + RANKS, {**SHARE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
        ({}, "fsdp", 10_000, 0, "--nproc-per-node 10000", {THREADS: "1"}),
        ({THREADS: "3"}, "fsdp", 2, 0, RANKS, {}),
        ({}, "fsdp", None, 0, "--nproc-per-node auto", {}),
        ({GPUS: "2,3"}, "deepspeed", 2, 0, RANKS, SHARE),
        ({GPUS: ""}, "deepspeed", 2, 0, RANKS, SHARE),
        ({GPUS: "2,3"}, "deepspeed", None, 0, "deepspeed.launcher.runner", {}),
        ({GPUS: "2,3", CPU: "cpu"}, "deepspeed", 2, 0, NUM_GPUS, {}),
    ],
)
def test_the_launcher_leaves_a_users_gpus_and_threads_alone(
    environment: dict[str, str],
    engine: str,
    ranks: int | None,
    restarts: int,
    words: str,
    more: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed's launcher writes CUDA_VISIBLE_DEVICES anew beside --num_gpus, and torchrun OMP_NUM_THREADS where there
    is none."""
    for name in (GPUS, CPU, THREADS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command, found = launcher._launcher(engine, ranks, restarts)
    assert words in " ".join(command)
    assert found == more
    assert {name: value for name, value in os.environ.items() if name in (GPUS, CPU, THREADS)} == environment


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (3, 128 + signal.SIGTERM)])
def test_a_rank_that_was_asked_to_stop_in_the_last_round_has_finished(ends: int, code: int) -> None:
    """The signal goes to the ranks, whose launcher, here a stand-in for one, waits for them."""
    rank = f"import signal, sys; signal.signal(15, lambda *_: sys.exit({ends})); print(flush=True); signal.pause()"
    start = f"import os, signal, subprocess, sys\nrank = subprocess.Popen([sys.executable, '-c', {rank!r}], "
    start += "stdout=subprocess.PIPE, env={**os.environ, 'RANK': '0'})\nrank.stdout.readline()\n"
    start += f"os.kill({os.getpid()}, signal.SIGTERM)\nsys.exit(rank.wait())"
    assert launcher._run([sys.executable, "-c", start], {}) == code


def test_a_killed_launcher_leaves_nothing_running(tmp_path: Path) -> None:
    """SIGKILL, of which `qsr train` hears nothing. Stand-ins for a launcher and a rank in a session of its own."""
    rank = "import time; print('up', flush=True); time.sleep(600)"
    agent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    train = f"import sys; from qsr_engine.cli.launcher import _run; _run([sys.executable, '-c', {agent!r}], {{}})"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", train], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) == 3, "the guard, the launcher and the rank"
        process.kill()
        end = time.monotonic() + 20
        while any(runs(one) for one in below):
            assert time.monotonic() < end
            time.sleep(0.02)  # between looks at processes of which nobody tells
    assert list(tmp_path.iterdir()) == []


def runs(process: psutil.Process) -> bool:
    """And is not merely waiting for init to take note of its end."""
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_of_all_ranks_one_says_what_they_all_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_to_say("same", consequence=False), "nobody knows what others say without a launch"
    monkeypatch.setenv("QSR_ENGINE_LAUNCH", "x")
    monkeypatch.setenv("QSR_STOPPED_FILE", str(tmp_path / "stopped"))
    assert first_to_say("rank 1 cannot go on: same", consequence=False)
    assert not first_to_say("same", consequence=False)
    assert not first_to_say("the connection failed", consequence=True)
    assert first_to_say("another", consequence=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_say("the connection failed", consequence=True), "nothing else was said of this attempt"
