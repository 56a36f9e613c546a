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


def test_the_readme_lists_every_script() -> None:
    readme = (LAUNCH / "README.md").read_text()
    assert set(re.findall(r"^\| `(?:sbatch )?(\w+\.sh)", readme, re.MULTILINE)) == {path.name for path in SCRIPTS}
