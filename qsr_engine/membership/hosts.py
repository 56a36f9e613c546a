"""What must be alike on all hosts of a run, and `qsr hosts`, which asks the hosts of a hostfile before a run.

The launcher of DeepSpeed starts the same command on every host by ssh: the same folder, the same path of Python. So
every host is asked through that ssh and with that Python. Nothing here imports torch: the answer takes a second.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NOT_INSTALLED = "not installed"
_SSH_SECONDS = 5  # in which a host must take the connection
_ANSWER_SECONDS = 60.0  # in which it must have answered; Python may start from a slow network disk
_AT_ONCE = 64  # hosts asked at once
_SSH_FAILED = 255  # exit code of ssh itself
_NOT_FOUND = (126, 127)  # exit codes of a shell that cannot run a command
_NO_FOLDER = 77  # ours
_SLOTS = re.compile(r"^(\S+)\s+slots=(\d+)")  # as DeepSpeed reads a line


class HostError(RuntimeError):
    """Hosts of a run cannot work together: one is missing or not reached, or their versions differ."""


def versions() -> dict[str, str]:
    """What must be the same on every host: Python, torch, DeepSpeed, timm and this package with its sources.

    Read anew at every call, which takes milliseconds: all ranks of a run ask at the same moment, and processes that
    were started at other moments, between which a file was saved, shall not differ for it.
    """
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "torch": _torch_version()}
    found |= {name: _version(name) for name in ("deepspeed", "timm")}
    return {**found, "qsr_engine": f"{_version('qsr_engine')}, sources {_sources()}"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _torch_version() -> str:
    """With the part after + (cpu, cu130), which the metadata of PyPI's wheel leaves out; read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name("version.py")
        line = re.search(r"^__version__ = ['\"](.+)['\"]", path.read_text() if path.exists() else "", re.MULTILINE)
        if line:
            return line[1]
    return _version("torch")


def _sources() -> str:
    """Digest of this package's Python files: two checkouts may have the same version and other code."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def differences(facts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for every fact that is not the same everywhere: its values and who has them.

    Args:
        facts: for every one who reports (a host, a rank) the values by name, as versions() gives them.
    """
    lines = []
    for name in sorted({name for values in facts.values() for name in values}):
        who: dict[str, list[str]] = {}
        for one, values in facts.items():
            who.setdefault(values.get(name, NOT_INSTALLED), []).append(one)
        if len(who) > 1:
            lines.append(f"  {name}: " + "; ".join(f"{value} on {some(names)}" for value, names in who.items()))
    return lines


def some(names: Sequence[str], most: int = 8) -> str:
    """Names in a row, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ------------------------------------------------------------------------------------------------- qsr hosts


def read_hostfile(path: str | os.PathLike[str]) -> dict[str, int]:
    """The hosts of DeepSpeed's hostfile and their slots.

    Raises:
        HostError: a line is not `NAME slots=N`, a host stands there twice, or there is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise HostError(f"{path}: not a text file in UTF-8 ({error}); write a line a host, `NAME slots=GPUS`") from None
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}; give a file with a line a host, `NAME slots=GPUS`") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _SLOTS.match(line)
        if match is None:
            raise HostError(f"{path}, line {number}: found {line!r}; write `NAME slots=GPUS`")
        if match[1].startswith("-") or not match[1].isprintable():  # ssh would take it for an option
            raise HostError(f"{path}, line {number}: {match[1]!r} is not the name of a host; write `NAME slots=GPUS`")
        if match[1] in hosts:
            raise HostError(f"{path}, line {number}: the host {match[1]} stands there twice; write one line a host")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise HostError(f"{path}: there is no host; write a line a host, `NAME slots=GPUS`")
    return hosts


def check_hosts(path: str | os.PathLike[str], ssh: Sequence[str] = ()) -> str:
    """Ask all hosts of a hostfile at once whether they answer, and with which versions.

    Args:
        path: of the hostfile.
        ssh: more options of ssh, for example ["-p", "2222"].
    Returns:
        A table, one line a host.
    Raises:
        HostError: the hostfile is wrong, a host does not answer or lacks the folder, the Python or the package, or
            versions differ; every such host is named.
    """
    hosts = read_hostfile(path)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(hosts, pool.map(lambda host: _ask(host, ssh), hosts), strict=True))
    well = {host: answer for host, answer in answers.items() if isinstance(answer, dict)}
    here = {f"this host ({socket.gethostname()})": versions()}
    wrong = [f"  {host}: {answer}" for host, answer in answers.items() if not isinstance(answer, dict)]
    lines = ["hosts do not answer as they must:", *wrong] if wrong else []
    differing = differences({**here, **well})
    if differing:
        lines += ["hosts have other versions:", *differing, "Install the same versions and the same checkout on each."]
    if lines:
        raise HostError("\n".join([f"{path}: {lines[0]}", *lines[1:]]))
    return _table([("host", "slots", *versions())], ((host, str(n), *well[host].values()) for host, n in hosts.items()))


def _ask(host: str, ssh: Sequence[str]) -> dict[str, str] | str:
    """A host's versions, or what is wrong with it."""
    folder, python = Path.cwd(), sys.executable
    code = "import json, qsr_engine.membership.hosts as hosts; print(json.dumps(hosts.versions()))"
    # As DeepSpeed's launcher does it: this folder, first in Python's path, and this Python.
    command = (
        f"cd {shlex.quote(str(folder))} || exit {_NO_FOLDER}; "
        f"PYTHONPATH={shlex.quote(str(folder))} {shlex.quote(python)} -c {shlex.quote(code)}"
    )
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}", *ssh]
    try:
        done = subprocess.run(
            ["ssh", *options, "--", host, command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"took the connection and gave no answer in {_ANSWER_SECONDS:.0f} s; is its disk or network at fault?"
    except FileNotFoundError:
        raise HostError("there is no ssh on this host; install OpenSSH's client, which the launcher needs") from None
    said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    if done.returncode == _SSH_FAILED:
        return f"ssh does not get in ({said}); `ssh {host} true` must work without a password"
    if done.returncode == _NO_FOLDER:
        return f"has no folder {folder}; the launcher changes to it on every host"
    if done.returncode in _NOT_FOUND:
        return f"has no Python at {python} ({said}); install the environment at the same path"
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        return {str(name): str(value) for name, value in answer.items()}
    except (ValueError, IndexError, AttributeError):
        return f"qsr_engine cannot be imported there by {python} ({said}); install the same environment"


def _table(head: list[tuple[str, ...]], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [*head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
