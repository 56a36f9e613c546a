"""launch/elastic.sh: workers that come and go on two hosts, of which one dies."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from qsr_engine.records.runs import read_run
from tests.support.clusters import PREFIX, SCRIPT
from tests.support.launch import LAUNCH, variables_of
from tests.support.recipes import ELASTIC_STEPS, elastic_recipe

pytestmark = pytest.mark.launch

LIMIT = 240.0  # seconds, for anything that is waited for: two launchers and three starts of a worker


def worker_on(host: str) -> psutil.Process:
    """The only worker of a host."""
    listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True).stdout
    there = [psutil.Process(int(pid)) for pid in listed.split()]
    (found,) = (process for process in there if variables_of(process).get("QSR_WORKER") == f"{host}-0")
    return found


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_worker_on_one_of_two_hosts_dies_and_joins_again(
    cluster: dict[str, str], tmp_path: Path, digits: Path
) -> None:
    """As many as membership.min_workers says, so that the other host waits at a boundary until it is there again."""
    recipe, hosts, run = elastic_recipe(tmp_path, digits), tmp_path / "hosts", tmp_path / "runs" / "run"
    hosts.write_text(f"# the third host has no part in it\n{PREFIX}1 slots=1\n{PREFIX}2 slots=1\n")
    words = [str(SCRIPT), "run", str(LAUNCH / "elastic.sh"), str(hosts), str(recipe), "1"]
    words += ["--set", "qsr.membership.min_workers=2"]
    known = {**cluster, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(words, env=known, stdout=output, stderr=output)
    try:
        end = time.monotonic() + LIMIT
        while len(rows(run / "metrics.jsonl")) < 5:
            assert process.poll() is None, (tmp_path / "output").read_text()[-3000:]
            assert time.monotonic() < end, "no step in time"
            time.sleep(0.05)  # between looks at a file, which nobody announces
        worker_on(f"{PREFIX}2").send_signal(signal.SIGKILL)
        assert process.wait(LIMIT) == 0, (tmp_path / "output").read_text()[-3000:]
    finally:
        process.kill()
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(10, ELASTIC_STEPS + 1, 10))
    events = [(row["event"], str(row["member"]).partition(".")[0]) for row in rows(run / "events.jsonl")]
    assert events.count(("leave", f"{PREFIX}2-0")) == 1
    assert events.count(("join", f"{PREFIX}2-0")) == 2  # at the start, and again
    assert events.count(("join", f"{PREFIX}1-0")) == 1
    assert read_run(run).finished
    assert "worker 0 has died (signal 9) and is started again" in (tmp_path / "output").read_text()
