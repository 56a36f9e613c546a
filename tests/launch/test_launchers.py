"""Real launches: DeepSpeed's launcher, torchrun, the scripts of launch/."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from qsr_engine.data import write_digits
from tests.support.launch import LAUNCH, bin_folder, launch, start_script
from tests.support.pool import free_port
from tests.support.recipes import STEPS

pytestmark = pytest.mark.launch


def test_a_real_deepspeed_launch(recipe: Path, tmp_path: Path) -> None:
    deepspeed = [str(bin_folder() / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    done = launch(*deepspeed, "--module", "qsr_engine", "train", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS}/{STEPS}" in done.stdout
    run = tmp_path / "runs" / "small"
    assert json.loads((run / "summary.json").read_text())["ranks"] == 2
    report = launch(str(bin_folder() / "qsr"), "report", str(run), cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert "qsr H>=2 alpha=0.006" in report.stdout


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes. Its programs are stand-ins, as there is no SLURM here: srun starts the
    command once for every node, and scontrol notes what it is asked to requeue."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    srun = '#!/usr/bin/env bash\nshift\nfor node in $(seq $SLURM_NNODES); do "$@" & all+=($!); done\n'
    (stand_ins / "srun").write_text(srun + "for one in ${all[@]}; do wait $one || exit 1; done\n")
    requeue = f'[ "$1" = requeue ] && exec echo "$2" >>{tmp_path}/requeued'
    (stand_ins / "scontrol").write_text(f"#!/usr/bin/env bash\n{requeue}\nprintf '127.0.0.1\\nother\\n'\n")
    for program in stand_ins.iterdir():
        program.chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "RANKS_PER_NODE": "1"}
    path = os.pathsep.join([str(stand_ins), str(bin_folder()), os.environ["PATH"]])
    return job | {"PORT": str(free_port()), "PATH": path}


@pytest.mark.slow
def test_a_preempted_slurm_job_is_requeued(recipe: Path, slurm: dict[str, str]) -> None:
    """SLURM sends SIGUSR1 to the step's tasks, which are torchrun's agents, some time before it kills them."""
    words = [str(LAUNCH / "slurm.sh"), str(recipe), "--engine", "fsdp", "--set", "qsr.total_steps=1000000"]
    run = recipe.parent / "runs" / "small"
    process = start_script(*words, **slurm)
    end = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < end, "no step in time"
        time.sleep(0.05)  # between looks at a file, which nobody announces
    tasks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "torchrun" in child.cmdline()[1]
    ]
    assert len(tasks) == 2
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert (recipe.parent / "requeued").read_text() == "7\n"
    assert "the run was asked to stop, and has stopped after step" in said
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_qsr_train_starts_the_launcher_and_passes_on_its_exit_code(recipe: Path, tmp_path: Path) -> None:
    """A sample whose image is another file, on whichever rank reads it: the run ends with the shard, and not 0."""
    write_digits(tmp_path / "data")
    _spoil(tmp_path / "data")
    command = [str(bin_folder() / "qsr"), "train", str(recipe), "--ranks", "2"]
    done = launch(*command, "--set", f"data.shards={tmp_path / 'data'}", cwd=tmp_path)
    assert done.returncode == 1
    assert "train-000002.tar" in done.stderr
    assert "it is damaged or was replaced" in done.stderr
    assert f"step {STEPS}/" not in done.stdout
    assert "Traceback" not in done.stderr


def _spoil(folder: Path) -> None:
    """Rename one image of one shard in place, so that its size stays right."""
    shard = folder / "train-000002.tar"
    data = shard.read_bytes()
    at = data.index(b".png\0")
    header = bytearray(data[at - at % 512 : at - at % 512 + 512])
    place = header.index(b".png")
    header[place : place + 4] = b".txt"
    header[148:156] = b" " * 8  # the checksum counts its own field as blanks
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    start = at - at % 512
    shard.write_bytes(data[:start] + bytes(header) + data[start + 512 :])
