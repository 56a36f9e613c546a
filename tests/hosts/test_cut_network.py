"""A host whose network is cut in a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.clusters import PREFIX, SCRIPT
from tests.support.pool import rank_environment
from tests.support.recipes import recipe_of_three_workers

pytestmark = pytest.mark.launch

SECONDS = 4.0  # qsr.faults.timeout_seconds: on a loaded machine a healthy process may stand still for one or two
LIMIT = 150.0  # for the first steps, starting three processes included, and for each of their ends


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    return recipe_of_three_workers(tmp_path, digits, SECONDS)


@pytest.mark.slow
def test_a_host_whose_network_is_cut(cluster: dict[str, str], recipe: Path) -> None:
    """Host 2 of 3, in a run that would take hours: it ends too, since it does not reach rank 0."""
    words = [sys.executable, "-m", "qsr_engine", "train", str(recipe), "--engine", "fsdp"]
    words += ["--set", "qsr.total_steps=1000000", "--set", "logging.checkpoint_every=1000000"]
    started = []
    for rank in range(3):
        on_host = {**cluster, "QSR_HOST": str(rank + 1), **rank_environment(rank, 3, 29500)}
        environment = {**os.environ, **on_host, "MASTER_ADDR": f"{PREFIX}1", "DS_ACCELERATOR": "cpu"}
        log = (recipe.parent / f"host-{rank}.log").open("w+")
        started.append((subprocess.Popen([str(SCRIPT), "run", *words], env=environment, stdout=log, stderr=log), log))
    try:
        metrics, end = recipe.parent / "runs" / "run" / "metrics.jsonl", time.monotonic() + LIMIT
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            assert time.monotonic() < end, "no step in time"
            time.sleep(0.05)  # between looks at a file, which nobody announces
        subprocess.run(["ip", "-n", f"{PREFIX}2", "link", "set", "eth0", "down"], check=True)
        said = []
        for process, log in started:
            assert process.wait(LIMIT) != 0
            log.seek(0)
            said.append(log.read())
    finally:
        for process, log in started:
            process.kill()
            log.close()
    for rank in (0, 2):
        assert f"rank 1 is lost (qsr.faults.timeout_seconds):\n  rank 1 on {PREFIX}2: no sign of life for" in said[rank]
    assert "rank 0, or torchrun's agent that holds the store, has not answered for " in said[1]
