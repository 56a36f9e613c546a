"""SIGTERM and SIGUSR1 ask a run to stop: it saves, and its processes end in a way of their own.

A scheduler that takes a node back (SLURM's preemption, --signal=USR1@120) sends one of them some time before it kills.
What happens then, `qsr.faults.on_signal` says; LocalSteps makes all ranks stop after the same step.

Source of the exit code: EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

STOPPED = 75  # exit code of a run that was asked to stop and goes on with --resume
# A file that rank 0 makes when it has stopped so. Where it is set, ranks end with exit code 0, since launchers take any
# other for a failure (torchrun starts the ranks again); who set it looks for the file.
STOPPED_FILE = "QSR_STOPPED_FILE"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedError(Exception):
    """The run was asked to stop, and has stopped; the message says how it goes on."""


@contextlib.contextmanager
def stops_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 are requests to stop (LocalSteps.request_stop); the main thread enters.

    Python's own handlers wait for the main thread, which may be in a collective for long; so a thread reads the
    signals from a pipe. Where another wakeup file is set (asyncio), it is put back afterwards.
    """

    def noted(signum: int, frame: FrameType | None) -> None:
        request_stop()

    ours, signals = socket.socketpair()
    signals.setblocking(False)

    def read() -> None:
        while received := ours.recv(16):
            if any(number in SIGNALS for number in received):
                request_stop()

    before = {number: signal.signal(number, noted) for number in SIGNALS}
    file = signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
    reader = threading.Thread(target=read, name="qsr signals", daemon=True)
    reader.start()
    try:
        yield
    except StoppedError:  # a launcher that has seen another rank end must not interrupt this one
        before = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(file)
        signals.close()
        reader.join()
        ours.close()


def exit_code(rank: int) -> int:
    """That of a rank that has stopped; rank 0 also makes the file that QSR_STOPPED_FILE names."""
    path = os.environ.get(STOPPED_FILE)
    if not path:
        return STOPPED
    if rank == 0:
        Path(path).touch()
    return 0
