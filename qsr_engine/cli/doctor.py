"""`qsr doctor`: what this host has for training, and what is missing.

The roll call of a run and `qsr hosts` check the same between hosts; here is what one host can tell of itself.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from qsr_engine.cli.arguments import add_command
from qsr_engine.data.writing.processes import usable_cores
from qsr_engine.membership.hosts import HostError, check_hosts
from qsr_engine.membership.network import addresses, check_interfaces
from qsr_engine.membership.versions import versions

OK, WARNING, ERROR = "ok", "warning", "error"
Finding = tuple[str, str]  # one of these, and a sentence
SHARED_MEMORY = 10**9  # bytes below which a warning is due: containers get 64 MB unless they ask for more
OPEN_FILES = 1024  # likewise: the usual limit of a session
_CC = "cc"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "doctor",
        "Say what this host has for training, and what is missing.",
        more="Versions, GPUs, compiled extensions, memory, limits and network interfaces. It ends with exit code 1 if "
        "something is wrong that would end a run.",
        examples=["qsr doctor", "qsr doctor --hostfile hostfile  # and what `qsr hosts` asks all of these"],
    )
    command.add_argument("--hostfile", metavar="FILE", help="ask its hosts too")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line a finding."""
    checks: list[Callable[[], Iterator[Finding]]] = [_versions, _gpus, _extensions, _memory, _limits, _network]
    worst = 0
    for check in checks:
        print(f"{check.__name__[1:]}:")
        for level, text in check():
            worst |= level == ERROR
            print(f"  {level:<8} {text}", flush=True)
    if args.hostfile is not None:
        print(f"hosts:\n{check_hosts(args.hostfile)}")
    return int(worst)


def _versions() -> Iterator[Finding]:
    for name, version in versions().items():
        yield (
            (ERROR, f"{name}: not installed; install qsr-engine anew")
            if version == "not installed"
            else (
                OK,
                f"{name} {version}",
            )
        )
    yield OK, f"{platform.system()} {platform.release()}, glibc {platform.libc_ver()[1] or 'unknown'}"


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield ERROR, f"torch cannot be imported: {error}"
        return
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            yield OK, "none; on a CPU write DS_ACCELERATOR=cpu before a command, and --ranks"
        else:
            yield (
                ERROR,
                f"nvidia-smi is there, and torch {torch.__version__} sees no GPU; CUDA_VISIBLE_DEVICES is "
                f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r}, and the driver must suit CUDA {torch.version.cuda}",
            )
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield OK, f"{number}: {found.name}, {found.total_memory / 1e9:.0f} GB, compute {found.major}.{found.minor}"
    yield OK, f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"  # type: ignore[no-untyped-call]


def _extensions() -> Iterator[Finding]:
    try:
        importlib.import_module("qsr_engine.data._jpeg")
    except ImportError as error:
        slower = "pictures are decoded and augmented by Pillow, which takes longer"
        yield WARNING, f"_jpeg is not built, so {slower}: {_why_not(error)}; then install qsr-engine anew"
    else:
        yield OK, "_jpeg is built"


def _why_not(error: ImportError) -> str:
    """Why an optional extension of setup is not there."""
    if not isinstance(error, ModuleNotFoundError):
        return f"it does not load ({error}); install libjpeg-turbo"
    if shutil.which(_CC) is None:
        return "there is no C compiler; install gcc"
    include = ["-I", importlib.import_module("sysconfig").get_path("include")]
    for header, package, fedora in (
        ("Python.h", "python3-dev", "python3-devel"),
        ("jpeglib.h", "libjpeg62-turbo-dev or libjpeg-turbo8-dev", "libjpeg-turbo-devel"),
    ):
        source = f"#include <stdio.h>\n#include <{header}>\n"
        done = subprocess.run(
            [_CC, "-E", "-x", "c", *include, "-"], input=source, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"the header {header} is missing; install {package} ({fedora} on Fedora)"
    return "compiler and headers are there now"


def _memory() -> Iterator[Finding]:
    yield OK, f"{usable_cores()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB of memory"
    try:
        shared = shutil.disk_usage("/dev/shm")
    except OSError:
        yield WARNING, "/dev/shm is not there; loader processes and the averaging of one host need it"
    else:
        text = f"/dev/shm has {shared.free / 1e9:.2f} of {shared.total / 1e9:.2f} GB free"
        more = "; loader processes put pictures there: start a container with --shm-size=8g or --ipc=host"
        yield (OK, text) if shared.free >= SHARED_MEMORY else (WARNING, text + more)
    yield OK, f"this folder's disk has {shutil.disk_usage('.').free / 1e9:.0f} GB free"


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_spelled(soft)} open files (at most {_spelled(hard)})"
    unlimited = soft == resource.RLIM_INFINITY
    more = f"; ranks connect to one another, so write `ulimit -n {_spelled(hard)}` before a run"
    yield (OK, text) if unlimited or soft >= OPEN_FILES else (WARNING, text + more)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        yield WARNING, f"{locked} bytes of locked memory; InfiniBand needs `ulimit -l unlimited`"
    yield OK, f"{_spelled(resource.getrlimit(resource.RLIMIT_NPROC)[0])} processes"


def _spelled(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _network() -> Iterator[Finding]:
    """As the roll call looks at it before a run."""
    from qsr_engine.membership.rendezvous import start_seconds

    try:
        seconds = start_seconds()
    except HostError as error:
        yield ERROR, str(error)
    else:
        yield OK, f"{seconds:.0f} s for all ranks to come (QSR_START_SECONDS)"
    problem = check_interfaces("gloo,nccl")
    if problem is not None:
        yield ERROR, problem
        return
    name = socket.gethostname()
    for backend in ("gloo", "nccl"):
        try:
            found = addresses(backend, os.environ.get("MASTER_ADDR") or name)
        except OSError as error:
            yield WARNING, f"{backend}: the name {name} leads to no address ({error}); add it to /etc/hosts"
        else:
            reached = f"{backend} is reached at {', '.join(found)}"
            if all(one.startswith("127.") for one in found):
                more = "enough for ranks of this host; other hosts cannot reach that, and need MASTER_ADDR or "
                yield WARNING, f"{reached}: {more}{backend.upper()}_SOCKET_IFNAME"
            else:
                yield OK, reached
