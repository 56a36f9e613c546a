"""Ends what a launch has left running, also where the launcher itself was killed and can end nothing.

`python guard.py LAUNCH FOLDER` reads standard input to its end, which comes when its parent is gone, however it went.
It imports nothing of this package, so that it is there in a moment. DeepSpeed's launcher and torchrun start ranks in
sessions of their own, so the parent's death alone ends none of them; a variable in their environment tells which they
are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

LAUNCH = "QSR_ENGINE_LAUNCH"  # in the environment of all processes of one launch


@contextlib.contextmanager
def guarded(launch: str, folder: Path) -> Iterator[None]:
    """Should this process be killed inside, a small process beside it ends the launch and deletes its folder."""
    command = [sys.executable, "-P", __file__, launch, str(folder)]
    # In a session of its own, so that neither Ctrl-C nor a signal to the group of `qsr train` reaches it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        yield
        guard.kill()  # nothing is left to do: the launcher has ended its processes itself


def processes_of(launch: str) -> list[psutil.Process]:
    """All that have this launch in their environment, but for this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(LAUNCH) == launch:
                found.append(process)
    return found


def end(processes: Sequence[psutil.Process]) -> None:
    """At once: what a rank has saved is whole, and one that waits for another would not hear of a request."""
    _kill(processes)
    psutil.wait_procs(processes, timeout=10)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _main(launch: str, folder: str) -> None:
    sys.stdin.buffer.read()
    while left := processes_of(launch):  # again: one of them may just have started another
        _kill(left)
        time.sleep(0.05)  # between two looks; nobody tells of processes that are not our children
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
