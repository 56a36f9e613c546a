"""`qsr train` that is terminated, interrupted, or whose processes are killed: nothing is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
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


@pytest.mark.parametrize("engine", [pytest.param("deepspeed", marks=pytest.mark.slow), "fsdp"])
def test_a_terminated_qsr_train_leaves_no_process_behind(recipe: Path, engine: str) -> None:
    with endless_training(recipe, engine) as (process, below):
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
        ("deepspeed", "rank 1"),
        pytest.param("deepspeed", "deepspeed.launcher.launch", marks=pytest.mark.slow),
        pytest.param("deepspeed", "deepspeed.launcher.runner", marks=pytest.mark.slow),
        pytest.param("fsdp", "torch.distributed.run", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_run_with_an_error(recipe: Path, engine: str, victim: str) -> None:
    with endless_training(recipe, engine) as (process, below):
        if victim == "rank 1":
            next(child for child in below if child.environ().get("RANK") == "1").kill()
        else:
            next(child for child in below if victim in child.cmdline()).kill()
        assert process.wait(timeout=60) != 0
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []
