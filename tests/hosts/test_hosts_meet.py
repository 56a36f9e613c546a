"""Real hosts, of network namespaces: a firewall between two of three, and a host without ssh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clusters import PREFIX, SCRIPT, rank_on_a_host
from tests.support.recipes import recipe_of_four_steps

pytestmark = pytest.mark.launch


def ranks_on_hosts(cluster: dict[str, str], **more: str) -> list[str]:
    """One rank on each of the three hosts; what each says."""
    rank = "import sys; from qsr_engine import HostError; from qsr_engine.membership.roll_call import roll_call\n"
    rank += "try:\n  with roll_call('gloo'): print('met')\nexcept HostError as error: print(error)"
    started = []
    for number in range(3):
        ours = {**cluster, "QSR_HOST": str(number + 1), **more}
        environment = {**rank_on_a_host(number, 3, 29500, f"{PREFIX}1"), **ours}
        words = [str(SCRIPT), "run", sys.executable, "-c", rank]
        started.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    return [process.communicate(timeout=120)[0] for process in started]


@pytest.mark.slow
def test_a_firewall_between_two_of_three_hosts(cluster: dict[str, str]) -> None:
    """Hosts 2 and 3 reach host 1, and not one another: what one sends the other is dropped."""
    assert ranks_on_hosts(cluster) == ["met\n"] * 3
    drop = ["ip", "-n", f"{PREFIX}2", "route", "add", "blackhole", "10.213.7.3/32"]
    subprocess.run(drop, check=True)
    said = ranks_on_hosts(cluster, QSR_START_SECONDS="4")
    assert said[0].startswith("hosts do not reach one another:\n")
    assert said == said[:1] * 3
    assert f"  from {PREFIX}2 (rank 1) to {PREFIX}3 (rank 2) at 10.213.7.3, port " in said[0]
    assert f"  from {PREFIX}3 (rank 2) to {PREFIX}2 (rank 1) at 10.213.7.2, port " in said[0]
    assert said[0].count("\n  from ") == 2, "host 1 reaches both"
    assert "no answer in 4 s" in said[0], "host 3 sends, and the answer is dropped"


@pytest.mark.slow
def test_a_host_without_ssh(cluster: dict[str, str], tmp_path: Path, digits: Path) -> None:
    """`qsr hosts` names it beforehand; DeepSpeed's launcher starts the others, and they name it when the time is up."""
    recipe, state = recipe_of_four_steps(tmp_path, digits, "deepspeed"), Path(cluster["QSR_CLUSTER"])
    known = {**cluster, "DS_ACCELERATOR": "cpu"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        words = (str(SCRIPT), "run", *words)
        return subprocess.run(words, env=known, capture_output=True, text=True, timeout=240, check=False)

    hosts = str(state / "hosts")
    assert run("qsr", "hosts", hosts).stdout.count(f"\n{PREFIX}") == 3
    os.kill(int((state / "sshd3.pid").read_text()), signal.SIGTERM)
    until_it_takes_nobody = f"while ssh {PREFIX}3 true 2>/dev/null; do :; done"
    assert run("sh", "-c", until_it_takes_nobody).returncode == 0
    asked = run("qsr", "hosts", hosts)
    assert asked.returncode == 1
    assert f"\n  {PREFIX}3: ssh does not get in (" in asked.stderr
    assert f"\n  {PREFIX}2: " not in asked.stderr

    # The launcher gives the ranks what stands in the file that DS_ENV_FILE names. The two hosts start at times of
    # their own on a loaded machine; so the limit is longer than elsewhere here.
    train = f"exec deepspeed --hostfile {hosts} --module qsr_engine train {recipe}"
    done = run("sh", "-c", f"echo QSR_START_SECONDS=20 >>$DS_ENV_FILE; {train}")
    assert done.returncode != 0
    for host, rank in ((1, 0), (2, 1)):
        prefix = f"{PREFIX}{host}: "
        assert f"{prefix}qsr: error (rank {rank}): 1 of 3 ranks did not come within 20 s" in done.stderr
        assert f"{prefix}  missing: rank 2 of {PREFIX}3\n" in done.stderr
