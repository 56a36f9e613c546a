"""Ranks that run one function, on this machine or on the hosts of slow_network, and what rank 0 returned.

A rank is `python -m benchmarks.ranks FOLDER`, so a script needs no options for it. Function, arguments and result pass
through files of that folder, pickled.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
Found = TypeVar("Found")


def run(
    function: Callable[..., Found],
    *arguments: object,
    on_each: int = 1,
    hosts: Sequence[Sequence[str]] = ((),),
    master: str = "127.0.0.1",
    seconds: float = 3600,
    **environment: object,
) -> Found:
    """Call the function with these arguments in every rank, with one thread and torchrun's variables set.

    Args:
        function: of a module; it starts the process group. Every rank's group is met once more after it.
        on_each: ranks of a host.
        hosts: for each the words before a command that run it there; by default this machine.
        master: the address of rank 0's host.
        environment: more variables of the ranks.
    Returns:
        What it returned on rank 0.
    Raises:
        RuntimeError: a rank failed, or the seconds ran out. No rank is left.
    """
    known = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WORLD_SIZE": str(len(hosts) * on_each),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(free_port()),
        **{name: str(value) for name, value in environment.items()},
    }
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder, _exit_on_sigterm():
        Path(folder, "job").write_bytes(pickle.dumps((_module_of(function), function.__name__, arguments)))
        try:
            for rank in range(len(hosts) * on_each):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank % on_each)}
                words = [*hosts[rank // on_each], sys.executable, "-m", "benchmarks.ranks", folder]
                started.append(subprocess.Popen(words, env={**known, **own}))
            _wait_for(started, time.monotonic() + seconds)
        finally:
            for process in started:
                process.kill()
                process.wait()
        found: Found = pickle.loads(Path(folder, "found").read_bytes())
    return found


def free_port() -> int:
    """Below the ports that Linux gives to connections by itself: nobody takes it before rank 0 listens there."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(10_000, 32_768)))
            return int(probe.getsockname()[1])


def main_module() -> str:
    """The name by which `python -m` runs the script that runs here."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        raise RuntimeError("started as a file; write python -m benchmarks.NAME")
    return spec.name


def _module_of(function: Callable[..., object]) -> str:
    return main_module() if function.__module__ == "__main__" else function.__module__


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """So that the ranks and the hosts go."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_for(started: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    while any(process.poll() is None for process in started):
        if any(process.poll() not in (None, 0) for process in started):
            break
        if time.monotonic() > deadline:
            raise RuntimeError("the ranks took longer than they may")
        time.sleep(0.1)
    if any(process.poll() != 0 for process in started):
        raise RuntimeError("a rank failed; its message stands above")


def _rank(folder: str) -> NoReturn:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    module, name, arguments = pickle.loads(Path(folder, "job").read_bytes())
    found = getattr(importlib.import_module(module), name)(*arguments)
    if dist.get_rank() == 0:
        Path(folder, "found").write_bytes(pickle.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads need not be waited for


if __name__ == "__main__":
    _rank(sys.argv[1])
