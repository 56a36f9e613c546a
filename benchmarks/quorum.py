"""What does a quorum of torchft cost, in seconds and bytes, and how does that grow with the members?

    python -m benchmarks.quorum                        # 2 to 200 members, three minutes
    python -m benchmarks.quorum --members 10 50 --rounds 3
    python -m benchmarks.quorum --out benchmarks/results

A member here is what it is for a lighthouse: one client that asks for a quorum at the same moment as all others, and,
through a manager, one manager server with its heartbeats. Nobody trains. All are threads of one process on one machine,
and the lighthouse is a process of its own; where root runs it, each number of members has a network namespace of its
own, whose loopback interface counts the bytes (with headers of TCP and IP). Elsewhere bytes are not known.

    direct      every member asks the lighthouse itself (LighthouseClient)
    manager     every member asks its manager server, which asks the lighthouse, as in training
    two levels  about sqrt(n) regions with a lighthouse each: a quorum inside every region, one of the regions' first
                members at another lighthouse, and a second one inside every region, which carries what that one said

Seconds are those from the common start to the answer: of the median member and of the slowest, median over the rounds.
"died" is the next quorum after a manager has gone without a word: it waits until the lighthouse's heartbeat time-out.
"joined" is the first one with a new member, which asks a second before the others and waits for them.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import multiprocessing as mp
import os
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import psutil

from benchmarks.report import Report, parser, table

MEMBERS = (2, 10, 50, 100, 200)
HEARTBEAT = 0.1  # seconds between two of a manager's; the default of torchft's Manager
TIMEOUT = timedelta(seconds=60)
CLONE_NEWNET = 0x40000000
PORT = 29500


@dataclass
class Row:
    """Seconds and bytes with so many members; None where bytes cannot be counted."""

    members: int
    direct: dict[str, Any] = field(default_factory=dict)
    manager: dict[str, Any] = field(default_factory=dict)
    two_levels: dict[str, Any] = field(default_factory=dict)
    heartbeat_bytes_per_second: float | None = None
    died: float = math.nan
    joined: float = math.nan
    lighthouse_mb: float = math.nan


# ------------------------------------------------------------------------------------------------------ a machine


def own_network() -> bool:
    """A network namespace of this process's own, with a loopback interface that is up. Needs root."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNET):
        return False
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return True


def bytes_so_far() -> int:
    """That have come in at the loopback interface."""
    with open("/proc/net/dev", encoding="ascii") as devices:
        return next(int(line.split()[1]) for line in devices if line.strip().startswith("lo:"))


def serve(fewest: Sequence[int], heartbeat_timeout: float, wire: Connection) -> None:
    """Lighthouses, until somebody writes.

    Args:
        fewest: members without which each gives no quorum.
    """
    from torchft.coordination import LighthouseServer

    servers = [
        LighthouseServer(
            bind=f"127.0.0.1:{PORT + number}",
            min_replicas=members,
            join_timeout_ms=60_000,
            quorum_tick_ms=100,
            heartbeat_timeout_ms=round(1000 * heartbeat_timeout),
        )
        for number, members in enumerate(fewest)
    ]
    wire.send(True)
    wire.recv()
    for server in servers:
        server.shutdown()


class Lighthouses:
    """In a process of their own."""

    def __init__(self, fewest: Sequence[int], heartbeat_timeout: float) -> None:
        context = mp.get_context("spawn")
        self._wire, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(fewest, heartbeat_timeout, theirs), daemon=True)
        self._process.start()
        self._wire.recv()
        self._seen = psutil.Process(self._process.pid)

    def cpu_seconds(self) -> float:
        times = self._seen.cpu_times()
        return float(times.user + times.system)

    def megabytes(self) -> float:
        return float(self._seen.memory_info().rss / 1e6)

    def close(self) -> None:
        self._wire.send(True)
        self._process.join()


def address(number: int = 0) -> str:
    return f"http://127.0.0.1:{PORT + number}"


def name_of(member: int) -> str:
    """As long as torchft's: a name and a UUID."""
    return f"worker-{member:05d}:{'0' * 36}"


# --------------------------------------------------------------------------------------------------------- rounds


class Rounds:
    """Members that ask at the same moment, again and again."""

    def __init__(self, members: int, lighthouses: Lighthouses, *, counted: bool) -> None:
        self._members, self._lighthouses, self._counted = members, lighthouses, counted
        self._pool = ThreadPoolExecutor(members)

    def one(
        self, ask: Callable[[int, int], int], step: int, who: Sequence[int] | None = None, joining: int | None = None
    ) -> dict[str, Any]:
        """Seconds until each was answered, bytes, and CPU seconds of the lighthouses.

        Args:
            who: asks; all by default.
            joining: one more, who was not in the last quorum, and asks before the others.
        Raises:
            RuntimeError: somebody was told of another number of members.
        """
        asking = range(self._members) if who is None else who
        first = None if joining is None else self._pool.submit(ask, joining, step)
        expected = len(asking) + (first is not None)
        if first is not None:
            time.sleep(10 * HEARTBEAT)
        start = threading.Barrier(len(asking))

        def timed(member: int) -> tuple[float, int]:
            start.wait()
            begun = time.perf_counter()
            found = ask(member, step)
            return time.perf_counter() - begun, found

        cpu, before, begun = self._lighthouses.cpu_seconds(), bytes_so_far(), time.perf_counter()
        answers = list(self._pool.map(timed, asking))
        lasted, after = time.perf_counter() - begun, bytes_so_far()
        told = {found for _, found in answers} | ({first.result()} if first is not None else set())
        if told != {expected}:
            raise RuntimeError(f"{expected} members asked, and were told of {sorted(told)}")
        seconds = sorted(second for second, _ in answers)
        return {
            "median": statistics.median(seconds),
            "slowest": seconds[-1],
            "bytes": after - before if self._counted else None,
            "cpu": self._lighthouses.cpu_seconds() - cpu,
            "lasted": lasted,
        }

    def several(self, ask: Callable[[int, int], int], rounds: int, idle: float | None = 0.0) -> dict[str, Any]:
        """Medians over rounds after a first one, which connects.

        Args:
            idle: bytes/s that would have travelled without them.
        """
        self.one(ask, 0)
        found = [self.one(ask, step) for step in range(1, rounds + 1)]
        medians = {name: statistics.median(f[name] for f in found) for name in ("median", "slowest", "cpu")}
        if not self._counted or idle is None:
            return {**medians, "bytes": None}
        return {**medians, "bytes": statistics.median(f["bytes"] - idle * f["lasted"] for f in found)}


def direct(members: int) -> Callable[[int, int], int]:
    from torchft.coordination import LighthouseClient

    clients = [LighthouseClient(address(), TIMEOUT) for _ in range(members)]

    def ask(member: int, step: int) -> int:
        return len(_quorum(clients[member], name_of(member), step).participants)

    return ask


def _quorum(client: Any, name: str, step: int, data: dict[str, Any] | None = None) -> Any:
    where = "http://10.100.100.100:29500"
    store = where.removeprefix("http://")
    return client.quorum(
        replica_id=name, timeout=TIMEOUT, address=where, store_address=store, step=step, world_size=1, data=data
    )


def region_of(member: int, members: int, regions: int) -> int:
    return member * regions // members


def two_levels(members: int, regions: int) -> Callable[[int, int], int]:
    """Lighthouse 0 is that of the regions' first members."""
    from torchft.coordination import LighthouseClient

    own = [region_of(member, members, regions) for member in range(members)]
    clients = [LighthouseClient(address(1 + region), TIMEOUT) for region in own]
    above = [LighthouseClient(address(), TIMEOUT) for _ in range(regions)]

    def ask(member: int, step: int) -> int:
        client, name = clients[member], name_of(member)
        inside = _quorum(client, name, 2 * step).participants
        told = None
        if name == min(other.replica_id for other in inside):
            all_ = _quorum(above[own[member]], name, step, {"members": len(inside)}).participants
            told = {"regions": [[r.replica_id, r.store_address, r.data["members"]] for r in all_]}
        (found,) = (other.data for other in _quorum(client, name, 2 * step + 1, told).participants if other.data)
        return sum(count for _, _, count in found["regions"])

    return ask


class Managers:
    """A manager server and its client for each member."""

    def __init__(self, members: int) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}
        for member in range(members):
            self.begin(member)

    def begin(self, member: int) -> None:
        from torchft._torchft import ManagerClient, ManagerServer

        server = ManagerServer(
            replica_id=name_of(member),
            lighthouse_addr=address(),
            hostname="127.0.0.1",
            bind="127.0.0.1:0",
            store_addr="10.100.100.100:29500",
            world_size=1,
            heartbeat_interval=timedelta(seconds=HEARTBEAT),
            connect_timeout=TIMEOUT,
            quorum_retries=0,
        )
        self._made[member] = server, ManagerClient(server.address(), connect_timeout=TIMEOUT)

    def die(self, member: int) -> None:
        self._made.pop(member)[0].shutdown()

    def ask(self, member: int, step: int) -> int:
        _, client = self._made[member]
        found = client._quorum(
            group_rank=0,
            step=step,
            checkpoint_metadata="http://10.100.100.100:29501",
            shrink_only=False,
            timeout=TIMEOUT,
            commit_failures=0,
            init_sync=True,
        )
        return int(found.replica_world_size)

    def close(self) -> None:
        for member in list(self._made):
            self.die(member)


# ---------------------------------------------------------------------------------------------------- measurement


def measure(members: int, rounds: int, heartbeat_timeout: float, wire: Connection) -> None:
    """In a process of its own, since torchft's threads stay."""
    row, counted = Row(members), own_network()
    lighthouses = Lighthouses([members], heartbeat_timeout)
    asking = Rounds(members, lighthouses, counted=counted)
    row.direct = asking.several(direct(members), rounds)
    lighthouses.close()

    lighthouses = Lighthouses([1], heartbeat_timeout)
    asking, managers = Rounds(members, lighthouses, counted=counted), Managers(members)
    time.sleep(10 * HEARTBEAT)  # until the lighthouse has heard of all
    asking.one(managers.ask, 0)
    before, begun = bytes_so_far(), time.perf_counter()
    time.sleep(2.0)
    if counted:
        row.heartbeat_bytes_per_second = (bytes_so_far() - before) / (time.perf_counter() - begun)
    row.manager = asking.several(managers.ask, rounds, row.heartbeat_bytes_per_second)
    row.lighthouse_mb = lighthouses.megabytes()
    managers.die(members - 1)
    row.died = asking.one(managers.ask, rounds + 1, range(members - 1))["slowest"]
    managers.begin(members - 1)
    row.joined = asking.one(managers.ask, rounds + 2, range(members - 1), joining=members - 1)["slowest"]
    managers.close()
    lighthouses.close()

    if (regions := round(math.sqrt(members))) > 1:
        inside = Counter(region_of(member, members, regions) for member in range(members))
        lighthouses = Lighthouses([regions, *(inside[region] for region in range(regions))], heartbeat_timeout)
        asking = Rounds(members, lighthouses, counted=counted)
        row.two_levels = {"regions": regions, **asking.several(two_levels(members, regions), rounds)}
        lighthouses.close()
    wire.send(json.dumps(asdict(row)))
    wire.recv()
    os._exit(0)


def measured(members: int, rounds: int, heartbeat_timeout: float) -> Row:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(members, rounds, heartbeat_timeout, theirs))
    process.start()
    theirs.close()
    try:
        row = Row(**json.loads(ours.recv()))
        ours.send(True)
    except EOFError:
        raise SystemExit(f"the measurement with {members} members failed; its error stands above") from None
    finally:
        process.join()
    return row


def _cells(name: str, row: Row) -> list[str]:
    told = getattr(row, name)
    size = told["bytes"]
    known = ["-", "-"] if size is None else [f"{size / 1e3:.1f}", f"{size / row.members**2:.0f}"]
    times = [f"{1e3 * told[key]:.1f}" for key in ("median", "slowest", "cpu")]
    label = f"two levels, {told['regions']} regions" if name == "two_levels" else name
    return [str(row.members), label, *times, *known]


def tables(rows: Sequence[Row]) -> str:
    columns = ["members", "way", "median, ms", "slowest, ms", "CPU of the lighthouses, ms", "kB", "bytes / members^2"]
    ways = ("direct", "manager", "two_levels")
    quorums = table(columns, [_cells(way, row) for way in ways for row in rows if getattr(row, way)])
    columns = ["members", "heartbeats, kB/s", "after one died, s", "with one that joined, s", "lighthouse, MB"]
    known = [row.heartbeat_bytes_per_second for row in rows]
    beats = ["-" if rate is None else f"{rate / 1e3:.1f}" for rate in known]
    others = table(
        columns,
        [
            [str(row.members), beat, f"{row.died:.2f}", f"{row.joined:.2f}", f"{row.lighthouse_mb:.0f}"]
            for row, beat in zip(rows, beats, strict=True)
        ],
    )
    return f"{quorums}\n\n{others}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--members", type=int, nargs="+", default=list(MEMBERS))
    made.add_argument("--rounds", type=int, default=7, help="quorums of each kind, after a first one")
    made.add_argument("--heartbeat-timeout", type=float, default=5.0, help="of the lighthouse; torchft's default")
    arguments = made.parse_args()
    if min(arguments.members) < 2 or arguments.rounds < 1:
        made.error(f"--members is {arguments.members}, --rounds {arguments.rounds}; write 2 or more, and 1 or more")
    os.environ.setdefault("RUST_LOG", "error")
    report = Report("quorum", arguments, ("torchft", "torch"))
    one = functools.partial(measured, rounds=arguments.rounds, heartbeat_timeout=arguments.heartbeat_timeout)
    rows = [one(members) for members in arguments.members]
    report.add(tables(rows))
    report.save(rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
