"""Shards behind a URL: fetched once, compared with the index, kept within bounds, and read like local ones."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.server
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data import index_shards
from qsr_engine.data.cache import ShardCache
from qsr_engine.data.checking import check_shards
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Split, read_index
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.samples import Position, Sample
from qsr_engine.data.table import open_table
from qsr_engine.data.tar import span_of
from qsr_engine.data.tar_shard import TarShard
from tests.support.bucket import bucket
from tests.support.loading import equal
from tests.support.shard_files import shards_of

SIZES = [7, 9, 8, 6, 10]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder of five shards, its URL at a real HTTP server, and the paths that were asked for."""
    folder = tmp_path_factory.mktemp("served")
    shards_of(folder, SIZES)
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def content(cache: ShardCache, name: str) -> bytes:
    return cache.open(name).path.read_bytes()


def config(url: str, cache: Path, **changes: Any) -> DataConfig:
    values = {"shards": url, "train": "all", "eval": "all", "image_size": 8, "shuffle_buffer": 12}
    return DataConfig(**{**values, "cache_dir": str(cache), **changes})


def batches(url: str, cache: Path, number: int = 12, start: int = 0, **changes: Any) -> list[Any]:
    loader = TrainLoader(url, read_index(url), config(url, cache, **changes), rank=1, ranks=2, batch_size=4, seed=3)
    return list(islice(loader.batches(start), number))


def test_the_index_is_read_from_a_url(served: tuple[Path, str, list[str]]) -> None:
    folder, url, _ = served
    index = read_index(url + "/")
    assert index == read_index(folder)
    check_shards(url, index, "all")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:\d+/nowhere/index\.json: there is no such file"):
        read_index(url + "/nowhere")
    with pytest.raises(DataError, match=r"unknown://x: shards are not read by the protocol 'unknown'; write a folder"):
        read_index("unknown://x")


@pytest.mark.parametrize(
    "changes", [{}, {"loader_processes": 2}, {"cache_gb": 0}], ids=["here", "processes", "streamed"]
)
def test_batches_are_those_of_the_local_folder(
    served: tuple[Path, str, list[str]], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder, url, _ = served
    for start in (0, 7):
        local = batches(str(folder), tmp_path, start=start)
        assert equal(batches(url, tmp_path / "cache", start=start, **changes), local)
    evaluated = [
        list(
            EvalLoader(
                place, read_index(folder), config(place, tmp_path / "cache", **changes), rank=0, ranks=1, batch_size=9
            )
        )
        for place in (url, str(folder))
    ]
    assert equal(*evaluated)


def test_every_shard_is_fetched_once_by_all_processes_together(
    served: tuple[Path, str, list[str]], tmp_path: Path
) -> None:
    _, url, asked = served
    asked.clear()
    batches(url, tmp_path, 30, loader_processes=3)
    batches(url, tmp_path, 30, loader_processes=2)
    fetched = [path for path in asked if path.endswith(".tar")]
    assert sorted(fetched) == sorted(set(fetched))
    assert len(fetched) == len(SIZES)


def test_shards_before_the_start_are_not_fetched(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsr_engine.data.loader._AHEAD", 0)  # else those of later batches are fetched as well
    _, url, asked = served
    options = config(url, tmp_path, shuffle_buffer=1)
    loader = TrainLoader(url, read_index(url), options, rank=0, ranks=1, batch_size=4, seed=3)
    batch = {item.shard for item in islice(loader.items(32), 4)}
    asked.clear()
    next(loader.batches(8))
    assert set(asked) == {f"/{shard}" for shard in batch}
    assert len(batch) < len(SIZES)


def test_the_cache_stays_within_its_bounds_and_keeps_what_is_used(
    served: tuple[Path, str, list[str]], tmp_path: Path
) -> None:
    folder, url, asked = served
    shards = {shard.name: shard for shard in read_index(folder).split("all").shards}
    limit = 4 * max(shard.bytes for shard in shards.values())
    cache = ShardCache(url, tmp_path, limit, shards)
    for name in [*shards, *shards]:
        assert content(cache, name) == (folder / name).read_bytes()
        assert sum(file.stat().st_size for file in tmp_path.glob("*.tar")) <= limit
    asked.clear()
    last = list(shards)[-1]
    cache.open(last)
    assert asked == []
    assert not list(tmp_path.glob(".*.part"))
    with pytest.raises(DataError, match=r"data\.cache_gb is .*, and the largest shard has .* write at least"):
        ShardCache(url, tmp_path, limit - 1, shards)


def test_the_cache_touches_only_what_is_its_own(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """It once took every tar file in its folder for a copy, and deleted the oldest."""
    folder, url, _ = served
    shards = {shard.name: shard for shard in read_index(folder).split("all").shards}
    others = [tmp_path / name for name in ("ILSVRC2012_img_train.tar", "cifar-10-python.tar.gz", "0123-x.tar")]
    for other in others:
        other.write_bytes(bytes(200_000))
        os.utime(other, (0, 0))
    killed = tmp_path / f".{'0' * 16}-killed.tar.123456.part"
    killed.write_bytes(b"half")
    cache = ShardCache(url, tmp_path, 4 * max(shard.bytes for shard in shards.values()), shards)
    for name in shards:
        cache.open(name)
    assert all(other.stat().st_size == 200_000 for other in others)
    assert not killed.exists(), "nobody holds its lock any more"


def test_fetching_at_once_stays_within_the_bounds_too(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """Twelve threads and room for four shards: what is being fetched counts, and nobody deletes it."""
    folder, url, _ = served
    index = read_index(folder).split("all")
    shards = {f"{n}-{shard.name}": shard for n in range(4) for shard in index.shards}
    limit = 4 * max(shard.bytes for shard in shards.values())
    cache = ShardCache(url, tmp_path, limit, shards)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            held = 0
            for file in tmp_path.iterdir():
                with contextlib.suppress(OSError):
                    held += 0 if file.name.endswith(".lock") else file.stat().st_size
            most[0] = max(most[0], held)

    def opened(name: str) -> tuple[str, int]:
        """Its bytes, also where another thread has taken the copy's name away meanwhile to make room."""
        shard = cache.open(name)
        return name, os.fstat(shard._file).st_size

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(opened, [*shards, *shards]))
    finally:
        stop.set()
        watching.join()
    assert found == [(name, shards[name].bytes) for name in [*shards, *shards]]
    # Twelve at once cannot all wait for room that only they could give back: each may be over by its own shard.
    assert most[0] <= limit + 12 * max(shard.bytes for shard in shards.values())
    gone = next(tmp_path.glob("*.tar"))
    gone.unlink()
    cache.open(gone.name.partition("-")[2])  # who fetches one makes room; who finds it there does not
    assert sum(file.stat().st_size for file in tmp_path.glob("*.tar")) <= limit


def test_forgotten_copies_are_closed(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    """An open file takes its space until it is closed, though it has no name any more."""
    folder, url, _ = served
    shards = {shard.name: shard for shard in read_index(folder).split("all").shards}
    cache = ShardCache(url, tmp_path, 4 * max(shard.bytes for shard in shards.values()), shards)
    source = RandomAccess(cache.open, open_table(folder / "samples.npy", read_index(folder)), None, cache.announce)
    for name in [*shards, *shards]:
        assert isinstance(source.load(Position(name, 0)), Sample)
    assert sum(shard.deleted for shard in source._open.values() if isinstance(shard, TarShard)) <= 1


def test_a_cache_that_cannot_hold_what_the_shuffle_buffer_spans_is_refused(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, _ = served
    largest = max(shard.bytes for shard in read_index(folder).split("all").shards)
    small: dict[str, Any] = {"cache_gb": 4 * largest / 1e9, "shuffle_buffer": 4}
    batches(url, tmp_path, 1, **small)
    with pytest.raises(DataError, match=r"shuffle buffers of 1 ranks on this host .* write at least that, or"):
        batches(url, tmp_path, 1, **{**small, "shuffle_buffer": 40})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"the shuffle buffers of 2 ranks"):
        batches(url, tmp_path, 1, **small)


def test_a_copy_that_was_damaged_is_fetched_again(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, url, _ = served
    shards = {shard.name: shard for shard in read_index(folder).split("all").shards}
    cache = ShardCache(url, tmp_path, 10**9, shards)
    name = next(iter(shards))
    cache.open(name).path.write_bytes(b"torn")
    assert content(cache, name) == (folder / name).read_bytes()


def test_a_shard_that_differs_from_the_index_is_refused(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, asked = served
    monkeypatch.setattr("qsr_engine.data.retrying.time.sleep", lambda _: None)
    index = read_index(folder)
    shard = index.split("all").shards[0]
    other = shard.model_copy(update={"sha256": "0" * 64})
    cache = ShardCache(url, tmp_path, 10**9, {shard.name: other})
    asked.clear()
    with pytest.raises(DataError, match=r"all-000000\.tar: this shard is not that of the index: it has \d+ bytes"):
        cache.open(shard.name)
    assert len(asked) == 2, "it could have been damaged on its way"
    assert not list(tmp_path.glob("*.tar"))
    missing = shard.model_copy(update={"name": "all-999999.tar"})
    with pytest.raises(DataError, match=r"http://.*/all-999999\.tar: there is no such file"):
        ShardCache(url, tmp_path, 10**9, {missing.name: missing}).open(missing.name)


def test_no_space_in_the_cache_is_said(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that a full disk gives; the disk itself is not full."""
    folder, url, _ = served

    def full(_: str, path: str, **__: Any) -> None:
        Path(path).write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    loader = TrainLoader(url, read_index(folder), config(url, tmp_path), rank=0, ranks=1, batch_size=4, seed=3)
    monkeypatch.setattr("qsr_engine.data.remote._file_system", lambda url: (SimpleNamespace(get_file=full), url))
    with pytest.raises(DataError, match=r"there is no space for http://.*; write a smaller data\.cache_gb, another"):
        next(loader.batches())
    deadline = time.monotonic() + 10  # the thread that fetches ahead may be at it still
    while (left := [file for file in (tmp_path / "shards").iterdir() if file.suffix in (".tar", ".part")]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert not left


def test_a_cache_that_cannot_be_made_is_said(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"this cache cannot be made: .*; write another data\.cache_dir"):
        batches(served[1], tmp_path / "file" / "cache")


def test_a_broken_shard_is_found_out_once_and_its_samples_may_be_skipped(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url, asked = served
    monkeypatch.setattr("qsr_engine.data.retrying.time.sleep", lambda _: None)
    index = read_index(folder)
    shards = [index.split("all").shards[0].model_copy(update={"sha256": "0" * 64}), *index.split("all").shards[1:]]
    index = index.model_copy(update={"splits": {"all": Split(samples=sum(SIZES), shards=shards)}})
    loader = TrainLoader(url, index, config(url, tmp_path, max_bad_samples=7), rank=0, ranks=1, batch_size=20, seed=3)
    asked.clear()
    found = list(islice(loader.batches(), 2))  # all 40 samples of the epoch
    assert sum(len(batch.skipped) for batch in found) == 7
    assert not set(torch.cat([batch.labels for batch in found]).tolist()) & set(range(7))
    # Two tries by each of two threads at most, and not two for every sample.
    assert asked.count("/all-000000.tar") <= 4
    loader = TrainLoader(url, index, config(url, tmp_path, max_bad_samples=6), rank=0, ranks=1, batch_size=20, seed=3)
    with pytest.raises(DataError, match=r"It is bad sample number 7 of this rank, and data\.max_bad_samples is 6"):
        list(islice(loader.batches(), 2))


def test_a_killed_fetcher_holds_up_nobody(served: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, url, _ = served
    shards = {shard.name: shard for shard in read_index(folder).split("all").shards}
    name = next(iter(shards))
    cache = ShardCache(url, tmp_path, 10**9, shards)
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=hold_the_lock, args=(cache, name, ready))
    process.start()
    assert ready.wait(60)
    process.kill()
    process.join()
    assert content(cache, name) == (folder / name).read_bytes()
    assert not list(tmp_path.glob(".*.part"))


def hold_the_lock(cache: ShardCache, name: str, ready: Any) -> None:
    """In another process: die in the middle of fetching a shard."""

    def hang(shard: Any, copy: Path) -> None:
        copy.with_name(f".{copy.name}.{shard.bytes}.part").write_bytes(b"half")
        ready.set()
        threading.Event().wait()

    cache._fetch = hang  # type: ignore[method-assign]
    cache.open(name)


@pytest.mark.parametrize("protocol", ["s3", "gs", "hf"])
def test_object_stores_are_read_over_fsspec(served: tuple[Path, str, list[str]], tmp_path: Path, protocol: str) -> None:
    """A stand-in for each: fsspec's file system in memory, under the protocol's name."""
    folder, *_ = served
    local = batches(str(folder), tmp_path)
    with bucket(folder, protocol) as (url, _):
        assert read_index(url) == read_index(folder)
        for way in ({}, {"cache_gb": 0}):
            assert equal(batches(url, tmp_path / "cache", **way), local)
        names = [path.name for path in folder.glob("*.tar")]
        made = index_shards(url, splits={"all": "all-*.tar"}, out=tmp_path / "index", say=lambda _: None)
    assert {shard.name for shard in made.splits["all"].shards} == set(names)
    assert made.splits == read_index(folder).splits


def test_a_resumed_stream_reads_its_shuffle_buffer_and_goes_on_behind_it(tmp_path: Path) -> None:
    """The order is that of an undisturbed run, bit for bit; no shard is read from its beginning."""
    folder = tmp_path / "shards"
    folder.mkdir()
    _, index = shards_of(folder, [60, 60, 60])
    with bucket(folder, "s3") as (url, opened):
        options: dict[str, Any] = {"cache_gb": 0, "train": "all"}

        def of_url(start: int, processes: int = 0) -> list[Any]:
            made = config(url, tmp_path / "cache", loader_processes=processes, **options)
            loader = TrainLoader(url, index, made, rank=0, ranks=1, batch_size=4, seed=3)
            return list(islice(loader.batches(start), 10))

        whole = of_url(0) + of_url(10) + of_url(20) + of_url(30)
        opened.clear()
        assert equal(of_url(25), whole[25:35])
        tars = [(name, place) for name, place in opened if name.endswith(".tar")]
    table = open_table(folder / "samples.npy", index)
    first = {(shard.name, span_of(table.row(shard.name, 0))[0]) for shard in index.splits["all"].shards}
    assert len(tars) == 2, "the shard in which it stands, and the next"
    assert len(first & set(tars)) == 1, "only the next from its beginning"
    once = TrainLoader(folder, index, config(str(folder), tmp_path), rank=0, ranks=1, batch_size=4, seed=3)
    assert equal(list(islice(once.batches(), 40)), whole)
