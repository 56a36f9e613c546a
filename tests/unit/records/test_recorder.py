"""The file that names the member which records a run."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from qsr_engine.records import recorder
from qsr_engine.records.recorder import Recorder
from qsr_engine.records.run_folder import RECORDER


def test_one_that_is_frozen_while_it_writes_does_not_hold_up_who_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_PATIENCE", 0.2)
    Recorder(tmp_path, "a").begin()
    with (tmp_path / RECORDER).open() as frozen:
        fcntl.flock(frozen, fcntl.LOCK_EX)
        Recorder(tmp_path, "b").begin()
    with Recorder(tmp_path, "a").writes() as writes:
        assert not writes
    with Recorder(tmp_path, "b").writes() as writes:
        assert writes
