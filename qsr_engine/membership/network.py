"""This host's network interfaces as gloo and NCCL choose among them, and whether other hosts are reached.

gloo takes the interfaces that GLOO_SOCKET_IFNAME names, or else the address of the host's own name. NCCL takes those
that match NCCL_SOCKET_IFNAME (prefixes; `=` exact names; `^` all but these; source: NCCL's documentation), or else
looks for one itself; here that is the one on the way to MASTER_ADDR.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import psutil

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_ALL_TO_ALL = 64  # hosts up to which everyone tries all others; beyond, those at distances 1, 2, 4, ... in a ring


def interfaces() -> dict[str, list[str]]:
    """The addresses of every interface, IPv4 first; those without an address of use to gloo and NCCL have none."""
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        addresses = [entry.address for entry in entries if entry.family == socket.AF_INET]
        six = [entry.address for entry in entries if entry.family == socket.AF_INET6]
        found[name] = addresses + [one for one in six if not one.startswith("fe80:")]  # of one link: not routed
    return found


def check_interfaces(backend: str) -> str | None:
    """What is wrong with the interfaces that the environment names, None if nothing is.

    gloo's are always checked, since offloaded parameters are averaged through it beside NCCL; NCCL's where it is used.
    """
    there = interfaces()
    with_address = [name for name, addresses in there.items() if addresses]
    problems = []
    for name in filter(None, os.environ.get(GLOO, "").split(",")):
        if name not in with_address:
            wrong = f"the interface {name!r} has no IP address" if name in there else f"there is no interface {name!r}"
            problems.append(f"{GLOO} is {os.environ[GLOO]!r}, and {wrong}")
    if "nccl" in backend and os.environ.get(NCCL) and not matching(os.environ[NCCL], with_address):
        problems.append(f"{NCCL} is {os.environ[NCCL]!r}, which no interface matches (prefixes; `=` exact; `^` not)")
    if not problems:
        return None
    return (
        f"{'; '.join(problems)}, on host {socket.gethostname()}. Interfaces with "
        f"an IP address there: {', '.join(with_address)}; name one of them, or leave the variable out. On hosts whose "
        "interfaces have different names set it on each host by itself"
    )


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a value of NCCL_SOCKET_IFNAME leaves."""
    exclude = pattern.startswith("^")
    pattern = pattern.removeprefix("^")
    exact = pattern.startswith("=")
    parts = [part for part in pattern.removeprefix("=").split(",") if part]

    def listed(name: str) -> bool:
        return any(name == part if exact else name.startswith(part) for part in parts)

    return [name for name in names if listed(name) != exclude]


def addresses(backend: str, master: str) -> list[str]:
    """The addresses of this host on which gloo and NCCL will be reached, each once.

    Args:
        master: MASTER_ADDR.
    Raises:
        OSError: this host has no way to MASTER_ADDR.
    """
    there = interfaces()
    found = []
    if "gloo" in backend:
        named = [name for name in os.environ.get(GLOO, "").split(",") if name]
        found += [there[name][0] for name in named] or [_address_of_own_name()]
    if "nccl" in backend:
        pattern = os.environ.get(NCCL, "")
        # The loopback is among what `^docker` leaves; NCCL takes it only where there is nothing else.
        named = matching(pattern, [name for name in there if there[name]]) if pattern else []
        beyond = [name for name in named if not _is_loopback(there[name][0])]
        found += [there[name][0] for name in (beyond or named)[:1]] or [address_on_the_way_to(master)]
    return list(dict.fromkeys(found))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _address_of_own_name() -> str:
    """As torch chooses gloo's address: what the host's name resolves to, if it is this host's; else the loopback."""
    with contextlib.suppress(OSError, UnicodeError):  # UnicodeError: a label of over 63 characters
        for family, _, _, _, where in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((where[0], 0))
                return str(where[0])
    return "127.0.0.1"


def address_on_the_way_to(master: str) -> str:
    """The address of this host from which another one is reached. Raises OSError where it has no way to it."""
    family, kind, _, _, where = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # of a datagram socket: the system chooses the way, and nothing is sent
        return str(probe.getsockname()[0])


# ------------------------------------------------------------------------------------------------- reachability


class Door:
    """Listens on ports that the system chooses, one an address, and tells everyone who comes its token.

    The token is for hosts that have the same address (172.17.0.1 of docker, 127.0.1.1): each would reach itself.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.token = secrets.token_hex(8)
        self._listening: list[tuple[str, socket.socket]] = []
        try:
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listening = socket.create_server((address, 0), family=family, backlog=1024)
                self._listening.append((address, listening))
        except OSError:
            self.close()
            raise
        self._threads = [threading.Thread(target=self._serve, args=(s,), daemon=True) for _, s in self._listening]
        for thread in self._threads:
            thread.start()

    def described(self) -> list[tuple[str, int, str]]:
        """(address, port, token) of each."""
        return [(address, listening.getsockname()[1], self.token) for address, listening in self._listening]

    def _serve(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(self.token.encode())

    def close(self) -> None:
        for _, listening in self._listening:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # close() alone does not end accept()
            listening.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def partners(place: int, count: int) -> list[int]:
    """Whom the host at this place tries among `count`: all others, or in large runs some in every direction."""
    if count <= _ALL_TO_ALL:
        return [other for other in range(count) if other != place]
    distances = [1 << bit for bit in range(count.bit_length()) if 1 << bit < count]
    return sorted({(place + sign * distance) % count for distance in distances for sign in (1, -1)} - {place})


def unreached(doors: Sequence[tuple[str, str, int, str]], seconds: float) -> list[str]:
    """Try all doors at once, each for so many seconds. Returns a description of each that was not reached.

    Args:
        doors: (name, address, port, token) of each.
    """
    if not doors:
        return []
    with ThreadPoolExecutor(len(doors)) as pool:
        found = pool.map(lambda door: _try(seconds, *door), doors)
        return [text for text in found if text is not None]


def _try(seconds: float, name: str, address: str, port: int, token: str) -> str | None:
    try:
        with (
            socket.create_connection((address, port), timeout=seconds) as connection,
            connection.makefile("rb") as stream,
        ):
            if stream.read(len(token)).decode(errors="replace") == token:
                return None
        reason = "another host or program answers at that address"
    except TimeoutError:
        reason = f"no answer in {seconds:g} s"
    except OSError as error:
        reason = error.strerror or str(error)
    loopback = (
        f" (an address that every host has; give the host's name its own in /etc/hosts, or set {GLOO} there)"
        if _is_loopback(address)
        else ""
    )
    return f"{name} at {address}{loopback}, port {port}: {reason}"
