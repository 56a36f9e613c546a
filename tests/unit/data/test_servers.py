"""Servers that misbehave: what they cost, and how often they are asked."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from qsr_engine.data.cache import ShardCache
from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.index import Index, read_index
from qsr_engine.data.loader import TrainLoader
from qsr_engine.data.retrying import Retry
from tests.support.loading import equal, load
from tests.support.server import Server


@pytest.fixture
def server(data: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("qsr_engine.data.remote._READ", 0.5)
    made = Server(data[0])
    yield made
    made.close()


def remote(server: Server, cache: Path, way: str, **changes: Any) -> TrainLoader:
    options: dict[str, Any] = {"cache_gb": 0} if way == "streamed" else {"cache_dir": str(cache)}
    index = read_index(server.url)
    return load((server.url, index), **{"shards": server.url, **options, **changes})


FOR_A_WHILE = ["silent", "stalls", "breaks", "500", "429", "404"]


@pytest.mark.fast_cells(6)
@pytest.mark.filterwarnings("ignore:.*trying again")
@pytest.mark.parametrize("way", ["cached", "streamed"])
@pytest.mark.parametrize("fault", FOR_A_WHILE)
def test_a_server_that_misbehaves_for_a_while_costs_no_sample(
    data: tuple[Path, Index], server: Server, tmp_path: Path, fault: str, way: str
) -> None:
    server.faults["all-000002.tar"] = [fault, fault]
    found = list(islice(remote(server, tmp_path / "cache", way).batches(), 12))
    assert equal(found, list(islice(load(data).batches(), 12)))
    assert server.faults["all-000002.tar"] == []
    assert server.asked.count("all-000002.tar") == 3


@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_a_server_may_be_slow(data: tuple[Path, Index], server: Server, tmp_path: Path, way: str) -> None:
    """A shard takes longer than the limit, and no part of it does."""
    server.faults["all-000002.tar"] = ["slow"]
    found = list(islice(remote(server, tmp_path / "cache", way).batches(), 12))
    assert equal(found, list(islice(load(data).batches(), 12)))
    assert server.asked.count("all-000002.tar") == 1


@pytest.mark.filterwarnings("ignore:.*trying again", "ignore:skipped")
@pytest.mark.parametrize(
    ("fault", "way"),
    # What follows the end of an endless one is not read where it is read as it comes.
    [("endless", "cached"), *((fault, way) for fault in ("breaks", "500", "403") for way in ("cached", "streamed"))],
)
def test_a_server_that_goes_on_misbehaving_costs_the_samples_of_the_shard(
    server: Server, tmp_path: Path, fault: str, way: str
) -> None:
    name = "all-000002.tar"
    server.faults[name] = [fault] * 1000
    message = {
        "breaks": r"\(3 tries over \d+\.\d s\)",
        "500": r"500.*\(3 tries over \d+\.\d s\)",
        "403": r"403",  # refused for good
        "endless": r"more than the \d+ bytes that the index says.*\(2 tries over \d+\.\d s\)",
    }[fault]
    with pytest.raises(DataError, match=rf"^all-000002\.tar: sample \d+: http://.*/all-000002\.tar: .*{message}"):
        list(islice(remote(server, tmp_path / "one", way, retries=2).batches(), 12))
    server.asked.clear()
    found = list(islice(remote(server, tmp_path / "two", way, retries=2, max_bad_samples=12).batches(), 12))
    assert [len(batch.labels) for batch in found] == [4] * 12
    skipped = sum(len(batch.skipped) for batch in found)
    assert skipped == 12 if way == "cached" or fault in ("500", "403") else skipped <= 12
    # By the thread that fetches ahead as well, or of the next epoch; a stream that came further may break again.
    assert server.asked.count(name) <= (6 if (fault, way) != ("breaks", "streamed") else 6 + 2 * 12)
    for file in (tmp_path / "two").rglob("*"):
        assert file.stat().st_size < 10**6, "the disk is not filled"


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_who_waited_for_a_fetch_that_failed_does_not_try_as_often_again(
    data: tuple[Path, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten processes of a host, waiting for one dead server in turn, would take ten times as long."""
    listed = {shard.name: shard for shard in data[1].split("all").shards}
    name = next(iter(listed))
    fetched, fetching, asking = [], threading.Event(), threading.Barrier(4, timeout=60)

    def file_system(url: str) -> Any:
        fetched.append(url)
        fetching.set()
        asking.wait()  # until all others wait for the lock
        raise PassingError(f"{url}: dead")

    class Cache(ShardCache):
        def _lock(self, name: str, *, wait: bool = True) -> Any:
            if fetched and "all-" in name:
                asking.wait()
            return super()._lock(name, wait=wait)

    monkeypatch.setattr("qsr_engine.data.remote._file_system", file_system)
    cache = Cache("http://x", tmp_path / "cache", 10**9, listed, Retry(0, 1.0))
    errors: list[str] = []

    def ask() -> None:
        try:
            cache.open(name)
        except DataError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    threads[0].start()
    assert fetching.wait(60)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [errors[0]] * 4
    assert re.fullmatch(rf"http://x/{re.escape(name)}: dead \(1 try over \d+\.\d s\)", errors[0])
    assert len(fetched) == 1
