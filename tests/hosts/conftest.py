from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clusters import PATH, PREFIX, SCRIPT, why_there_can_be_none


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips where there can be no hosts of network namespaces."""
    if missing := why_there_can_be_none():
        pytest.skip(missing)


@pytest.fixture
def cluster(possible: None, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Three hosts; the environment for launch/cluster.sh."""
    known = {**os.environ, "QSR_PREFIX": PREFIX, "QSR_CLUSTER": str(tmp_path / "cluster"), "PATH": PATH}
    done = subprocess.run([str(SCRIPT), "up", "3"], env=known, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    yield known
    subprocess.run([str(SCRIPT), "down"], env=known, capture_output=True, timeout=120, check=True)
