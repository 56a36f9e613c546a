"""The scripts of launch/, as they stand. tests/distributed/test_train.py and test_cluster.py run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.name)
def script(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


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


def test_the_readme_lists_every_script() -> None:
    readme = (LAUNCH / "README.md").read_text()
    assert set(re.findall(r"^\| `(?:sbatch )?(\w+\.sh)", readme, re.MULTILINE)) == {path.name for path in SCRIPTS}
