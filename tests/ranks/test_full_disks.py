"""Whole runs on disks that fill up."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.support.full_disks import files_of_at_most
from tests.support.launch import (
    qsr_job,
    records,
)
from tests.support.pool import Processes, free_port

REAL = """
import os, sys, warnings
from pathlib import Path
from tests.support import fsdp_engine
from tests.support.training import QSR
from qsr_engine.checkpoint.find import find
from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.write import _discard
folder, remount = Path(sys.argv[1]), sys.argv[2]
engine = fsdp_engine.start(QSR)
while engine.local_steps.step < 2:
    fsdp_engine.take_step(engine)
saved, failed = [], None
while failed is None:
    try:
        engine.save_checkpoint(folder, tag=f"tag-{len(saved)}")
        saved.append(f"tag-{len(saved)}")
    except CheckpointError as error:
        failed = str(error)
assert saved and "No space left on device" in failed, failed
whole = find(folder)[0].name
assert whole == saved[-1], (whole, saved)
assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(saved), list(folder.iterdir())
for old in saved[:-1]:
    _discard(folder / old)
engine.save_checkpoint(folder, tag="again", keep=1)
assert sorted(p.name for p in folder.iterdir()) == ["again", "latest"]
if remount == "read-only":
    original = engine._checkpointer.write
    def becomes_read_only(*args, **kwargs):
        original(*args, **kwargs)
        assert os.system(f"mount -o remount,ro {folder}") == 0
    engine._checkpointer.write = becomes_read_only
    try:
        engine.save_checkpoint(folder, tag="never")
    except CheckpointError as error:
        assert "Read-only file system" in str(error), error
    else:
        raise AssertionError("a read-only file system was written")
    assert find(folder)[0].name == "again"
    del engine._checkpointer.write
    assert os.system(f"mount -o remount,rw {folder}") == 0
    engine.save_checkpoint(folder, tag="after", keep=1)
    assert sorted(p.name for p in folder.iterdir()) == ["after", "latest"]
print("all was as it should be")
"""


@pytest.mark.slow
def test_a_real_file_system_that_fills_up_and_becomes_read_only(tmp_path: Path) -> None:
    """In a mount namespace of its own; one rank, on FSDP, since DeepSpeed takes longer to start."""
    mount = f"mount -t tmpfs -o size=400k none {tmp_path}"
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this kernel or its settings let nobody mount a file system in a namespace")
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [*alone, "sh", "-c", f"{mount} && exec {sys.executable} -W ignore -c '{REAL}' {tmp_path} read-only"],
        env={
            **os.environ,
            **environment,
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "all was as it should be" in done.stdout, done.stderr[-3000:]


def failing_run_job(argv: list[str], until: int) -> tuple[int, str, str, list[str]]:
    """`qsr train` where the file of rank 1 finds no room in the first so many checkpoints; also what was warned of."""
    checkpointer: Any = importlib.import_module("qsr_engine.checkpoint.checkpointer")

    saves, original = [], checkpointer.write_rank

    def write(path: Path, state: dict[str, Any]) -> None:
        saves.append(path)
        with files_of_at_most(1000 if len(saves) <= until and dist.get_rank() == 1 else None):
            original(path, state)

    checkpointer.write_rank = write
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            result = qsr_job(argv)
    finally:
        checkpointer.write_rank = original
    return *result, [str(warning.message) for warning in said if "checkpoint" in str(warning.message)]


@pytest.mark.fast_cells(0, of=2)
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_run_goes_on_when_checkpoints_fail(processes: Processes, recipe: Path, engine: str) -> None:
    """To the same model as without any checkpoint; only rank 1 finds no room, twice, and then there is some."""
    sets = ["logging.name=failed", "logging.checkpoint_every=2", "logging.keep_checkpoints=2", "logging.every=1"]
    words = [word for text in sets for word in ("--set", text)]
    argv = ["train", str(recipe), "--engine", engine, "--set", "qsr.alpha=0"]  # a boundary every 2 steps
    results = processes.run(failing_run_job, argv=[*argv, *words], until=2)
    for code, _, err, _ in results:
        assert code == 0, err
    warned = results[0][3]
    assert not results[1][3], "rank 0 says it"
    assert [text.partition(":")[0] for text in warned] == ["step 2", "step 4"]
    assert all("there is no whole one yet; training goes on" in text and "rank 1: " in text for text in warned)
    run = recipe.parent / "runs" / "failed"
    assert [record["checkpoints_failed"] for record in records(run)][:6] == [0, 0, 1, 1, 2, 2]
    assert json.loads((run / "summary.json").read_text())["checkpoints_failed"] == 2
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert len(kept) == 3
    assert kept[0] == "latest"
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--set", "logging.name=without"]):
        assert code == 0, err
    with_failures, without = (load_file(run.parent / n / "model.safetensors") for n in ("failed", "without"))
    assert all(torch.equal(with_failures[name], value) for name, value in without.items())


def full_at_the_end_job(argv: list[str], file: str) -> tuple[int, str, str]:
    """`qsr train` where the last files of the run find no room, and the metrics neither for a while."""
    import importlib

    train: Any = importlib.import_module("qsr_engine.training.loop")
    monitor: Any = importlib.import_module("qsr_engine.records.monitor")
    owner, name = (train, "save_model") if file == "model.safetensors" else (monitor.Monitor, "summary")
    original = getattr(owner, name)

    def limited(*args: Any, **kwargs: Any) -> Any:
        with files_of_at_most(100 if dist.get_rank() == 0 else None):
            return original(*args, **kwargs)

    setattr(owner, name, limited)
    try:
        return qsr_job(argv)
    finally:
        setattr(owner, name, original)


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("file", ["model.safetensors", "summary.json"])
def test_a_run_whose_last_files_find_no_room_is_resumed(processes: Processes, recipe: Path, file: str) -> None:
    argv = [
        "train",
        str(recipe),
        "--engine",
        "fsdp",
        "--set",
        "logging.name=full",
        "--set",
        "logging.checkpoint_every=4",
    ]
    code, _, err = processes.run(full_at_the_end_job, argv=argv, file=file)[0]
    run = recipe.parent / "runs" / "full"
    assert code == 1
    for words in (f"{run / file}: cannot be written: ", "make room on this disk", "`--resume`", "checkpoints"):
        assert words in err
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp") or path.name == file]
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 0, err
    assert (run / file).exists()
    assert records(run)[-1]["step"] == 14
