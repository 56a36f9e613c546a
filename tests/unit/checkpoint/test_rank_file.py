"""What one rank keeps, and how it is written; and who loads whose state where there are other workers."""

from __future__ import annotations

import tracemalloc
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.other_layout import to_load
from qsr_engine.checkpoint.rank_file import _OF_A_RANK, read_rank, write_rank
from tests.support.full_disks import files_of_at_most


def state(**changes: Any) -> dict[str, Any]:
    return {**dict.fromkeys(_OF_A_RANK), "client": {}, **changes}


def test_numbers_of_numpy_become_pythons(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "rates": [{"lr": np.float64(0.5)}, OrderedDict(lr=np.float32(0.25))],
        "scheduler": {"_last_lr": [np.float64(0.5)], "lr_lambdas": [None]},
        "client": {
            "seen": np.int64(3),
            "done": np.bool_(True),
            np.int64(4): (np.str_("x"), {np.int32(1)}),
            "a": np.arange(3),
        },
    }
    write_rank(tmp_path / "file", state(**given))
    found = read_rank(tmp_path / "file")
    array = found["client"].pop("a")
    assert array.dtype == torch.int64
    assert array.tolist() == [0, 1, 2]
    assert {name: found[name] for name in given} == {
        "rates": [{"lr": 0.5}, {"lr": 0.25}],
        "scheduler": {"_last_lr": [0.5], "lr_lambdas": [None]},
        "client": {"seen": 3, "done": True, 4: ("x", {1})},
    }
    assert type(found["rates"][0]["lr"]) is float
    assert type(found["client"]["done"]) is bool
    given["client"]["seen"] += 1  # what was given is left as it is
    assert type(given["client"]["seen"]) is np.int64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"client": {"fine": 1, "layer": torch.nn.ReLU()}}, r"client_state holds objects .*, under \['layer'\]"),
        ({"client": {"names": np.array(["a"])}}, r"under \['names'\]"),
        ({"scheduler": {"self": torch.nn.ReLU()}}, r"scheduler holds objects .* running code; give"),
    ],
)
def test_what_could_not_be_loaded_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        write_rank(tmp_path / "file", state(**changes))


def test_a_rank_is_not_held_twice_and_a_full_disk_is_named(tmp_path: Path) -> None:
    large = state(averager=torch.zeros(2_000_000))
    tracemalloc.start()
    write_rank(tmp_path / "file", large)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "file").stat().st_size > 8_000_000
    assert most < 4_000_000
    with files_of_at_most(5000), pytest.raises(OSError, match="File too large"):
        write_rank(tmp_path / "other", large)


@pytest.mark.parametrize(
    ("saved", "workers"), [(1, 1), (1, 3), (2, 3), (3, 2), (4, 2), (5, 2), (7, 3), (64, 32), (3, 1)]
)
def test_workers_share_what_they_load(saved: int, workers: int) -> None:
    lists = [to_load(saved, worker, workers) for worker in range(workers)]
    assert {len(mine) for mine in lists} == {len(lists[0])}, "loading is collective"
    assert len(lists[0]) <= min(saved, -(-saved // workers) + 1)
    assert {mine[-1][0] for mine in lists} == {saved - 1}, "whose counts are taken"
    counted = Counter(one for mine in lists for one, counts in mine if counts)
    assert set(counted) == set(range(saved))
    assert set(counted.values()) in ({1}, {workers})
