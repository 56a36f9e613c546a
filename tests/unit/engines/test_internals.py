"""A DeepSpeed that does not fit is named when it is imported, not when it fails."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qsr_engine.engines.deepspeed.version import BEFORE, OLDEST, check_internals, check_version


@pytest.mark.parametrize("version", ["0.19.8", "0.19.9", "0.19.12+cu128"])
def test_versions_that_work(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.19.7", "0.17.6", "0.20.0", "1.0", "0.20.0rc1", "unknown"])
def test_versions_that_do_not(version: str) -> None:
    with pytest.raises(ImportError, match=f"and {version} is installed"):
        check_version(version)


def test_the_bounds_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    oldest, before = (".".join(map(str, bound)) for bound in (OLDEST, BEFORE))
    assert f"deepspeed>={oldest},<{before}" in project["dependencies"]


def test_what_is_missing_is_named() -> None:
    check_internals({"DeepSpeedEngine.step": True}, "0.19.8")
    with pytest.raises(ImportError, match=r"this DeepSpeed \(0.19.8\) lacks DeepSpeedEngine.step"):
        check_internals({"DeepSpeedEngine.step": False, "groups.mpu": True}, "0.19.8")


def test_an_old_one_fails_at_import() -> None:
    """The real package, which says that it is an older one."""
    code = "import deepspeed; deepspeed.__version__ = '0.17.0'; import qsr_engine; qsr_engine.initialize"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"DS_ACCELERATOR": "cpu"}
    )
    assert done.returncode == 1
    assert "ImportError: qsr_engine works with DeepSpeed 0.19.8" in done.stderr
