"""The launchers that start the ranks of `qsr train` and `qsr plan --measure`.

DeepSpeed's launcher starts the engine `deepspeed`. torchrun starts the engine `fsdp`, and what DeepSpeed's launcher
cannot: restarts, and a number of ranks on the GPUs that CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import contextlib
import os
import random
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

from qsr_engine.cli.guard import LAUNCH, end, guarded, processes_of
from qsr_engine.cli.launched import asked_file
from qsr_engine.config.batch import check_world_size
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_batch import resolve_recipe_batch
from qsr_engine.data.writing.processes import usable_cores
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
    command, more = _launcher(recipe.engine, ranks, restarts)
    return _run([*command, "--module", "qsr_engine", *words], more)


def _launcher(engine: str, ranks: int | None, restarts: int) -> tuple[list[str], dict[str, str]]:
    """The launcher's command, and what it finds in its environment beside what is there."""
    if engine != "fsdp" and not restarts and not _names_gpus(ranks):
        return _deepspeed(ranks), {}
    more = {_OWN_STORES: "1"} if restarts else {}
    if ranks is not None and "OMP_NUM_THREADS" not in os.environ:  # torchrun would write 1
        more["OMP_NUM_THREADS"] = str(max(1, usable_cores() // ranks))
    return _torchrun(ranks, restarts), more


def _names_gpus(ranks: int | None) -> bool:
    """Whether a user says on which GPUs so many ranks run, or that they run on none.

    Beside a number of ranks DeepSpeed's launcher (0.19.8) puts the first GPUs of the host into CUDA_VISIBLE_DEVICES.
    """
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    return ranks is not None and not on_cpu and "CUDA_VISIBLE_DEVICES" in os.environ


def _deepspeed(ranks: int | None) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    return [*launcher, *(["--num_gpus", str(ranks)] if ranks is not None else []), "--log_level", "error"]


def _torchrun(ranks: int | None, restarts: int) -> list[str]:
    launcher = [sys.executable, "-m", "qsr_engine.cli.torchrun", "--standalone", "--max-restarts", str(restarts)]
    return [*launcher, "--nproc-per-node", "auto" if ranks is None else str(ranks)]


def free_port() -> int:
    """A port for rank 0's store, which listens only seconds from now.

    Below 32768, where Linux (ip_local_port_range) begins to give ports of its own choice to every connection and to
    every listener without a number: one of those may be another process's by then.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", random.randrange(10_000, 32_768)))
            return int(probe.getsockname()[1])


def _run(command: list[str], more: Mapping[str, str]) -> int:
    """Run the launcher in a session of its own, and leave nothing of it behind.

    SIGTERM and SIGUSR1 go to the ranks alone, which stop by themselves; launchers would give them 30 seconds for it.
    One more of these says nothing new: schedulers send them to a process and to its group. Another signal, or one of
    these before there are ranks, ends everything at once. DeepSpeed's launcher leaves its processes behind when it is
    terminated, and torchrun those whose agent was killed, in sessions of their own: a variable of the environment tells
    which processes those are, and when the launcher has ended, whatever is left of it is ended too; by the guard, where
    this process is killed.
    """
    launch = uuid.uuid4().hex
    received: list[int] = []
    with tempfile.TemporaryDirectory(prefix="qsr-") as folder, guarded(launch, Path(folder)):
        stopped = Path(folder) / "stopped"
        # Of a rank that dies the others would print some 30 lines of the store's C++ frames.
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment = {**quiet, **os.environ, **more, LAUNCH: launch, STOPPED_FILE: str(stopped)}
        process = subprocess.Popen(command, start_new_session=True, env=environment)

        def react(signum: int, _: FrameType | None) -> None:
            if signum in SIGNALS and received:
                return
            received.append(signum)
            ranks = []
            if signum in SIGNALS:
                asked_file(stopped).touch()
                ranks = _ranks_of(launch)
            for rank in ranks:
                with contextlib.suppress(psutil.Error):
                    rank.send_signal(signum)
            if not ranks:
                end(processes_of(launch))

        numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, *SIGNALS)
        before = {number: signal.signal(number, react) for number in numbers}
        try:
            code = process.wait()
        finally:
            end(processes_of(launch))
            for number, handler in before.items():
                signal.signal(number, handler)
        if stopped.exists():
            return STOPPED
    if received and not (code == 0 and len(received) == 1 and received[0] in SIGNALS):  # asked too late to stop
        return 128 + received[-1]
    return code if code >= 0 else 128 - code


def _ranks_of(launch: str) -> list[psutil.Process]:
    """Those of the launch that have a rank, and not from their parent as loader processes have it."""
    ranks = [process for process in processes_of(launch) if _rank(process) is not None]
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
