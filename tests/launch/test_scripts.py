"""The scripts of launch/, as they stand. test_launchers.py and tests/hosts run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qsr_engine.data.writing.processes import usable_cores

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.name)
def script(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted((LAUNCH.parent / ".ci").iterdir())], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "pip install '.[dev]' brings it"
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_are_short_and_can_be_started(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert len(lines) < (140 if script.name == "cluster.sh" else 40)
    assert max(len(line) for line in lines) <= 120
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert os.access(script, os.X_OK)


def test_scripts_name_what_is_missing(script: Path) -> None:
    done = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(r"recipe|ranks|hostfile|write: up N", done.stderr)


@pytest.mark.parametrize(
    "prefix", ["eyes1", "1eyes", "ey.s", "a|b", "eyes-", "-eyes", "Eyes", "../a", "elevenlongs", "a b"]
)
def test_a_cluster_has_a_prefix_of_letters(prefix: str) -> None:
    """With digits `down` of `eyes` would take `eyes11`, host 1 of `eyes1`, for a host of its own."""
    done = said_for(prefix)
    assert done.returncode == 1
    assert f"found '{prefix}' for QSR_PREFIX; write at most 10 of a-z and -, the first and the last one" in done.stderr


@pytest.mark.parametrize("prefix", ["", "q", "qsr", "my-eyes", "tenletters"])
def test_prefixes_that_a_cluster_may_have(prefix: str) -> None:
    """The script gets as far as its arguments, of which there are none."""
    assert "cluster.sh: found ''; write: up N" in said_for(prefix).stderr


def said_for(prefix: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "QSR_PREFIX": prefix}
    return subprocess.run([LAUNCH / "cluster.sh"], env=known, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "--standalone --max-restarts 0 --nproc_per_node 2 RECIPE --set a=b"),
        ({"RESTARTS": "5"}, "--standalone --max-restarts 5 --nproc_per_node 2 RECIPE --resume --set a=b"),
        ({"HOSTS": "2"}, "--nnodes 2 MEET --max-restarts 0 --nproc_per_node 2 RECIPE --set a=b"),
        ({"HOSTS": "2:4"}, "--nnodes 2:4 MEET --max-restarts 3 --nproc_per_node 2 RECIPE --resume --set a=b"),
        (
            {"HOSTS": "2:4", "RESTARTS": "7"},
            "--nnodes 2:4 MEET --max-restarts 7 --nproc_per_node 2 RECIPE --resume --set a=b",
        ),
    ],
    ids=lambda value: " ".join(f"{name}={text}" for name, text in value.items()) if isinstance(value, dict) else "",
)
def test_torchrun_is_told_of_restarts_and_hosts(tmp_path: Path, variables: dict[str, str], expected: str) -> None:
    """What goes on by itself must resume: torchrun counts a host that joins as no restart, so a rank cannot tell."""
    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/usr/bin/env bash\necho "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE $*"\n')
    stand_in.chmod(0o755)
    known = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "RENDEZVOUS": "first:1", **variables}
    words = [str(LAUNCH / "torchrun.sh"), "2", "RECIPE", "--set", "a=b"]
    done = subprocess.run(words, env=known, capture_output=True, text=True, check=True)
    expected = expected.replace("MEET", "--rdzv_backend c10d --rdzv_endpoint first:1")
    assert done.stdout == f"1 {expected.replace('RECIPE', '--module qsr_engine train RECIPE')}\n"


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        ("single_host.sh", {}, "--num_gpus 2 "),
        ("single_host.sh", {"CUDA_VISIBLE_DEVICES": "2,3,5"}, "--include localhost:2,3 "),
        ("single_host.sh", {"CUDA_VISIBLE_DEVICES": "2,3,5", "DS_ACCELERATOR": "cpu"}, "--num_gpus 2 "),
        ("torchrun.sh", {}, f"threads {max(1, usable_cores() // 2)} "),
        ("torchrun.sh", {"OMP_NUM_THREADS": "7"}, "threads 7 "),
    ],
)
def test_scripts_leave_a_users_gpus_and_threads_alone(
    tmp_path: Path, script: str, variables: dict[str, str], expected: str
) -> None:
    for program in ("deepspeed", "torchrun"):
        (tmp_path / program).write_text('#!/usr/bin/env bash\necho "threads ${OMP_NUM_THREADS:-} $*"\n')
        (tmp_path / program).chmod(0o755)
    left_out = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HOSTS", "RESTARTS")
    known = {name: value for name, value in os.environ.items() if name not in left_out}
    known = {**known, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **variables}
    done = subprocess.run([str(LAUNCH / script), "2", "RECIPE"], env=known, capture_output=True, text=True, check=True)
    assert expected in done.stdout


@pytest.mark.parametrize(("stops", "code", "requeued"), [(True, 0, "7\n"), (False, 3, "")])
def test_slurm_requeues_a_run_that_has_stopped_and_no_other(
    tmp_path: Path, stops: bool, code: int, requeued: str
) -> None:
    """Stand-ins: torchrun notes its arguments and ends with 3; where the run stops, it says so as rank 0 does."""
    stop = 'touch "$QSR_STOPPED_FILE"' if stops else ":"
    programs = {
        "srun": 'shift; exec "$@"',
        "torchrun": f'echo "$@" >arguments; {stop}; exit 3',
        "scontrol": '[ "$1" = requeue ] && exec echo "$2" >>requeued; echo first',
    }
    for program, script in programs.items():
        (tmp_path / program).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "requeued").touch()
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "RANKS_PER_NODE": "4"}
    known = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **job}
    done = subprocess.run([str(LAUNCH / "slurm.sh"), "RECIPE", "--set", "a=b"], env=known, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert (tmp_path / "requeued").read_text() == requeued
    expected = (
        "--nnodes 2 --nproc_per_node 4 --max-restarts 0 --rdzv_id 7 --rdzv_backend c10d --rdzv_endpoint first:29500"
    )
    assert (tmp_path / "arguments").read_text() == f"{expected} --module qsr_engine train RECIPE --resume --set a=b\n"
    assert not list(tmp_path.glob(".qsr-stopped-*"))


@pytest.mark.parametrize(
    ("variables", "lighthouse", "started", "expected"),
    [
        ({}, "http://first:29510", ["--port 29510"], "--ranks 8 --restarts 100"),
        (
            {"PORT": "29600", "RANKS_PER_NODE": "4", "RESTARTS": "5"},
            "http://first:29600",
            ["--port 29600"],
            "--ranks 4 --restarts 5",
        ),
        ({"TORCHFT_LIGHTHOUSE": "http://other:1"}, "http://other:1", [], "--ranks 8 --restarts 100"),
    ],
)
def test_an_elastic_slurm_job_has_one_lighthouse_on_its_first_node(
    tmp_path: Path, variables: dict[str, str], lighthouse: str, started: list[str], expected: str
) -> None:
    """Stand-ins: qsr notes what it is told; as lighthouse it stays, and the script ends it. Another job's is joined."""
    programs = {
        "srun": '[ "$1" = --kill-on-bad-exit=0 ] || exit 9; shift; "$@" & "$@" & wait; exit 3',
        "scontrol": '[ "$*" = "show hostnames node[1-2]" ] && printf "first\\nother\\n"',
        "qsr": 'echo "$TORCHFT_LIGHTHOUSE ${*:2}" >>"$1"; [ "$1" = train ] || { echo $$ >pid; exec sleep 1000; }',
    }
    if started:
        programs["srun"] = f"while [ ! -s pid ]; do sleep 0.01; done; {programs['srun']}"
    for program, script in programs.items():
        (tmp_path / program).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / program).chmod(0o755)
    left_out = ("TORCHFT_LIGHTHOUSE", "PORT", "RESTARTS", "RANKS_PER_NODE")
    known = {name: value for name, value in os.environ.items() if name not in left_out}
    known |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", **variables}
    words = [str(LAUNCH / "slurm_elastic.sh"), "RECIPE", "--set", "a=b"]
    done = subprocess.run(words, env={**known, "SLURM_GPUS_PER_NODE": "8"}, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 3
    assert (tmp_path / "train").read_text() == f"{lighthouse} RECIPE --elastic {expected} --set a=b\n" * 2
    there = (tmp_path / "lighthouse").read_text().splitlines() if started else []
    assert there == [f"{lighthouse} {words}" for words in started]
    if started:
        psutil.wait_procs([one for one in psutil.process_iter() if one.pid == int((tmp_path / "pid").read_text())], 10)
        assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_the_readme_lists_every_script() -> None:
    readme = (LAUNCH / "README.md").read_text()
    assert set(re.findall(r"^\| `(?:sbatch )?(\w+\.sh)", readme, re.MULTILINE)) == {path.name for path in SCRIPTS}
