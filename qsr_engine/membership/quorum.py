"""torchft, for workers that come and go: its lighthouse says who is there, its process groups can be made anew.

The only file that imports torchft (0.2). What is decided from its answers is in members.py.

    every worker    asks for a quorum at a boundary, and beats from the first one on; its first rank does both, and
                    tells the others
    lighthouse      answers when all who beat have asked, or all who were in the last quorum have; who has not beaten
                    for `timeout_seconds` is not waited for. With grace it answers some time after the first has asked,
                    if more than half of those who beat have; its status page tells who beats
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import os
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch.distributed as dist

from qsr_engine.averaging.errors import CollectiveError, Group
from qsr_engine.config.membership import MembershipConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.membership.members import Quorum, Telling
from qsr_engine.membership.network import address_on_the_way_to
from qsr_engine.membership.rendezvous import start_seconds

log = logging.getLogger(__name__)

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"  # its address, as torchft's users know it
WORKER = "QSR_WORKER"  # what this worker is called in records, where its launcher says it
LAUNCHED = "QSR_LAUNCHED_WITH"  # the workers that its launcher started, which stop together
EXPECTED = "QSR_EXPECTED_WORKERS"  # that a launcher has started, for which a run waits before its first step
_FOREVER = timedelta(days=30)  # a quorum comes when the last member does, after a round that may be days long
_TICK = 0.5  # seconds
_BEAT = re.compile(r"([^\s<>]+): seen ([0-9.e+-]+)s ago")  # of a worker, on the lighthouse's status page


def torchft_part(name: str) -> Any:
    """A class of torchft.coordination or torchft.process_group.

    Raises:
        ConfigError: torchft is not installed.
    """
    os.environ.setdefault("RUST_LOG", "error")  # else it writes every quorum to standard error
    try:
        from torchft import coordination, process_group
    except ImportError as error:
        raise ConfigError(
            f"qsr.membership is 'torchft', which is not there ({error}); install it with `pip install "
            "qsr-engine[elastic]`, or write membership 'fixed'"
        ) from error
    return getattr(coordination, name, None) or getattr(process_group, name)


def start_lighthouse(port: int, timeout_seconds: float, grace_seconds: float | None = None) -> Any:
    """A lighthouse on all addresses of this host; it goes with its last reference, or by shutdown().

    Without grace it never gives up on a member that beats, however long its round is. It counts nobody: who waits for
    how many is the members' own decision.
    """
    waits = _FOREVER.total_seconds() if grace_seconds is None else grace_seconds
    return torchft_part("LighthouseServer")(
        bind=f"[::]:{port}",
        min_replicas=1,
        join_timeout_ms=int(waits * 1000),
        quorum_tick_ms=100,
        heartbeat_timeout_ms=int(timeout_seconds * 1000),
    )


class Lighthouse:
    """The line of one worker to the lighthouse, on its first rank.

    Args:
        address: "http://host:port".
        name: of this process, which no other one has.
    Raises:
        ConfigError: nobody answers there within the time-out.
    """

    def __init__(self, address: str, name: str, timeout_seconds: float) -> None:
        self.address, self.name, self._timeout = address, name, timeout_seconds
        self.interval = min(1.0, timeout_seconds / 20)
        self._beating, self._closed = threading.Event(), threading.Event()
        self._returned = 0.0  # when the lighthouse was back, the last time
        deadline = time.monotonic() + timeout_seconds
        while (problem := self._reach()) is not None:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no lighthouse answers at {address} ({LIGHTHOUSE}), for {timeout_seconds:g} s: {problem}; start "
                    "one with `qsr lighthouse` on the host that the address names, and look whether its port is open"
                ) from problem
            time.sleep(self.interval)
        self._last = time.monotonic()  # when this process was awake
        self._asked = False
        threading.Thread(target=self._beat, name="qsr beats", daemon=True).start()

    def _reach(self) -> Exception | None:
        """Why it cannot be reached. One that has died may be on its way back."""
        try:
            self._client = self._connect()
        except ConfigError:
            raise
        except Exception as error:
            return error
        return None

    def _connect(self) -> Any:
        connect_timeout = timedelta(seconds=max(1.0, self._timeout / 2))
        return torchft_part("LighthouseClient")(self.address, connect_timeout)

    def _beat(self) -> None:
        """From the first time that it asks, until it is closed: nobody should wait while it loads its model. A process
        that was frozen for so long that it has left does not beat before it asks again, for the end of its round."""
        client: Any = None
        with suppress(Exception):  # it may go down between two lines
            client = self._connect()
        while not self._closed.wait(self.interval):
            if self.has_left:
                self._beating.clear()
            self._last = time.monotonic()
            if not self._beating.is_set():
                continue
            try:
                if client is None:
                    client = self._connect()
                    client.heartbeat(self.name, timedelta(seconds=self._timeout))
                    self._returned = time.monotonic()
                else:
                    client.heartbeat(self.name, timedelta(seconds=self._timeout))
            except Exception:  # it is down, and may come back
                client = None

    @property
    def has_left(self) -> bool:
        """Whether this process was frozen, and the others go on without it until it asks again."""
        return self._asked and (not self._beating.is_set() or time.monotonic() - self._last > self._timeout)

    def living(self) -> frozenset[str]:
        """The names of those who beat, this one among them, from the lighthouse's status page.

        Raises:
            RuntimeError: the page is not as torchft 0.2 writes it. OSError: it cannot be had.
        """
        self._client.heartbeat(self.name, timedelta(seconds=self._timeout))
        with _DIRECT.open(f"{self.address.rstrip('/')}/status", timeout=self._timeout) as page:
            found = dict(_BEAT.findall(page.read().decode()))
        if self.name not in found:
            raise RuntimeError(
                f"{self.address}/status does not say that this worker beats, as a lighthouse of torchft 0.2 does"
            )
        return frozenset(name for name, age in found.items() if float(age) < self._timeout)

    def ask(self, telling: Telling, waiting: Callable[[], None], together: Collection[str] | None = None) -> Quorum:
        """The quorum of everybody who is there; while none answers, `waiting` is called twice a second.

        Where the lighthouse is down, this waits until it is back, and a moment longer: it does not know of those who
        have not beaten since, and would let this worker go on alone.

        Args:
            together: with grace, those whom `telling.living` is to count: the names with which this one stood. None
                without.
        """
        telling = dataclasses.replace(telling, frozen=telling.frozen or self.has_left)
        self._asked = True
        self._beating.set()
        told = False
        while True:
            time.sleep(max(0.0, self._returned + 3 * self.interval - time.monotonic()))
            try:
                return _waited_for(partial(self._answer, telling, together), waiting)
            except Exception as error:
                if not told:
                    log.warning(
                        "after step %d the lighthouse at %s does not answer (%s); waiting for it",
                        telling.step,
                        self.address,
                        str(error).splitlines()[0] if str(error) else type(error).__name__,
                    )
                told = True
            self._come_back(waiting)

    def _come_back(self, waiting: Callable[[], None]) -> None:
        while True:
            waiting()
            time.sleep(self.interval)
            try:
                self._client = self._connect()
                self._client.heartbeat(self.name, timedelta(seconds=self._timeout))
            except Exception:
                continue
            self._returned = time.monotonic()
            return

    def _answer(self, telling: Telling, together: Collection[str] | None) -> Quorum:
        if together is None:
            return self._quorum(self._client, telling)
        living = self.living()
        seen = len(living & {*together, self.name}) if telling.joined else len(living)
        quorum = self._quorum(self._client, dataclasses.replace(telling, living=seen))
        return dataclasses.replace(quorum, living=living)

    def _quorum(self, client: Any, telling: Telling) -> Quorum:
        answer = client.quorum(
            replica_id=telling.name,
            timeout=_FOREVER,
            store_address=telling.store,
            step=telling.step,
            data={"telling": json.dumps(dataclasses.asdict(telling))},
        )
        key = f"{answer.created.seconds:012d}.{answer.created.nanos:09d}"
        there = (_telling(one.data["telling"]) for one in answer.participants)
        return Quorum(key, tuple(sorted(there, key=lambda one: one.name)))

    def close(self) -> None:
        """It beats no more; the others wait for this worker for a moment yet. Again is harmless."""
        self._closed.set()


# A lighthouse is asked without a proxy, as torchft's own client asks it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _telling(text: str) -> Telling:
    """What a worker tells, of which this version knows that much: one of another version is refused by its facts."""
    told = json.loads(text)
    known = {field.name: told[field.name] for field in dataclasses.fields(Telling) if field.name in told}
    return Telling(**{**known, "counted": tuple(known.get("counted", ()))})


def _waited_for(ask: Callable[[], Quorum], waiting: Callable[[], None]) -> Quorum:
    """In a thread that does not hold up the end of this process, so that signals are heard meanwhile."""
    answer: concurrent.futures.Future[Quorum] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="qsr quorum", daemon=True).start()
    while not concurrent.futures.wait([answer], _TICK).done:
        waiting()
    return answer.result()


class Members:
    """The others, as one rank of a worker sees them. All ranks of the worker make it, and call its methods together.

    Args:
        inside: the ranks of this worker.
        facts: what must be the same on all members, in short.
    Raises:
        ConfigError: on every rank, if there is no torchft, or no lighthouse.
    """

    def __init__(self, config: MembershipConfig, inside: Group, facts: dict[str, str]) -> None:
        self.config, self.facts = config, facts
        self._inside, self._place = inside, dist.get_rank(inside)
        self._group: Any = None
        self._key = ""  # of the exchange for which the group was made
        self._members: tuple[str, ...] = ()  # of the group
        self._line: Lighthouse | None = None
        self._store: Any = None
        problem: str | None = None
        self.name = self.address = ""
        if self._place == 0:
            try:
                self._open()
            except ConfigError as error:
                problem = str(error)
        problem, self.name, self.address = self._told((problem, self.name, self.address))
        if problem is not None:
            raise ConfigError(problem)

    def _open(self) -> None:
        address = os.environ.get(LIGHTHOUSE)
        if not address:
            raise ConfigError(
                f"qsr.membership is 'torchft', and {LIGHTHOUSE} is not set; give it the address that `qsr lighthouse` "
                "prints (http://host:port), or start all workers of one host with `qsr train RECIPE --elastic`"
            )
        name = f"{os.environ.get(WORKER) or socket.gethostname()}.{uuid.uuid4().hex[:12]}"
        self._line = Lighthouse(address, name, self.config.timeout_seconds)
        if self.config.grace_seconds is not None:
            try:
                self._line.living()
            except (OSError, RuntimeError) as error:
                raise ConfigError(
                    f"membership.grace_seconds is set, and the lighthouse does not tell who lives: {error}; start the "
                    "lighthouse with `qsr lighthouse`, where torchft 0.2 is installed, or write grace_seconds null"
                ) from error
        here = address_on_the_way_to(urllib.parse.urlsplit(address).hostname or address)
        self._store = dist.TCPStore(here, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self.name, self.address = name, f"[{here}]:{self._store.port}" if ":" in here else f"{here}:{self._store.port}"

    @property
    def expected(self) -> int:
        """Workers that a launcher has started with this one, and for which a run waits before its first step."""
        return max(self.config.min_workers, int(os.environ.get(EXPECTED, "1")))

    @property
    def launch(self) -> str:
        """Of the workers that its launcher has started with this one; "" where none says so."""
        return os.environ.get(LAUNCHED, "")

    @property
    def patience(self) -> float:
        """Seconds for which it waits for them. One that was started again finds the others there, or the run over."""
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        return self.config.timeout_seconds if again else start_seconds()

    def ask(self, telling: Telling, waiting: Callable[[], None], together: Collection[str] = ()) -> Quorum:
        """The quorum of everybody who is there, the same on all ranks of this worker.

        Args:
            together: the members with which this one stood after the last boundary.
        """
        told = together if self.config.grace_seconds is not None else None
        quorum = self._line.ask(telling, waiting, told) if self._line is not None else None
        return cast(Quorum, self._told(quorum))

    def group(self, key: str, names: tuple[str, ...], store: str, usable: str) -> dist.ProcessGroup:
        """A process group of the ranks with this one's place, one of each member.

        Args:
            key: of the exchange. names: of the members, in their order.
            store: where they meet. usable: the exchange whose group all of them can use again; "" for none.
        Raises:
            CollectiveError: they do not meet.
        """
        if usable and usable == self._key and names == self._members:
            return cast(dist.ProcessGroup, self._group)
        self.forget_group()
        made = torchft_part("ProcessGroupGloo")(timedelta(seconds=self.config.timeout_seconds))
        try:
            where = f"{store}/qsr/{key}/{self._place}"
            made.configure(where, self.name, names.index(self.name), len(names))
        except Exception as error:
            raise CollectiveError(f"the members {', '.join(names)} did not meet: {error}") from error
        self._group, self._key, self._members = made.parent, key, names
        return cast(dist.ProcessGroup, self._group)

    @property
    def usable(self) -> str:
        """The exchange for which the group was made that this worker can use again; "" for none."""
        return self._key

    def has_left(self) -> bool:
        """On the first rank of this worker: whether it was frozen, and the others go on without it for now."""
        return self._line is not None and self._line.has_left

    def forget_group(self) -> None:
        """A collective in it has failed, or its members are others now."""
        self._group, self._key, self._members = None, "", ()

    def agree(self, done: bool) -> bool:
        """Whether it is so on every rank of this worker."""
        if dist.get_world_size(self._inside) == 1:
            return done
        told: list[bool] = [False] * dist.get_world_size(self._inside)
        dist.all_gather_object(told, done, group=self._inside)
        return all(told)

    def _told(self, what: Any) -> Any:
        """What the first rank of this worker says."""
        if dist.get_world_size(self._inside) == 1:
            return what
        said = [what]
        dist.broadcast_object_list(said, dist.get_global_rank(self._inside, 0), group=self._inside)  # type: ignore[arg-type]
        return said[0]

    def close(self) -> None:
        """Leave. Again is harmless."""
        self.forget_group()
        if self._line is not None:
            self._line.close()
