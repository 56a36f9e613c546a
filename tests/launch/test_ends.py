"""`qsr train` that is terminated, interrupted, or whose processes are killed: nothing is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.launch import bin_folder

pytestmark = pytest.mark.launch


@contextlib.contextmanager
def endless_training(
    recipe: Path, engine: str = "deepspeed"
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """`qsr train` of a run that would take hours, once its first steps are done, and all processes below it."""
    command = [str(bin_folder() / "qsr"), "train", str(recipe), "--ranks", "2", "--set", "qsr.total_steps=1000000"]
    command += ["--engine", engine]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step ")
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= (4 if engine == "deepspeed" else 3), "two ranks, and DeepSpeed's two launchers or torchrun"
        try:
            yield process, below
        finally:
            process.terminate()


def test_a_terminated_qsr_train_leaves_no_process_behind(recipe: Path) -> None:
    """By DeepSpeed's launcher; a real torchrun and a signal are in test_launchers."""
    with endless_training(recipe) as (process, below):
        for _ in range(2):  # as schedulers do, to the process and to its group
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, "it has saved"
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []
    assert len(list((recipe.parent / "runs" / "small" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_an_interrupted_qsr_train_ends_at_once(recipe: Path) -> None:
    with endless_training(recipe) as (process, below):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []
    assert not (recipe.parent / "runs" / "small" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("engine", "victim"),
    [
        pytest.param("deepspeed", "qsr", marks=pytest.mark.slow),
        pytest.param("fsdp", "qsr_engine.cli.torchrun", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_run_with_an_error(recipe: Path, engine: str, victim: str) -> None:
    with endless_training(recipe, engine) as (process, below):
        if victim == "qsr":  # which can end nothing then; tests/unit/cli/test_launcher.py has it with stand-ins
            process.kill()
        else:
            next(child for child in below if victim in child.cmdline()).kill()
        assert process.wait(timeout=60) != 0
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param("echo 'qsr: error: why' >&2; exit 3", "qsr: error: why\n", marks=pytest.mark.slow),
        ("kill -9 $BASHPID", "qsr: error: rank 1 was ended by SIGKILL\n"),
    ],
)
def test_torchrun_adds_nothing_to_what_a_rank_says(script: str, said: str) -> None:
    """And tells of one that could say nothing. Its agent is the real one, and the ranks are shells."""
    words = ["--standalone", "--nproc-per-node", "2", "--no-python", "bash", "-c", f'[ "$RANK" = 0 ] || {script}']
    command = [sys.executable, "-m", "qsr_engine.cli.torchrun", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # of which torchrun says something else
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, said)
