"""The store at MASTER_ADDR:MASTER_PORT, in which ranks meet: joined within a time, or an error that says why.

Source: torch.distributed's `env://`, which makes the same store a moment later; on rank 0 both are one server
(`multi_tenant`).
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # there at run time

from qsr_engine.membership.hosts import HostError

VARIABLE = "QSR_START_SECONDS"
START_SECONDS = 120.0  # unless the variable says another number
GRACE_SECONDS = 5.0  # for what rank 0 has decided to reach the others, and for those that follow an error closely
_RESOLVE_SECONDS = 10.0  # a name server may be slow at the start of a job, but not longer
_ADDRESS_IN_USE = "EADDRINUSE"
_LONGEST = 86_400.0


def start_seconds() -> float:
    """The time limit. Raises HostError if QSR_START_SECONDS is not a number of seconds."""
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else START_SECONDS
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _LONGEST:
        raise HostError(
            f"{VARIABLE} is {text!r}; write the seconds to wait for all ranks, at most {_LONGEST:.0f} (a day), for "
            f"example {VARIABLE}=300"
        )
    return seconds


def master() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def join_store(rank: int, seconds: float) -> TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, as torch.distributed's env:// will make it: by rank 0, or by torchrun."""
    name = os.environ["MASTER_ADDR"]
    if not os.environ["MASTER_PORT"].isdecimal() or not 0 < int(os.environ["MASTER_PORT"]) < 1 << 16:
        raise HostError(f"MASTER_PORT is {os.environ['MASTER_PORT']!r}; write a port, a number from 1 to 65535")
    port, serve = int(os.environ["MASTER_PORT"]), rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end = time.monotonic() + seconds
    who = f"rank {rank} on {socket.gethostname()}"
    if serve:
        _resolve(name, min(seconds, _RESOLVE_SECONDS), who)
    else:
        _reach_rank_0(name, port, seconds, who)
    try:
        return _make_store(name, port, serve, max(1.0, end - time.monotonic()))
    except dist.DistError as error:
        if _ADDRESS_IN_USE in str(error):
            raise HostError(
                f"{who}: port {port} (MASTER_PORT) is taken by another process on this host, perhaps by another run; "
                "choose another: `deepspeed --master_port N`, `torchrun --rdzv_endpoint HOST:N`"
            ) from None
        mine = (
            f"it listens on port {port} of this host and does not reach itself at {name} (MASTER_ADDR), which must be "
            "an address of the host of rank 0"
            if serve
            else f"what answers at {name}:{port} (MASTER_ADDR:MASTER_PORT) is not rank 0 of this run, or hangs"
        )
        raise HostError(f"{who}: {mine} ({first_line(error)})") from None


def _make_store(name: str, port: int, serve: bool, seconds: float) -> TCPStore:
    """In a thread, since torch's client waits for ever for a server that takes the connection and says nothing."""
    made: list[TCPStore | dist.DistError] = []

    def make() -> None:
        try:
            store = TCPStore(
                name,
                port,
                is_master=serve,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
                multi_tenant=True,
                use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
            )
        except dist.DistError as error:
            made.append(error)
        else:
            made.append(store)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(seconds + GRACE_SECONDS)
    if not made:
        raise dist.DistNetworkError(f"it takes the connection and says nothing in {seconds:g} s")
    result = made[0]
    if isinstance(result, dist.DistError):
        raise result
    return result


def _resolve(name: str, seconds: float, who: str) -> None:
    end = time.monotonic() + seconds
    for _ in moments(end):
        try:
            socket.getaddrinfo(name, None)
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: a label is empty or has over 63 characters
            reason = getattr(error, "strerror", None) or str(error)
    raise HostError(
        f"{who}: the name {name!r} (MASTER_ADDR) does not resolve on this host ({reason}); write it into /etc/hosts, "
        "or give the launcher an address: `deepspeed --master_addr ADDRESS`, `torchrun --rdzv_endpoint ADDRESS:PORT`"
    )


def _reach_rank_0(name: str, port: int, seconds: float, who: str) -> None:
    """Wait until somebody listens there. torch's own client would print warnings all the while."""
    started = time.monotonic()
    end = started + seconds
    _resolve(name, min(seconds, _RESOLVE_SECONDS), who)
    for _ in moments(end):
        try:
            with socket.create_connection((name, port), timeout=max(0.1, end - time.monotonic())) as made:
                if made.getsockname() == made.getpeername():  # the kernel chose the port itself for this end
                    raise ConnectionRefusedError
            return
        except ConnectionRefusedError:
            reason = "that host answers, and nobody listens on the port"
            help_ = (
                "rank 0 was not started, has ended (its message says why), or runs on another host than MASTER_ADDR "
                "says"
            )
        except OSError as error:
            reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error))
            help_ = f"the host is down, or a firewall between it and this host stops port {port}"
    raise HostError(
        f"{who} did not reach rank 0 at {name}:{port} (MASTER_ADDR:MASTER_PORT) in {seconds:g} s ({VARIABLE}): "
        f"{reason}; {help_}"
    )


def moments(end: float) -> Iterator[None]:
    """Moments at which to try again, at first soon after one another; at least one, the last at `end` (monotonic)."""
    pause = 0.001
    yield
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(2 * pause, 0.1)
        yield
