"""The end of a process whose gloo threads still let go of tensors.

A collective is waited for before gloo's thread has let go of its tensors. Letting go of a tensor that Python knows
takes the interpreter's lock, and a foreign thread that asks for it while the interpreter ends is made to exit from
the middle of C++, which aborts the process: "terminate called without an active exception", exit code -6, after a run
that went well. On busy cores it happens. torch has no call that waits for these threads, except for the destruction of
the group, which everybody who holds the group puts off; so Linux is asked what they do.
"""

from __future__ import annotations

import time
from pathlib import Path

_GLOO = "pt_gloo_runloop"  # torch's name for them
_MOST_SECONDS = 5.0  # that the end of a process is put off
_PAUSE = 0.01  # seconds; more than the 5 ms after which who waits for the interpreter's lock wakes up


def await_idle_threads(name: str = _GLOO, seconds: float = _MOST_SECONDS) -> bool:
    """Wait until this process's threads of a name sleep, and slept throughout a pause in which they could have run.

    Args:
        name: as Linux has it, so of at most 15 characters.
        seconds: how long to wait at most.
    Returns:
        Whether they do; also where there are none, or no /proc to look them up in.
    """
    end = time.monotonic() + seconds
    before = _states(name)
    while before:
        time.sleep(_PAUSE)  # which lets the interpreter's lock go
        now = _states(name)
        if now == before and all(state.startswith("S") for state in now.values()):
            return True
        if time.monotonic() > end:
            return False
        before = now
    return True


def _states(name: str) -> dict[str, str]:
    """What each thread does, and how often it was switched to and from, which tells a nap from a sleep."""
    states = {}
    for thread in Path("/proc/self/task").glob("*"):
        try:
            if (thread / "comm").read_text().strip() == name:
                lines = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines())
                states[thread.name] = (
                    lines["State"].strip() + lines["voluntary_ctxt_switches"] + lines["nonvoluntary_ctxt_switches"]
                )
        except (OSError, KeyError, ValueError):  # it has ended, or this is another system's /proc
            continue
    return states
