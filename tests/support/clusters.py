"""Hosts that are network namespaces, by launch/cluster.sh: where they can be, and how a test brings them up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "cluster.sh"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("ip", "tc", "sshd", "ssh", "pdsh")


def own_prefix(letter: str) -> str:
    """Of this process's namespaces, so that two test runs on one machine do not take each other's.

    cluster.sh takes at most 10 letters and no digits: five tell any process id of a 64-bit kernel (2^22) apart.
    """
    number, name = os.getpid(), ""
    for _ in range(5):
        number, digit = divmod(number, 26)
        name += chr(ord("a") + digit)
    return f"qsr{letter}{name}"


PREFIX = own_prefix("t")


def why_there_can_be_none() -> str | None:
    """What is missing here for hosts of network namespaces; None where they can be."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"{PREFIX}try"
    tried = subprocess.run(["ip", "netns", "add", name], env={**os.environ, "PATH": PATH}, capture_output=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "del", name], env={**os.environ, "PATH": PATH}, check=True)
    return None


def rank_on_a_host(rank: int, ranks: int, port: int, master: str = "127.0.0.1") -> dict[str, str]:
    """The whole environment of a process that is the only rank of its host."""
    ours = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "MASTER_ADDR": master, "MASTER_PORT": port}
    return {**os.environ, "DS_ACCELERATOR": "cpu", **{name: str(value) for name, value in ours.items()}}
