"""Hosts on one machine that a slow network joins: network namespaces, a bridge, and `tc tbf` on every port.

Needs root and iproute2. Everything has the name qsrbench in it, and goes when the context ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator

PREFIX = "qsrbench"
ADDRESS = "10.213.7.{}"


def _ip(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=True)


def _down(hosts: int) -> None:
    for host in range(hosts):
        _ip(f"ip netns del {PREFIX}{host}", check=False)
        _ip(f"ip link del {PREFIX}v{host}", check=False)
    _ip(f"ip link del {PREFIX}br", check=False)


@contextlib.contextmanager
def slow_network(hosts: int, rate: str | None) -> Iterator[list[list[str]]]:
    """For every host the words before a command that run it there; host 0 has the address of `address(0)`.

    Args:
        rate: of each host's port in each direction, as tc writes it: 1gbit, 100mbit; None for no limit.
    Raises:
        RuntimeError: not root, or no iproute2.
    """
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        raise RuntimeError("a slow network is made of network namespaces; that needs root, `ip` and `tc` (iproute2)")
    _down(hosts)
    try:
        _ip(f"ip link add {PREFIX}br type bridge")
        _ip(f"ip link set {PREFIX}br up")
        for host in range(hosts):
            name, port = f"{PREFIX}{host}", f"{PREFIX}v{host}"
            _ip(f"ip netns add {name}")
            _ip(f"ip link add {port} type veth peer name eth0 netns {name}")
            _ip(f"ip link set {port} master {PREFIX}br up")
            _ip(f"ip -n {name} addr add {ADDRESS.format(host + 1)}/24 dev eth0")
            _ip(f"ip -n {name} link set eth0 up")
            _ip(f"ip -n {name} link set lo up")
            if rate is None:
                continue
            # 1 MB of burst: veth hands over segments of 64 kB. 50 ms of queue: what a switch would hold.
            limit = f"tbf rate {rate} burst 1mb latency 50ms"
            _ip(f"tc qdisc add dev {port} root {limit}")
            _ip(f"ip netns exec {name} tc qdisc add dev eth0 root {limit}")
        yield [["ip", "netns", "exec", f"{PREFIX}{host}"] for host in range(hosts)]
    finally:
        _down(hosts)


def address(host: int) -> str:
    return ADDRESS.format(host + 1)


def bytes_sent() -> int | None:
    """Bytes that this host's port has sent so far, headers included; None outside of such a host."""
    shown = subprocess.run(["ip", "-s", "-j", "addr", "show", "eth0"], capture_output=True, text=True, check=False)
    if shown.returncode or not shown.stdout.strip():
        return None
    port = json.loads(shown.stdout)[0]
    ours = any(entry.get("local", "").startswith(ADDRESS.format("")) for entry in port.get("addr_info", []))
    return int(port["stats64"]["tx"]["bytes"]) if ours else None
