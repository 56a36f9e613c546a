"""`qsr hosts`, with a stand-in for ssh, and how this host's interfaces are chosen."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from qsr_engine.cli.main import main
from qsr_engine.membership.hosts import HostError, read_hostfile
from qsr_engine.membership.network import addresses, check_interfaces, matching, partners
from qsr_engine.membership.versions import differences, versions

# ssh [OPTION ...] HOST COMMAND: the host `good` is this one; the others fail as their names say.
SSH = """#!/bin/bash
host=${@: -2:1} command=${@: -1}
case "$*" in *BatchMode=yes*ConnectTimeout=*) ;; *) exit 99 ;; esac
case $host in
  good*) exec sh -c "$command" ;;
  down) echo "ssh: connect to host down port 22: Connection timed out" >&2; exit 255 ;;
  no_python) echo "sh: 1: python: not found" >&2; exit 127 ;;
  no_folder) cd /; exec sh -c "cd /nosuch${command#cd *[^ ] }" ;;
  no_package) echo "ModuleNotFoundError: No module named 'qsr_engine'" >&2; exit 1 ;;
  older) sh -c "$command" | sed 's/"torch": "[^"]*"/"torch": "2.0.0"/' ;;
esac
"""


@pytest.fixture(autouse=True)
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def ask(tmp_path: Path, *hosts: str) -> int:
    path = tmp_path / "hosts"
    path.write_text("# mine\n\n" + "".join(f"{host} slots=8\n" for host in hosts))
    return main(["hosts", str(path)])


def test_hosts_that_are_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "good1", "good2") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["host", "slots", *versions()]
    assert [line.split()[:4] for line in lines] == [
        [host, "8", *list(versions().values())[:2]] for host in ("good1", "good2")
    ]


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("down", "ssh does not get in (ssh: connect to host down port 22: Connection timed out); `ssh down true` must"),
        ("no_python", f"has no Python at {sys.executable} (sh: 1: python: not found)"),
        ("no_folder", f"has no folder {os.getcwd()}"),
        ("no_package", "qsr_engine cannot be imported there by"),
    ],
)
def test_a_host_that_does_not_answer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str, words: str
) -> None:
    assert ask(tmp_path, "good1", host) == 1
    said = capsys.readouterr().err
    assert f"\n  {host}: {words}" in said
    assert "\n  good1: " not in said


def test_other_versions_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "good1", "older") == 1
    said = capsys.readouterr().err
    here = f"this host ({socket.gethostname()})"
    assert f"\n  torch: {versions()['torch']} on {here}, good1; 2.0.0 on older\n" in said
    assert said.count("\n  ") == 1, "nothing else differs"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=1\nb\n", r"line 2: found 'b'; write `NAME slots=GPUS`"),
        ("a slots=1\na slots=2\n", "line 2: the host a stands there twice"),
        ("# none\n", "there is no host"),
        ("-oProxyCommand=x slots=1\n", "line 1: '-oProxyCommand=x' is not the name of a host"),
        ("a\0b slots=1\n", "is not the name of a host"),
        ("h\udcfc slots=1\n", "not a text file in UTF-8"),
        (None, "No such file or directory; give a file"),
    ],
)
def test_a_hostfile_that_is_wrong(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(HostError, match=words):
        read_hostfile(tmp_path / "hosts")


def test_versions_tell_sources_apart() -> None:
    """The torch that is imported, with its build; and a digest that is not that of no files."""
    import torch

    from qsr_engine.membership import versions as module

    assert versions()["torch"] == torch.__version__
    empty = "e3b0c44298fc"  # of sha256 of nothing
    assert len(module._sources()) == len(empty)
    assert module._sources() != empty


def test_a_change_of_a_source_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qsr_engine.membership import versions as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "membership" / "versions.py"))
    digests = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", ""), ("data/c.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        digests.add(module._sources())
    assert len(digests) == 4


def test_what_one_lacks_differs() -> None:
    assert differences({"a": {"timm": "1"}, "b": {}}) == ["  timm: 1 on a; not installed on b"]
    assert differences({"a": {"timm": "1"}, "b": {"timm": "1"}}) == []


# ---------------------------------------------------------------------------------------------- interfaces


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("eth", ["eth0", "eth1"]),
        ("eth1,ib", ["eth1", "ib0"]),
        ("=eth0", ["eth0"]),
        ("=eth", []),
        ("^docker,lo", ["eth0", "eth1", "ib0"]),
        ("^=eth0,lo", ["docker0", "eth1", "ib0"]),
        ("^d,e,i,l", []),
        ("wlan", []),
    ],
)
def test_nccls_patterns(pattern: str, left: list[str]) -> None:
    """As NCCL's documentation describes NCCL_SOCKET_IFNAME."""
    assert matching(pattern, ["docker0", "eth0", "eth1", "ib0", "lo"]) == left


def test_the_chosen_interfaces_address(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"lo": ["127.0.0.1"], "eth0": ["10.1.0.5", "fd00::5"], "ib0": ["10.2.0.5"], "down0": []}
    monkeypatch.setattr("qsr_engine.membership.network.interfaces", lambda: there)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    assert check_interfaces("cpu:gloo,cuda:nccl") is None
    assert addresses("cpu:gloo,cuda:nccl", "10.1.0.1") == ["10.1.0.5", "10.2.0.5"]
    assert addresses("nccl", "10.1.0.1") == ["10.2.0.5"]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^ib,down")  # leaves lo, which NCCL takes last
    assert addresses("cpu:gloo,cuda:nccl", "10.1.0.1") == ["10.1.0.5"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0,down0")
    assert "the interface 'down0' has no IP address" in (check_interfaces("gloo") or "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth")  # no prefixes for gloo
    assert "there is no interface 'eth'" in (check_interfaces("nccl") or "")


def test_without_names_it_is_the_way_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert addresses("nccl", "127.0.0.1") == ["127.0.0.1"]
    # A host name that nobody knows: torch then takes the loopback for gloo, and so does this.
    monkeypatch.setattr(socket, "gethostname", lambda: "a" * 70)
    assert addresses("gloo", "127.0.0.1") == ["127.0.0.1"]


def test_every_pair_of_hosts_is_tried_up_to_64() -> None:
    for count in (2, 3, 64):
        assert all(sorted({place, *partners(place, count)}) == list(range(count)) for place in range(count))


@pytest.mark.parametrize("count", [65, 100, 1000])
def test_of_many_hosts_some_pairs_are_tried(count: int) -> None:
    """Neighbours in the ring of an all-reduce, and both directions of every pair."""
    for place in range(count):
        found = partners(place, count)
        assert {(place + 1) % count, (place - 1) % count} <= set(found)
        assert place not in found
        assert len(found) <= 2 * 10
        assert all(place in partners(other, count) for other in found)
