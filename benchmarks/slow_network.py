"""Hosts on one machine that a slow network joins, by launch/cluster.sh; it needs root, and what that script names.

Hosts are counted from 0 here. They are named apart from cluster.sh's own, so such a cluster may be up beside them.
QSR_PREFIX=other in the environment names them otherwise, for a second benchmark at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

PREFIX = os.environ.get("QSR_PREFIX", "qsrbench")


def _cluster() -> list[str]:
    script = Path(__file__).parents[1] / "launch" / "cluster.sh"
    return ["env", "-u", "QSR_CLUSTER", f"QSR_PREFIX={PREFIX}", str(script)]


@contextlib.contextmanager
def slow_network(hosts: int, rate: str | None) -> Iterator[list[list[str]]]:
    """For every host the words before a command that run it there, with gloo and NCCL bound to its port.

    Args:
        rate: of each host's port in each direction, as tc writes it: 1gbit, 100mbit; None for no limit.
    Raises:
        RuntimeError: what cluster.sh says, such as: not root, a program is missing, another benchmark is running.
    """
    refused = False
    try:
        words = [*_cluster(), "up", str(hosts), *([rate] if rate else [])]
        up = subprocess.run(words, capture_output=True, text=True, check=False)
        if up.returncode:
            refused = True  # and it has cleaned up after itself; what is up now is not ours
            raise RuntimeError(up.stderr.strip())
        yield [["env", f"QSR_HOST={host + 1}", *_cluster(), "run"] for host in range(hosts)]
    finally:
        if not refused:
            subprocess.run([*_cluster(), "down"], check=False)


def address(host: int) -> str:
    """The name by which the hosts reach it."""
    return f"{PREFIX}{host + 1}"


def bytes_sent() -> int | None:
    """Bytes that this host's port has sent so far, headers included; None outside of such a host."""
    if not socket.gethostname().startswith(PREFIX):
        return None
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text(encoding="ascii"))


def port_bytes(host: int) -> tuple[int, int]:
    """(sent, received) bytes of a host so far, headers included; read from outside, at its port of the switch.

    Raises:
        subprocess.CalledProcessError: no such host is up.
    """
    # The switch is a namespace; cluster.sh plugs host n in at its port n, and counts from 1.
    words = ["ip", "-n", f"{PREFIX}br", "-s", "-j", "link", "show", f"port{host + 1}"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True)
    counted = json.loads(shown.stdout)[0]["stats64"]
    return int(counted["rx"]["bytes"]), int(counted["tx"]["bytes"])  # what the port receives, the host has sent
