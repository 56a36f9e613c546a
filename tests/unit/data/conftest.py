"""Small shards to read, and waits that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsr_engine.data import Index, index_shards
from tests.support.shard_files import shards_of, write_tar


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    """100 noise images in shards of uneven size; label and key of each are its number."""
    return shards_of(tmp_path_factory.mktemp("numbered"), [30, 1, 40, 29])


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every wait, which takes none."""
    seconds: list[float] = []
    monkeypatch.setattr("qsr_engine.data.retrying.time.sleep", seconds.append)
    return seconds


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Index]:
    """48 noise images in four shards; label and key of each are its number."""
    folder = tmp_path / "shards"
    folder.mkdir()
    return shards_of(folder, [12, 12, 12, 12])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two shards of two samples in "train", one in "val", and their index."""
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        write_tar(tmp_path / name, {"a.jpg": b"A", "a.cls": b"0", "b.jpg": b"B", "b.cls": b"1"})
    index_shards(tmp_path)
    return tmp_path
