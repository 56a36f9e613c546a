"""What `qsr train --elastic` and `qsr lighthouse` say and start; tests/launch/test_elastic.py has the workers."""

from __future__ import annotations

import signal
import subprocess
import threading
from typing import Any

import pytest

from qsr_engine.cli.elastic import _run, _Worker, no_grace
from qsr_engine.cli.errors import ERROR
from qsr_engine.cli.main import main
from qsr_engine.config.membership import MembershipConfig
from qsr_engine.membership import quorum


@pytest.mark.parametrize(("workers", "says"), [(1, True), (2, True), (3, False)])
def test_a_grace_that_has_no_effect_is_said(workers: int, says: bool) -> None:
    said = no_grace(MembershipConfig(way="torchft", grace_seconds=3), workers)
    assert said.startswith("qsr: membership.grace_seconds has no effect with ") is says
    assert no_grace(MembershipConfig(way="torchft"), workers) == ""


def test_the_lighthouse_gets_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class ServedError(Exception):
        pass

    class Lighthouse:
        def shutdown(self) -> None:
            given.append("shut down")

    def start(*values: Any) -> Lighthouse:
        given.append(values)
        return Lighthouse()

    def wait(_: threading.Event) -> None:
        raise ServedError

    monkeypatch.setattr(quorum, "start_lighthouse", start)
    monkeypatch.setattr("qsr_engine.cli.lighthouse.threading.Event", lambda: type("Event", (), {"wait": wait})())
    for words in ([], ["--grace-seconds", "20"]):
        with pytest.raises(ServedError):
            main(["lighthouse", "--port", "29600", *words])
    assert given == [(29600, 10.0, None), "shut down", (29600, 10.0, 20.0), "shut down"]


def test_a_grace_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lighthouse", "--grace-seconds", "0"]) == ERROR
    assert "grace_seconds: found 0" in capsys.readouterr().err


def test_a_frozen_worker_is_killed_when_the_others_have_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    """It hears no SIGTERM, and the launcher would wait for it for ever."""
    workers = []
    for number, command in enumerate((["true"], ["sleep", "60"])):
        worker = object.__new__(_Worker)  # the real one starts `qsr train`
        worker.number, worker._ranks = number, [subprocess.Popen(command)]
        workers.append(worker)
    workers[1].send(signal.SIGSTOP)
    assert _run(workers, 0, [signal.SIGTERM]) == {0: 0, 1: -signal.SIGKILL}
    assert "worker 1 is frozen, cannot stop, and is killed" in capsys.readouterr().err
