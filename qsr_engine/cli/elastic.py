"""`qsr train --elastic`: the workers of this host, each a job of its own, and a lighthouse where none is named.

A worker that dies is started again, while the others train on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from qsr_engine.cli.guard import LAUNCH, end, guarded, processes_of
from qsr_engine.cli.launched import asked_file
from qsr_engine.cli.launcher import free_port
from qsr_engine.config.batch import check_world_size
from qsr_engine.config.membership import MembershipConfig
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.units import counted
from qsr_engine.data.writing.processes import usable_cores
from qsr_engine.membership.quorum import EXPECTED, LAUNCHED, LIGHTHOUSE, WORKER, start_lighthouse
from qsr_engine.membership.signals import SIGNALS, STOPPED, STOPPED_FILE

_LOOK = 0.2  # seconds between two looks at the workers


def launch_workers(recipe: Recipe, ranks: int, words: Sequence[str], *, restarts: int) -> int:
    """Start the workers of this host, and wait until all have ended. Returns the exit code: 0 if the last one did.

    Args:
        ranks: of all workers here.
        words: of `python -m qsr_engine` in a rank.
        restarts: times that a worker which has died is started again, over all workers.
    Raises:
        ConfigError: so many ranks are no workers, or torchft is not there.
    """
    workers = check_world_size(ranks, recipe.qsr.worker_size)
    launch = uuid.uuid4().hex
    with (
        tempfile.TemporaryDirectory(prefix="qsr-") as folder,
        guarded(launch, Path(folder)),
        contextlib.ExitStack() as stack,
    ):
        more = {LAUNCH: launch, LAUNCHED: launch, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        if not os.environ.get(LIGHTHOUSE):
            more |= {LIGHTHOUSE: stack.enter_context(_lighthouse(recipe)), EXPECTED: str(workers)}
            print(no_grace(recipe.qsr.membership, workers), end="", file=sys.stderr)
        if "OMP_NUM_THREADS" not in os.environ:
            more["OMP_NUM_THREADS"] = str(max(1, usable_cores() // ranks))
        there = [_Worker(number, recipe.qsr.worker_size, words, Path(folder), more) for number in range(workers)]
        stack.callback(lambda: end(processes_of(launch)))
        return _watch(there, restarts)


def no_grace(membership: MembershipConfig, workers: int) -> str:
    """A line where a grace is asked for that has no effect with so few workers."""
    if membership.grace_seconds is None or workers > 2:
        return ""
    return (
        f"qsr: membership.grace_seconds has no effect with {counted(workers, 'worker')}: members go on without a late "
        "one where more than half of them are there; start 3 or more (`--ranks`)\n"
    )


@contextlib.contextmanager
def _lighthouse(recipe: Recipe) -> Iterator[str]:
    """Its address, for the workers of this host."""
    port = free_port()
    membership = recipe.qsr.membership
    lighthouse = start_lighthouse(port, membership.timeout_seconds, membership.grace_seconds)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        lighthouse.shutdown()


class _Worker:
    """The processes of one worker; they are there when it is made.

    Args:
        number: among those of this host.
    """

    def __init__(self, number: int, size: int, words: Sequence[str], folder: Path, more: Mapping[str, str]) -> None:
        self.number, self._size, self._words, self._more = number, size, words, more
        self._folder = folder / f"worker-{number}"
        self._folder.mkdir()
        self._name = str(number) if EXPECTED in more else f"{socket.gethostname()}-{number}"  # others are elsewhere
        self.stopped = self._folder / "stopped"
        self.starts = 0
        self._ranks: list[subprocess.Popen[bytes]] = []
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        port = str(free_port())
        command = [sys.executable, "-m", "qsr_engine", *self._words]
        self._ranks = []
        for rank in range(self._size):
            environment = {
                **os.environ,
                **self._more,
                WORKER: self._name,
                STOPPED_FILE: str(self.stopped),
                "RANK": str(rank),
                "LOCAL_RANK": str(self.number * self._size + rank),
                "WORLD_SIZE": str(self._size),
                "LOCAL_SIZE": str(self._size),
                "LOCAL_WORLD_SIZE": str(self._size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RESTART_COUNT": str(self.starts),
            }
            self._ranks.append(subprocess.Popen(command, start_new_session=True, env=environment))
        self.starts += 1

    def code(self) -> int | None:
        """None while it runs. Where one rank has failed, the others are ended, since they would wait for it."""
        codes = [rank.poll() for rank in self._ranks]
        failed = next((code for code in codes if code), None)
        if failed is None:
            return None if None in codes else 0
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.kill()
            rank.wait()
        return failed

    def hopeless(self) -> bool:
        """Whether it has ended with an error that would come again (cli.launched.no_restart)."""
        return (self._folder / "error").exists()

    def frozen(self) -> bool:
        """Whether one of its ranks is (SIGSTOP), and hears no other signal."""
        with contextlib.suppress(psutil.Error):
            return any(psutil.Process(rank.pid).status() == psutil.STATUS_STOPPED for rank in self._ranks)
        return False

    def send(self, number: int) -> None:
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.send_signal(number)


def _watch(workers: list[_Worker], restarts: int) -> int:
    """Until all have ended; those that die are started again so many times."""
    received: list[int] = []

    def react(signum: int, _: FrameType | None) -> None:
        if signum in SIGNALS and received:
            return  # schedulers send it to a process and to its group
        received.append(signum)
        for worker in workers:
            if signum in SIGNALS:
                asked_file(worker.stopped).touch()
            worker.send(signum if signum in SIGNALS else signal.SIGKILL)

    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, *SIGNALS)
    before: dict[int, Any] = {number: signal.signal(number, react) for number in numbers}
    try:
        codes = _run(workers, restarts, received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if any(worker.stopped.exists() for worker in workers):
        return STOPPED
    if received and received[0] not in SIGNALS:
        return 128 + received[0]
    failed = next((code for code in codes.values() if code), 0)
    return 0 if 0 in codes.values() else failed if failed > 0 else 128 - failed


def _run(workers: list[_Worker], restarts: int, received: list[int]) -> dict[int, int]:
    """The exit codes of the workers, by their numbers, of their last start."""
    running, codes = list(workers), dict[int, int]()
    while running:
        time.sleep(_LOOK)
        for worker in list(running):
            code = worker.code()
            if code is None:
                if received and codes and worker.frozen():  # the others have stopped
                    print(f"qsr: worker {worker.number} is frozen, cannot stop, and is killed", file=sys.stderr)
                    worker.send(signal.SIGKILL)
                continue
            if code and restarts and not received and not worker.hopeless() and 0 not in codes.values():
                restarts -= 1
                print(f"qsr: worker {worker.number} has died ({_spelled(code)}) and is started again", file=sys.stderr)
                worker.start()
                continue
            if code and not received:
                then = "; the others go on" if len(running) > 1 else ""
                print(f"qsr: worker {worker.number} has died ({_spelled(code)}){then}", file=sys.stderr)
            running.remove(worker)
            codes[worker.number] = code
    return codes


def _spelled(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {-code}"
