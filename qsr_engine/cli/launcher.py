"""The launchers that start the ranks of `qsr train` and `qsr plan --measure`.

DeepSpeed's launcher starts the engine `deepspeed`, torchrun the engine `fsdp`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from qsr_engine.cli.launched import LAUNCH, asked_file
from qsr_engine.config.batch import check_world_size
from qsr_engine.config.recipe import Recipe, resolve_recipe_batch
from qsr_engine.membership.signals import SIGNALS, STOPPED, STOPPED_FILE

# Rank 0 serves the store in which the ranks meet, a new one for every start. Else torchrun's agent of rank 0 serves one
# for all of them (torch 2.14): a rank may read the address of one that is dead there, and where that agent is lost the
# other agents go on to name its store (DynamicRendezvousHandler.next_rendezvous).
_OWN_STORES = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def launch(recipe: Recipe, ranks: int | None, words: Sequence[str], *, resume: bool = False, restarts: int = 0) -> int:
    """Start `python -m qsr_engine` with these words in the ranks of this host, and wait. Returns the exit code.

    Args:
        ranks: None for one a GPU.
        resume: the ranks go on from a checkpoint, which may be one of other ranks.
        restarts: times that torchrun's agent may start all ranks again; DeepSpeed's launcher (0.19.8) has none.
    Raises:
        ConfigError: the recipe cannot be run by so many ranks.
    """
    if ranks is not None:
        check_world_size(ranks, recipe.qsr.worker_size)
        if not resume:
            resolve_recipe_batch(recipe, ranks)
    launcher = _torchrun(ranks, restarts) if recipe.engine == "fsdp" or restarts else _deepspeed(ranks)
    command = [*launcher, "--module", "qsr_engine", *words]
    return _run(command, {_OWN_STORES: "1"}) if restarts else _run(command)


def _deepspeed(ranks: int | None) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(_free_port())]
    return [*launcher, *(["--num_gpus", str(ranks)] if ranks is not None else []), "--log_level", "error"]


def _torchrun(ranks: int | None, restarts: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts)]
    return [*launcher, "--nproc-per-node", "auto" if ranks is None else str(ranks)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _run(command: list[str], more: Mapping[str, str] | None = None) -> int:
    """Run the launcher in a session of its own, and leave nothing of it behind.

    SIGTERM and SIGUSR1 go to the ranks alone, which stop by themselves; launchers would give them 30 seconds for it.
    Another signal, or one more of these, ends everything at once. DeepSpeed's launcher leaves its processes behind when
    it is terminated, and torchrun those whose agent was killed, in sessions of their own: a variable of the environment
    tells which processes those are, and when the launcher has ended, whatever is left of it is ended too.
    """
    launch = uuid.uuid4().hex
    received: list[int] = []
    with tempfile.TemporaryDirectory(prefix="qsr-") as folder:
        stopped = Path(folder) / "stopped"
        # Of a rank that dies the others would print some 30 lines of the store's C++ frames.
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment = {**quiet, **os.environ, **(more or {}), LAUNCH: launch, STOPPED_FILE: str(stopped)}
        process = subprocess.Popen(command, start_new_session=True, env=environment)

        def react(signum: int, _: FrameType | None) -> None:
            received.append(signum)
            ranks = []
            if signum in SIGNALS and len(received) == 1:
                asked_file(stopped).touch()
                ranks = _ranks_of(launch)
            for rank in ranks:
                with contextlib.suppress(psutil.Error):
                    rank.send_signal(signum)
            if not ranks:
                _end(_processes_of(launch))

        numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, *SIGNALS)
        before = {number: signal.signal(number, react) for number in numbers}
        try:
            code = process.wait()
        finally:
            _end(_processes_of(launch))
            for number, handler in before.items():
                signal.signal(number, handler)
        if stopped.exists():
            return STOPPED
    if received and not (code == 0 and len(received) == 1 and received[0] in SIGNALS):  # asked too late to stop
        return 128 + received[-1]
    return code if code >= 0 else 128 - code


def _processes_of(launch: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(LAUNCH) == launch:
                found.append(process)
    return found


def _ranks_of(launch: str) -> list[psutil.Process]:
    """Those of the launch that have a rank, and not from their parent as loader processes have it."""
    ranks = [process for process in _processes_of(launch) if _rank(process) is not None]
    numbers = {process.pid for process in ranks}
    return [process for process in ranks if _parent(process) not in numbers]


def _parent(process: psutil.Process) -> int | None:
    try:
        number: int | None = process.ppid()
    except psutil.Error:
        return None
    return number


def _rank(process: psutil.Process) -> str | None:
    try:
        rank: str | None = process.environ().get("RANK")
    except psutil.Error:
        return None
    return rank


def _end(processes: Sequence[psutil.Process]) -> None:
    """At once: what a rank has saved is whole, and one that waits for another would not hear of a request."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
