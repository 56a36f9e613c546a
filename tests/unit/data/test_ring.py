"""Loader processes: the same batches, memory that is used again, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index
from qsr_engine.data.loader import EvalLoader
from qsr_engine.data.ring import _Memory
from qsr_engine.data.writing.folder import write_index
from tests.support.loading import data_config, equal, take, train_loader
from tests.support.shard_files import shards_of

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_processes_give_bit_identical_batches(numbered: tuple[Path, Index], processes: int) -> None:
    for start in (0, 5):
        alone = take(train_loader(numbered).batches(start), 12)  # goes on into another epoch
        assert equal(take(train_loader(numbered, loader_processes=processes).batches(start), 12), alone)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def named_files_in_memory(pid: int) -> list[str]:
    """What a process maps or has open in /dev/shm that is there when it is gone: files that have a name."""
    files = [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    files += [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    return [file for file in files if file.startswith("/dev/shm/") and not file.endswith("(deleted)")]


RANK = """
import sys, time
from qsr_engine.config.recipe import DataConfig
from qsr_engine.data import read_index
from qsr_engine.data.loader import TrainLoader

if __name__ == "__main__":
    config = DataConfig(shards=sys.argv[1], train="all", image_size=8, loader_processes=2)
    options = {"rank": 0, "ranks": 1, "batch_size": 10, "seed": 0}
    batches = TrainLoader(sys.argv[1], read_index(sys.argv[1]), config, **options).batches()
    next(batches)
    print("ready", flush=True)
    time.sleep(60)
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.slow
def test_loader_processes_end_with_a_rank_that_is_killed(numbered: tuple[Path, Index], tmp_path: Path) -> None:
    """They once went on for ever: torch watches the parent, which is the fork server, and that waited for them.

    And nothing stays in /dev/shm: the memory of batches has no name.
    """
    write_index(numbered[0], numbered[1])
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, str(script), str(numbered[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == b"ready\n"
        servers = children(rank.pid)
        below = servers + [process for server in servers for process in children(server)]
        assert len(below) == 4  # the resource tracker, the fork server and two loader processes
        assert not [file for process in (rank.pid, *below) for file in named_files_in_memory(process)]
        rank.kill()
    deadline = time.monotonic() + 60  # the fork server has torch to put away, which waits for a core
    while (left := [process for process in below if running(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM])
def test_loader_processes_end_whatever_they_do_with_signals(numbered: tuple[Path, Index], number: int) -> None:
    """A stopped process does not see SIGTERM; the rank once waited for it at the end of an evaluation."""
    before = set(multiprocessing.active_children())
    batches = train_loader(numbered, loader_processes=1).batches()
    next(batches)
    (own,) = set(multiprocessing.active_children()) - before
    if number == signal.SIGSTOP:
        os.kill(own.pid or 0, number)
    started = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 30, "it once waited for ever"
    assert not own.is_alive()


@pytest.mark.parametrize("processes", [1, 3])
def test_a_rank_may_keep_batches(numbered: tuple[Path, Index], processes: int) -> None:
    """A batch lies in memory that is used again, but not while somebody has it or a part of it."""
    alone = take(train_loader(numbered).batches(), 30)
    batches = train_loader(numbered, loader_processes=processes).batches()
    kept, rows = [], []
    for number in range(30):
        batch = next(batches)
        if number % 3 == 0:
            kept.append(batch)
        else:
            rows.append((number, batch.images[2, 1]))
    assert equal(kept, alone[::3])
    assert all(torch.equal(row, alone[number].images[2, 1]) for number, row in rows)


def test_batches_outlive_the_loader(numbered: tuple[Path, Index]) -> None:
    batches = train_loader(numbered, loader_processes=2).batches()
    first = next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert equal([first], take(train_loader(numbered).batches(), 1))


def test_memory_is_used_again(numbered: tuple[Path, Index]) -> None:
    places = {batch.images.data_ptr() for batch in islice(train_loader(numbered, loader_processes=2).batches(), 40)}
    assert len(places) <= 6, "two processes of three slots each"


def test_more_loader_processes_than_shards_and_batches(tmp_path: Path) -> None:
    data = shards_of(tmp_path, [3])
    alone = take(train_loader(data, ranks=1, batch_size=2).batches(), 9)
    assert equal(take(train_loader(data, ranks=1, batch_size=2, loader_processes=5).batches(), 9), alone)
    assert len(list(EvalLoader(*data, data_config(loader_processes=5), rank=0, ranks=1, batch_size=2))) == 2


def test_a_loader_process_that_is_killed_is_an_error(numbered: tuple[Path, Index]) -> None:
    batches = train_loader(numbered, loader_processes=1).batches()
    next(batches)
    own = [process for process in multiprocessing.active_children() if process.name.startswith("ForkServerProcess")]
    for process in own:
        os.kill(process.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader process was ended by SIGKILL; was it killed, perhaps"):
        take(batches, 10)


def test_a_failure_of_ours_has_its_traceback(numbered: tuple[Path, Index]) -> None:
    loader = train_loader(numbered, loader_processes=1)
    decoder: Any = loader._decoder
    decoder.choose = broken_view
    with pytest.raises(RuntimeError, match=r"(?s)a loader process failed:.*in broken_view.*division by zero"):
        next(loader.batches())


def broken_view(width: int, height: int, random: Any) -> Any:
    return 1 / 0


def test_pinned_memory_is_given_back_when_nobody_sees_it() -> None:
    """CUDA is not here: a list stands in for what it has registered."""
    registered: list[tuple[int, int]] = []

    def register(address: int, size: int) -> bool:
        registered.append((address, size))
        return True

    memory = _Memory((2, 3, 5))
    memory.pin(register, lambda address: registered.clear())
    slot = torch.from_numpy(memory.slot(1))
    assert registered == [(slot.data_ptr() - 15, 30)]
    del memory
    assert registered, "a slot is still seen"
    del slot
    assert not registered
    refused = _Memory((1, 1))
    refused.pin(lambda address, size: False, lambda address: pytest.fail("it was not registered"))
