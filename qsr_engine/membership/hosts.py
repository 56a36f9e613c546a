"""`qsr hosts`: the hosts of a hostfile are asked before a run whether they answer, and with which versions.

The launcher of DeepSpeed starts the same command on every host by ssh: the same folder, the same path of Python. So
every host is asked through that ssh and with that Python. Nothing here imports torch: the answer takes a second.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qsr_engine.membership.versions import differences, versions

_SSH_SECONDS = 5  # in which a host must take the connection
_ANSWER_SECONDS = 60.0  # in which it must have answered; Python may start from a slow network disk
_AT_ONCE = 64  # hosts asked at once
_SSH_FAILED = 255  # exit code of ssh itself
_NOT_FOUND = (126, 127)  # exit codes of a shell that cannot run a command
_NO_FOLDER = 77  # ours
_SLOTS = re.compile(r"^(\S+)\s+slots=(\d+)")  # as DeepSpeed reads a line


class HostError(RuntimeError):
    """Hosts of a run cannot work together: one is missing or not reached, or their versions differ."""


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
    code = "import json; from qsr_engine.membership.versions import versions; print(json.dumps(versions()))"
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
    complaint = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    if done.returncode == _SSH_FAILED:
        return f"ssh does not get in ({complaint}); `ssh {host} true` must work without a password"
    if done.returncode == _NO_FOLDER:
        return f"has no folder {folder}; the launcher changes to it on every host"
    if done.returncode in _NOT_FOUND:
        return f"has no Python at {python} ({complaint}); install the environment at the same path"
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        return {str(name): str(value) for name, value in answer.items()}
    except (ValueError, IndexError, AttributeError):
        return f"qsr_engine cannot be imported there by {python} ({complaint}); install the same environment"


def _table(head: list[tuple[str, ...]], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [*head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
