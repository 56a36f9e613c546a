"""Both engines give the same bits as when tests/support/golden.json was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import golden


@pytest.mark.fast_cells(0, of=16)
@pytest.mark.parametrize("name", golden.SETTINGS)
def test_the_trace_is_as_it_was(processes: golden.Pool, tmp_path: Path, name: str) -> None:
    """Bit for bit on the machine that wrote the file, and roughly elsewhere, where torch adds in another order."""
    written = golden.read()
    found = golden.trace(processes, golden.SETTINGS[name], str(tmp_path))
    same_machine = written["machine"] == golden.machine()
    assert golden.differences(found, written["settings"][name], same_machine) == []


def test_the_file_has_these_settings() -> None:
    assert list(golden.read()["settings"]) == list(golden.SETTINGS), (
        "write it anew: python -m tests.support.golden --write"
    )
