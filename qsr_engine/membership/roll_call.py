"""The ranks call the roll before the first process group is made, so that hosts that cannot meet are told apart.

Without it a missing host, a wrong interface name or a firewall between two hosts is a wait of many minutes that ends in
a traceback of torch, and other versions on one host are found in the middle of a run, or never.

    1  every rank checks the interfaces that its environment names
    2  it joins the store of rank 0 at MASTER_ADDR:MASTER_PORT, and says who it is and with which versions it runs
    3  rank 0 waits for all and tells everyone the outcome, so that every rank ends with the same error, or with none
    4  where there are several hosts, one rank of each tries to reach the others on the addresses that training will use

The store is the one that torch.distributed makes a moment later. On rank 0 both are the same server (`multi_tenant`),
so it must live until the process group is there: make it inside `with roll_call(...)`. Under torchrun the agent may
have the server (TORCHELASTIC_USE_AGENT_STORE); it outlives restarts, so what an earlier call left there must not be
taken for an answer: every call has a random name, and a rank takes an outcome only if its own random token is in it.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # there at run time

from qsr_engine.membership.hosts import HostError
from qsr_engine.membership.network import Door, addresses, check_interfaces, partners, unreached
from qsr_engine.membership.rendezvous import (
    GRACE_SECONDS,
    VARIABLE,
    first_line,
    join_store,
    master,
    moments,
    start_seconds,
)
from qsr_engine.membership.spelling import first_lines, some
from qsr_engine.membership.versions import differences, versions

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CONNECT_SECONDS = 10.0  # in which one host must take another's connection
_REACHING_SECONDS = 2 * _CONNECT_SECONDS + GRACE_SECONDS  # for doors to open, and to be tried
_PROBLEMS = 20  # that an error spells out
_CALL = "qsr_engine/roll call"  # key under which rank 0 says the name of the call


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What a rank says of itself."""

    rank: int
    host: str
    node: str  # ranks with the same one were started on one host, by one launcher
    token: str  # random, of this call
    versions: dict[str, str]
    problem: str | None  # why this rank cannot go on, found before the call
    refuses: bool = False  # it will not come to another call, so that rank 0 waits for all to hear of it


@contextlib.contextmanager
def roll_call(backend: str) -> Iterator[None]:
    """Meet all ranks; make the process group of this backend inside the block.

    Nothing is done where the launcher's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) are not set yet.

    Args:
        backend: as torch.distributed takes it, "gloo", "nccl" or "cpu:gloo,cuda:nccl".
    Raises:
        HostError: on every rank that came, within QSR_START_SECONDS of its start or of the moment when it reached
            rank 0: ranks did not come, versions differ, an interface is not there, hosts do not reach one another, or
            rank 0 is not reached.
    """
    if not all(os.environ.get(name) for name in _RENDEZVOUS):
        yield
        return
    seconds = start_seconds()
    problem = check_interfaces(backend)
    rank = int(os.environ["RANK"])
    try:
        store = join_store(rank, seconds)
    except HostError as error:
        raise HostError(f"{problem}\nand {error}") if problem else error from None
    call = _Leader(store, backend, problem, seconds) if rank == 0 else _Call(store, backend, problem, seconds)
    try:
        call.meet()
    except dist.DistError as error:
        raise HostError(
            f"{call.me}: the connection to rank 0 at {master()} broke during the roll call; if rank 0 has ended, its "
            f"message says why ({first_line(error)})"
        ) from None
    yield
    del store, call  # held until here: on rank 0 it is the server that the process group has taken over


@contextlib.contextmanager
def told_to_all() -> Iterator[None]:
    """What comes before the roll call: an error in the block is told in it, so that all ranks end with it, and at once.

    Else the others would wait for this rank, and learn only that it did not come. It is raised when they have heard it,
    or QSR_START_SECONDS have passed.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):  # they learn what they can, and this one is raised
            _refuse(error)
        raise


def _refuse(error: Exception) -> None:
    if dist.is_initialized() or not all(os.environ.get(name) for name in _RENDEZVOUS):
        return
    rank, seconds = int(os.environ["RANK"]), start_seconds()
    store = join_store(rank, seconds)
    call = (_Leader if rank == 0 else _Call)(store, "", None, seconds)
    call.refuse(f"{call.me} cannot go on: {error}")


# ------------------------------------------------------------------------------------------------- the call


class _Call:
    """One roll call, on one rank. The names of keys begin with that of the call."""

    def __init__(self, store: Store, backend: str, problem: str | None, seconds: float) -> None:
        self._store = store
        self._backend = backend
        self._seconds = seconds
        self._ranks = int(os.environ["WORLD_SIZE"])
        self._answer = _Answer(
            rank=int(os.environ["RANK"]),
            host=socket.gethostname(),
            node=_node(),
            token=secrets.token_hex(4),
            versions={"ranks (WORLD_SIZE)": str(self._ranks), **versions()},
            problem=problem,
        )
        self.me = f"rank {self._answer.rank} on {self._answer.host}"

    def refuse(self, problem: str) -> None:
        """Meet the others with a reason why this rank cannot go on. Raises HostError, as on every rank."""
        self._answer = dataclasses.replace(self._answer, problem=problem, refuses=True)
        self.meet()

    def meet(self) -> None:
        """Raises HostError if the ranks cannot go on, DistError if the store is lost."""
        name, outcome = self._first_outcome()
        self._take(name, 1, outcome)
        if len(outcome["nodes"]) < 2:
            return
        with self._door(name, outcome["nodes"]):
            text = self._wait(f"{name}/outcome 2", _REACHING_SECONDS + GRACE_SECONDS)
        if text is None:
            raise HostError(f"{self.me}: rank 0 was lost while the hosts tried to reach one another")
        self._take(name, 2, json.loads(text))

    def _first_outcome(self) -> tuple[str, dict[str, Any]]:
        """The name of the call, and what rank 0 says when all have come or the time is up."""
        name = ""
        for _ in moments(time.monotonic() + self._seconds + GRACE_SECONDS):
            if not self._store.check([_CALL]):
                continue
            current = self._store.get(_CALL).decode()
            if current != name:
                name = current
                self._answer_call(name)
            if self._store.check([f"{name}/outcome 1"]):
                outcome: dict[str, Any] = json.loads(self._store.get(f"{name}/outcome 1"))
                if outcome["tokens"].get(str(self._answer.rank)) == self._answer.token:
                    return name, outcome
        raise HostError(
            f"{self.me} reached {master()}, and rank 0 did not call the roll there in {self._seconds:g} s "
            f"({VARIABLE}); it was not started, it has ended (its message says why), or this rank came too late"
        )

    def _answer_call(self, name: str) -> None:
        self._store.set(f"{name}/rank {self._answer.rank}", json.dumps(dataclasses.asdict(self._answer)))

    def _take(self, name: str, number: int, outcome: Mapping[str, Any]) -> None:
        """Let rank 0 know that it may end, and raise the outcome's error."""
        self._store.add(f"{name}/heard {number}", 1)
        if outcome["error"]:
            raise HostError(outcome["error"])

    def _wait(self, key: str, seconds: float) -> str | None:
        for _ in moments(time.monotonic() + seconds):
            if self._store.check([key]):
                return str(self._store.get(key).decode())
        return None

    @contextlib.contextmanager
    def _door(self, name: str, nodes: list[list[Any]]) -> Iterator[None]:
        """As the first rank of its host: open a door, try those of other hosts, and tell rank 0 what failed.

        The door is open in the block, since others may still try it.
        """
        me = self._answer.rank
        place = next((place for place, (rank, _) in enumerate(nodes) if rank == me), None)
        if place is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            failures, described = [], []
            try:
                door = stack.enter_context(Door(addresses(self._backend, os.environ["MASTER_ADDR"])))
                described = door.described()
            except OSError as error:
                failures.append(f"{self.me} cannot listen: {error}")
            self._store.set(f"{name}/door {me}", json.dumps(described))
            if not failures:
                failures = [
                    f"from {nodes[place][1]} (rank {me}) to {text}" for text in self._unreached(name, place, nodes)
                ]
            self._store.set(f"{name}/reached {me}", json.dumps(failures))
            yield

    def _unreached(self, name: str, place: int, nodes: list[list[Any]]) -> list[str]:
        limit = min(self._seconds, _CONNECT_SECONDS)
        end = time.monotonic() + limit
        doors: list[tuple[str, str, int, str]] = []
        failures = []
        for other in partners(place, len(nodes)):
            rank, host = nodes[other]
            text = self._wait(f"{name}/door {rank}", max(0.0, end - time.monotonic()))
            if text is None:
                failures.append(f"{host} (rank {rank}): it was lost meanwhile")
            else:
                doors += [(f"{host} (rank {rank})", *where) for where in json.loads(text)]
        return failures + unreached(doors, limit)


class _Leader(_Call):
    """The roll call on rank 0, which waits for all and decides."""

    def meet(self) -> None:
        name = secrets.token_hex(8)
        self._answer_call(name)
        self._store.set(_CALL, name)
        answers = self._gather(name)
        tokens = {str(answer.rank): answer.token for answer in answers}
        nodes = _nodes(answers)
        error = _problems(answers) or _missing(answers, self._ranks, self._seconds) or _other_versions(answers)
        self._decide(name, 1, {"error": error, "tokens": tokens, "nodes": nodes}, len(answers))
        if len(nodes) < 2:
            return
        with self._door(name, nodes):
            failures = self._failures(name, [rank for rank, _ in nodes])
        self._decide(name, 2, {"error": _not_reached(failures)}, self._ranks)

    def _gather(self, name: str) -> list[_Answer]:
        """The answers of all ranks, or of those that came in time; soon after a rank told of a problem."""
        found: dict[int, _Answer] = {}
        end = time.monotonic() + self._seconds
        early = math.inf
        for _ in moments(end):
            for rank in range(self._ranks):
                if rank not in found and self._store.check([f"{name}/rank {rank}"]):
                    found[rank] = _Answer(**json.loads(self._store.get(f"{name}/rank {rank}")))
                    if found[rank].problem and not found[rank].refuses:
                        early = min(early, time.monotonic() + GRACE_SECONDS)
            if len(found) == self._ranks or time.monotonic() > early:
                break
        return [found[rank] for rank in sorted(found)]

    def _decide(self, name: str, number: int, outcome: dict[str, Any], present: int) -> None:
        """Tell all, and stay until all have heard it, since the store ends with this process. Raises the error."""
        self._store.set(f"{name}/outcome {number}", json.dumps(outcome))
        self._store.add(f"{name}/heard {number}", 1)
        for _ in moments(time.monotonic() + GRACE_SECONDS):
            if self._store.add(f"{name}/heard {number}", 0) >= present:
                break
        if outcome["error"]:
            raise HostError(outcome["error"])

    def _failures(self, name: str, ranks: Sequence[int]) -> list[str]:
        """What the first ranks of all hosts could not reach."""
        end = time.monotonic() + _REACHING_SECONDS
        failures: list[str] = []
        for rank in ranks:
            text = self._wait(f"{name}/reached {rank}", max(0.0, end - time.monotonic()))
            failures += [f"rank {rank} was lost meanwhile"] if text is None else json.loads(text)
        return failures


# ------------------------------------------------------------------------------------------------- hosts


def _node() -> str:
    """Which of the launcher's hosts this is: by torchrun, by DeepSpeed's launcher, or by its name."""
    number = next((os.environ[name] for name in ("GROUP_RANK", "CROSS_RANK") if os.environ.get(name)), None)
    return f"{socket.gethostname()} number {number}" if number else socket.gethostname()


def _nodes(answers: Sequence[_Answer]) -> list[list[Any]]:
    """[first rank, host] of every host; what tells two of the same name apart stands in the second."""
    first: dict[str, _Answer] = {}
    for answer in answers:
        first.setdefault(answer.node, answer)
    names = [answer.host for answer in first.values()]
    return [[a.rank, a.host if names.count(a.host) == 1 else a.node] for a in first.values()]


def _hosts_of_launcher() -> list[str]:
    """The host of every rank, as DeepSpeed's launcher was told; [] where something else started this process.

    The launcher has the names in its command line, --world_info=BASE64 of {host: [device, ...]}, and gives them to
    nobody.
    """
    try:
        words = psutil.Process(os.getppid()).cmdline()
        world = next(word.partition("=")[2] for word in words if word.startswith("--world_info="))
        hosts = json.loads(base64.urlsafe_b64decode(world))
        return [host for host, devices in hosts.items() for _ in devices]
    except (psutil.Error, StopIteration, ValueError, AttributeError, TypeError):
        return []


# ------------------------------------------------------------------------------------------------- what errors say


def _problems(answers: Sequence[_Answer]) -> str | None:
    found = list(dict.fromkeys(answer.problem for answer in answers if answer.problem))
    return "\n".join(found[:_PROBLEMS]) if found else None


def _missing(answers: Sequence[_Answer], ranks: int, seconds: float) -> str | None:
    if len(answers) == ranks:
        return None
    came = {answer.rank: answer.host for answer in answers}
    hosts = _hosts_of_launcher()
    size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    absent: dict[str, list[int]] = {}
    for rank in sorted({*range(ranks)} - {*came}):
        mates = [host for other, host in came.items() if other // size == rank // size]
        where = hosts[rank] if rank < len(hosts) else mates[0] if mates else f"host number {rank // size}"
        absent.setdefault(where, []).append(rank)
    present: dict[str, list[int]] = {}
    for rank, host in came.items():
        present.setdefault(host, []).append(rank)
    lines = [f"  missing: {_ranks(numbers)} of {host}" for host, numbers in absent.items()]
    lines += [f"  there: {_ranks(numbers)} of {host}" for host, numbers in present.items()]
    return (
        f"{ranks - len(came)} of {ranks} ranks did not come within {seconds:g} s ({VARIABLE}):\n"
        + first_lines(lines, " hosts")
        + f"\nHas the launcher reached those hosts (`qsr hosts HOSTFILE`), did those ranks end with a message of their "
        f"own, and do those hosts reach {master()} (MASTER_ADDR:MASTER_PORT)? If they are only slow to start, set "
        f"{VARIABLE} to more seconds."
    )


def _other_versions(answers: Sequence[_Answer]) -> str | None:
    facts = {f"rank {answer.rank} ({answer.host})": answer.versions for answer in answers}
    lines = differences(facts)
    if not lines:
        return None
    return (
        "the ranks run other versions:\n"
        + "\n".join(lines)
        + "\nInstall the same versions and the same checkout on every host; `qsr hosts HOSTFILE` compares them."
    )


def _not_reached(failures: Sequence[str]) -> str | None:
    if not failures:
        return None
    return (
        "hosts do not reach one another:\n"
        + first_lines([f"  {text}" for text in failures])
        + "\nTraining connects every host to others on ports that the system chooses: open all of them between the "
        "hosts, or name the interface of another network by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
    )


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + some([str(rank) for rank in ranks])
