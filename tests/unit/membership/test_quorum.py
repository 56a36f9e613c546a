"""What is said where torchft or its lighthouse is not there, and which members a lighthouse does not wait for."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from qsr_engine.config.membership import MembershipConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.membership import quorum as quorum_module
from qsr_engine.membership.members import Telling
from qsr_engine.membership.quorum import Lighthouse, Members, _telling, start_lighthouse, torchft_part
from tests.support.pool import free_port


def test_without_torchft_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchft", None)
    with pytest.raises(ConfigError, match=r"pip install qsr-engine\[elastic\]"):
        torchft_part("LighthouseClient")


def test_without_a_lighthouse_the_error_names_its_address() -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=rf"no lighthouse answers at http://127.0.0.1:{port} \(TORCHFT_LIGHTHOUSE\)"):
        Lighthouse(f"http://127.0.0.1:{port}", "a", 1.0)


def test_a_lighthouse_that_is_on_its_way_back_is_waited_for() -> None:
    port = free_port()
    made: list[Any] = []
    timer = threading.Timer(1.0, lambda: made.append(start_lighthouse(port, 5.0)))
    timer.start()
    a = Lighthouse(f"http://127.0.0.1:{port}", "a", 5.0)
    timer.join()
    assert made
    assert not a.has_left
    a.close()
    made[0].shutdown()


def beating(port: int, name: str, timeout: float) -> Lighthouse:
    """A worker in its round, which has asked before."""
    line = Lighthouse(f"http://127.0.0.1:{port}", name, timeout)
    line._asked = True
    line._beating.set()
    line._client.heartbeat(name, timedelta(seconds=timeout))
    return line


def test_nobody_waits_for_a_worker_that_has_not_asked_yet() -> None:
    """It loads its model and a checkpoint between the two, which may take minutes."""
    port = free_port()
    lighthouse = start_lighthouse(port, 5.0)
    a, b = (Lighthouse(f"http://127.0.0.1:{port}", name, 5.0) for name in "ab")
    time.sleep(3 * b.interval)
    began = time.monotonic()

    def in_time() -> None:
        assert time.monotonic() - began < 2

    quorum = a.ask(Telling("a", "a:1", 3, True, {"model": "1"}), in_time)
    assert [one.name for one in quorum.there] == ["a"]
    a.close()
    b.close()
    lighthouse.shutdown()


def test_all_who_are_there_are_waited_for_and_who_was_frozen_is_not() -> None:
    port = free_port()
    lighthouse = start_lighthouse(port, 1.0)
    waited: list[None] = []
    a, b = (beating(port, name, 1.0) for name in "ab")
    b._last -= 5  # as where the process has slept
    time.sleep(3 * b.interval)
    began = time.monotonic()
    quorum = a.ask(Telling("a", "a:1", 3, True, {"model": "1"}), lambda: waited.append(None))
    assert [one.step for one in quorum.there] == [3]
    assert 0.5 < time.monotonic() - began < 3
    assert waited
    assert b.has_left
    assert not a.has_left
    a.close()
    b.close()
    lighthouse.shutdown()


def test_what_a_worker_of_another_version_tells_can_be_read() -> None:
    """Its facts say that it is another; so it is refused, and members do not take it for a lighthouse that is down."""
    told = dataclasses.asdict(Telling("a", "a:1", 3, True, {"qsr_engine": "9.9"})) | {"new": 1}
    del told["launch"]
    assert _telling(json.dumps(told)) == Telling("a", "a:1", 3, True, {"qsr_engine": "9.9"})


def test_with_grace_the_lighthouse_does_not_wait_for_all_and_says_who_lives() -> None:
    """b beats and does not ask; d has not beaten for long."""
    port, grace = free_port(), 1.0
    lighthouse = start_lighthouse(port, 3.0, grace)
    a, b, c, d = (beating(port, name, 3.0) for name in "abcd")
    d.close()
    time.sleep(3.5)  # until d has left
    assert a.living() == {"a", "b", "c"}
    telling = Telling("c", "c:1", 3, True, {"model": "1"})
    with ThreadPoolExecutor() as threads:
        began = time.monotonic()
        of_c = threads.submit(c.ask, telling, lambda: None, ("b", "c"))
        quorum = a.ask(dataclasses.replace(telling, name="a", joined=False, counted=("x",)), lambda: None, ())
        took = time.monotonic() - began
        assert of_c.result().there == quorum.there
    assert grace <= took < grace + 2
    assert [(one.name, one.living, one.counted, one.frozen) for one in quorum.there] == [
        ("a", 3, ("x",), False),  # it has not joined: of all
        ("c", 2, (), False),
    ]
    assert quorum.living == {"a", "b", "c"}
    for one in (a, b, c):
        one.close()
    lighthouse.shutdown()


def test_who_was_frozen_says_so_until_it_stands_with_the_members_again() -> None:
    port = free_port()
    lighthouse = start_lighthouse(port, 1.0, 1.0)
    a = Lighthouse(f"http://127.0.0.1:{port}", "a", 1.0)
    telling = Telling("a", "a:1", 3, True, {"model": "1"})
    assert not a.ask(telling, lambda: None, ("a",)).there[0].frozen
    a._last -= 5  # as where the process has slept
    found = a.ask(telling, lambda: None, ("a",)).there[0]
    assert found.frozen
    assert a.ask(found, lambda: None, ("a",)).there[0].frozen
    a.close()
    lighthouse.shutdown()


def test_a_page_that_is_not_a_lighthouses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    lighthouse = start_lighthouse(port, 3.0, 1.0)
    a = Lighthouse(f"http://127.0.0.1:{port}", "a", 3.0)
    monkeypatch.setattr(quorum_module, "_BEAT", re.compile("(another)(page)"))
    with pytest.raises(RuntimeError, match=r"/status does not say that this worker beats"):
        a.living()
    a.close()
    lighthouse.shutdown()


def test_who_is_started_again_does_not_wait_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run may be over by then, and nobody come any more. `Members` itself would need a lighthouse."""
    here: Any = SimpleNamespace(config=MembershipConfig(way="torchft", timeout_seconds=3))
    patience = Members.__dict__["patience"].fget
    monkeypatch.setenv("QSR_START_SECONDS", "77")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert patience(here) == 77
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert patience(here) == 3
