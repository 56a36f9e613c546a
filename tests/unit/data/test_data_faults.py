"""Reads that fail, servers that misbehave, shards that are hostile: tries, errors, and the same number of batches."""

from __future__ import annotations

import contextlib
import errno
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.cache import ShardCache
from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.index import Index, Split, read_index
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.places import check_place
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.retrying import LONGEST_WAIT, Retry, retried
from qsr_engine.data.samples import Position, Sample, bad_sample
from qsr_engine.data.streaming import Streamed, read_shard
from qsr_engine.data.tar_shard import TarShard
from qsr_engine.data.writing.folder import write_index
from qsr_engine.data.writing.shard import write_shard
from tests.fuzz.make_seeds import shards, with_field
from tests.support.shard_files import tar_bytes
from tests.unit.data.test_loader import equal, labels, noise, shards_of

ROOT = Path(__file__).parents[3]
SIZES = [12, 12, 12, 12]


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
    made = shards_of(folder, SIZES)
    write_index(*made)
    return made


def loader(data: tuple[Path | str, Index], rank: int = 0, ranks: int = 1, **changes: Any) -> TrainLoader:
    values = {"shards": str(data[0]), "train": "all", "image_size": 8, "shuffle_buffer": 8, "retry_seconds": 0.01}
    return TrainLoader(*data, DataConfig(**{**values, **changes}), rank=rank, ranks=ranks, batch_size=4, seed=0)


# -------------------------------------------------------------------------------------------------------- tries


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_waits_double_up_to_a_limit_and_the_error_says_how_many_tries_there_were(waits: list[float]) -> None:
    def fail() -> None:
        raise PassingError("the server is away")

    with pytest.raises(DataError, match=r"^the server is away \(9 tries over \d+\.\d s\)$") as raised:
        retried(fail, Retry(8, 1.0))
    assert not isinstance(raised.value, PassingError), "it has been tried often enough"
    assert waits == [1, 2, 4, 8, 16, 32, LONGEST_WAIT, LONGEST_WAIT]
    with pytest.raises(DataError, match=r"\(1 try over"):
        retried(fail, Retry(0, 1.0))
    assert len(waits) == 8


def test_what_cannot_pass_is_not_tried_again(waits: list[float]) -> None:
    def fail() -> None:
        raise DataError("this image is broken")

    with pytest.raises(DataError, match=r"^this image is broken$"):
        retried(fail, Retry(8, 1.0))
    assert waits == []


@pytest.mark.filterwarnings("ignore:.*trying again")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_server_that_fails_for_a_while_costs_no_sample(
    data: tuple[Path, Index], waits: list[float], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Three reads in a row fail, in a walk over headers as well as in a read, with every shard opened anew."""
    read, failures = os.pread, [3, 3]
    opened: list[Path] = []
    whole = list(islice(loader(data).batches(), 12))

    def pread(file: int, size: int, offset: int) -> bytes:
        phase = 0 if offset == 512 * 6 else 1 if offset > 512 * 10 and len(opened) > 6 else None
        if phase is not None and failures[phase]:
            failures[phase] -= 1
            raise OSError(number, os.strerror(number))
        return read(file, size, offset)

    class Opened(TarShard):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr("qsr_engine.data.tar_shard.os.pread", pread)
    monkeypatch.setattr("qsr_engine.data.sources.TarShard", Opened)
    assert equal(list(islice(loader(data, retry_seconds=1).batches(), 12)), whole)
    assert failures == [0, 0]
    assert waits[:3] == [1, 2, 4]
    assert len(waits) == 6
    assert len(opened) == len(SIZES) + 6


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_file_that_comes_back_is_read(data: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(islice(loader(data).batches(), 12))
    path, away = data[0] / "all-000002.tar", data[0] / "away"
    path.rename(away)
    waited = []

    def come_back(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            away.rename(path)

    monkeypatch.setattr("qsr_engine.data.retrying.time.sleep", come_back)
    assert equal(list(islice(loader(data).batches(), 12)), whole)
    assert len(waited) == 2


@pytest.mark.filterwarnings("ignore:.*trying again", "ignore:skipped")
def test_a_shard_that_is_gone_is_waited_for_once_and_all_its_samples_count(
    data: tuple[Path, Index], waits: list[float]
) -> None:
    (data[0] / "all-000002.tar").unlink()
    found = list(islice(loader(data, max_bad_samples=12).batches(), 24))  # two epochs
    assert waits == [0.01, 0.02, 0.04]
    texts = [text for batch in found for text in batch.skipped]
    assert len(texts) == 24
    assert len(set(texts)) == 12, "a sample has one text, however long it was waited for"
    assert all("all-000002.tar: this shard cannot be read past sample 0: No such file" in text for text in texts)
    assert sum("(4 tries over " in text for text in set(texts)) == 12
    assert {bad_sample(text) for text in texts} == {f"all-000002.tar: sample {number}: " for number in range(12)}
    with pytest.raises(
        DataError,
        match=r"^all-000002\.tar: sample \d+: .*/all-000002\.tar: this shard cannot be read past sample 0: No such "
        r"file or directory \(4 tries over \d+\.\d s\)\. It is bad sample number 12 of this rank, and "
        r"data\.max_bad_samples is 11$",
    ):
        list(islice(loader(data, max_bad_samples=11).batches(), 12))
    with pytest.raises(DataError, match=r"^all-000002\.tar: sample \d+: .*\(4 tries over \d+\.\d s\)$"):
        list(islice(loader(data).batches(), 12))


def test_samples_that_were_skipped_before_a_restart_count_once(data: tuple[Path, Index]) -> None:
    """With another number of tries, and so another text."""
    (data[0] / "all-000001.tar").unlink()
    before = list(islice(loader(data, max_bad_samples=12, retries=0).batches(), 12))
    skipped = {text for batch in before for text in batch.skipped}
    assert len(skipped) == 12
    after = list(islice(loader(data, max_bad_samples=12, retries=1).batches(12, skipped), 12))
    assert {text for batch in after for text in batch.skipped} == skipped


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_damaged_place_of_the_disk_costs_its_samples_only(
    data: tuple[Path, Index], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO for ever in the middle of a shard: the samples before it are good."""
    read = os.pread
    failing = data[0] / "all-000000.tar"

    def pread(file: int, size: int, offset: int) -> bytes:
        if offset >= 12_000 and os.path.samestat(os.fstat(file), failing.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, size, offset)

    monkeypatch.setattr("qsr_engine.data.tar_shard.os.pread", pread)
    source = RandomAccess(lambda name: TarShard(data[0] / name), None, retry=Retry(2, 1.0))
    found = [source.load(Position("all-000000.tar", number)) for number in range(12)]
    good = [isinstance(sample, Sample) for sample in found]
    assert good == [True] * sum(good) + [False] * (12 - sum(good))
    assert 0 < sum(good) < 12
    assert waits == [1, 2]
    assert "Input/output error (3 tries over" in str(found[sum(good)])


# --------------------------------------------------------------------------------- the same number of batches


def corrupt(path: Path) -> None:
    """Overwrite 2 KiB in the middle: a header among them."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xa5" * 2048)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FAULTS: dict[str, Callable[[Path], None]] = {"corrupt": corrupt, "truncated": truncate, "missing": Path.unlink}


@pytest.mark.filterwarnings("ignore:.*trying again", "ignore:skipped")
@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("opened", [False, True], ids=["before", "while open"])
def test_both_ranks_give_as_many_full_batches_and_good_samples_do_not_change(
    data: tuple[Path, Index], fault: str, processes: int, opened: bool
) -> None:
    steps = 18  # three epochs of 6 batches a rank
    whole = [list(islice(loader(data, rank, 2).batches(), steps)) for rank in range(2)]
    options: dict[str, Any] = {"max_bad_samples": 12, "loader_processes": processes, "retries": 1}
    streams = [loader(data, rank, 2, **options).batches() for rank in range(2)]
    found: list[list[ImageBatch]] = [[], []]
    if opened:
        for rank in range(2):
            found[rank] += islice(streams[rank], 6)  # every shard that this rank has in the first epoch
    FAULTS[fault](data[0] / "all-000001.tar")
    for rank in range(2):
        found[rank] += islice(streams[rank], steps - len(found[rank]))
        streams[rank].close()  # type: ignore[attr-defined]
    bad = set()
    for rank in range(2):
        assert [len(batch.labels) for batch in found[rank]] == [4] * steps
        for batch, before in zip(found[rank], whole[rank], strict=True):
            same = batch.labels == before.labels
            assert (~same).sum() == len(batch.skipped)
            assert torch.equal(batch.images[same], before.images[same])
            bad |= set(before.labels[~same].tolist())
    assert bad <= set(range(12, 24)), "samples of the other shards are good"
    if not opened:
        assert len(bad) == 12 if fault == "missing" else 0 < len(bad) < 12
    if fault == "truncated":
        assert bad, "that file is open, and shorter"


def test_a_long_run_of_bad_samples_is_within_its_limit(data: tuple[Path, Index]) -> None:
    """Without a shuffle buffer a missing shard gives whole batches of bad samples, and more than 64 in a row."""
    folder = data[0]
    written = [
        write_shard(folder / f"all-{n:06d}.tar", [(f"{i}", "png", noise(i), n) for i in range(100)]) for n in (0, 1)
    ]
    index = Index(classes=None, splits={"all": Split(samples=200, shards=written)})
    (folder / "all-000001.tar").unlink()
    options = {"shuffle_buffer": 1, "retries": 0}
    found = list(islice(loader((folder, index), max_bad_samples=100, **options).batches(), 100))
    assert sum(len(batch.skipped) for batch in found) == 200
    assert set(labels(found)) == {0}
    with pytest.raises(DataError, match=r"bad|limit"):
        list(islice(loader((folder, index), max_bad_samples=99, **options).batches(), 100))


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_evaluation_counts_what_is_gone(data: tuple[Path, Index]) -> None:
    (data[0] / "all-000003.tar").unlink()
    config = DataConfig(shards="unused", eval="all", image_size=8, max_bad_samples=12, retries=1, retry_seconds=0.01)
    parts = [list(EvalLoader(*data, config, rank=rank, ranks=2, batch_size=5)) for rank in range(2)]
    assert [len(part) for part in parts] == [5, 5]
    assert [labels(part).count(-1) for part in parts] == [0, 12]


# ----------------------------------------------------------------------------------------- servers that misbehave


class Server:
    """A real HTTP server of a folder, which misbehaves as often as it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.faults: dict[str, list[str]] = {}  # by file: what is wrong with each of the next answers
        self.end = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path[1:]
                server.asked.append(name)
                left = server.faults.get(name, [])
                with contextlib.suppress(ConnectionError):
                    server.answer(self, server.folder / name, left.pop(0) if left else "")

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, to: http.server.BaseHTTPRequestHandler, path: Path, fault: str) -> None:
        to.close_connection = True
        if fault == "silent":
            self.end.wait(60)
            return
        if fault.isdigit() or not path.exists():
            to.send_error(int(fault or 404))
            return
        content = path.read_bytes()
        to.send_response(200)
        to.send_header("Content-Length", str(len(content) if fault != "endless" else 10**15))
        to.end_headers()
        half = len(content) // 2
        if fault == "slow":
            for at in range(0, len(content), 1 + len(content) // 8):
                to.wfile.write(content[at : at + 1 + len(content) // 8])
                self.end.wait(0.1)  # slowness itself
            return
        to.wfile.write(content[:half])
        if fault == "stalls":
            self.end.wait(60)
        if fault in ("stalls", "breaks"):
            return
        to.wfile.write(content[half:])
        while fault == "endless" and not self.end.is_set():
            to.wfile.write(bytes(1 << 16))

    def close(self) -> None:
        self.end.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(data: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("qsr_engine.data.remote._READ", 0.5)
    made = Server(data[0])
    yield made
    made.close()


def remote(server: Server, cache: Path, way: str, **changes: Any) -> TrainLoader:
    options: dict[str, Any] = {"cache_gb": 0} if way == "streamed" else {"cache_dir": str(cache)}
    index = read_index(server.url)
    return loader((server.url, index), **{"shards": server.url, **options, **changes})


FOR_A_WHILE = ["silent", "stalls", "breaks", "500", "503", "429", "404"]


@pytest.mark.filterwarnings("ignore:.*trying again")
@pytest.mark.parametrize("way", ["cached", "streamed"])
@pytest.mark.parametrize("fault", FOR_A_WHILE)
def test_a_server_that_misbehaves_for_a_while_costs_no_sample(
    data: tuple[Path, Index], server: Server, tmp_path: Path, fault: str, way: str
) -> None:
    server.faults["all-000002.tar"] = [fault, fault]
    found = list(islice(remote(server, tmp_path / "cache", way).batches(), 12))
    assert equal(found, list(islice(loader(data).batches(), 12)))
    assert server.faults["all-000002.tar"] == []
    # Of the next epoch it is asked for again where nothing is kept.
    assert server.asked.count("all-000002.tar") == 3 if way == "cached" else 4


@pytest.mark.parametrize("way", ["cached", "streamed"])
def test_a_server_may_be_slow(data: tuple[Path, Index], server: Server, tmp_path: Path, way: str) -> None:
    """A shard takes longer than the limit, and no part of it does."""
    server.faults["all-000002.tar"] = ["slow"]
    found = list(islice(remote(server, tmp_path / "cache", way).batches(), 12))
    assert equal(found, list(islice(loader(data).batches(), 12)))
    assert server.asked.count("all-000002.tar") == 1 if way == "cached" else 2


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


class Breaking(io.BytesIO):
    """A stream that breaks before one of its bytes."""

    def __init__(self, content: bytes, place: int) -> None:
        super().__init__(content)
        self.place = place

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self.place:
            raise PassingError("s: broken")
        return super().read(size)


@pytest.mark.filterwarnings("ignore:.*trying again")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_stream_that_breaks_goes_on_where_it_broke(waits: list[float], replaced: bool) -> None:
    members = [(f"{number:02d}", noise(number)) for number in range(40)]
    content = tar_bytes(
        {f"{key}.{suffix}": data for key, png in members for suffix, data in (("cls", b"1"), ("png", png))}
    )
    other = content.replace(b"03.", b"x3.")
    other = b"".join(  # with right checksums
        with_field(block, 0, 0, block[:1]) if block[257:262] == b"ustar" else block
        for block in (other[at : at + 512] for at in range(0, len(other), 512))
    )
    streams = [Breaking(content, 30_000), Breaking(other if replaced else content, 50_000), Breaking(content, 10**9)]
    opened = iter(streams)
    source = Streamed(str, lambda _: next(opened), None, Retry(3, 1.0))
    found = list(source.items([ShardSlice("s", 2, 38)]))
    good = [item.key for item in found if isinstance(item, Sample)]
    if replaced:
        assert 0 < len(good) < 36
        assert good == [key for key, _ in members[2 : 2 + len(good)]]
        assert all("its sample 3 was '03', and is 'x3' now" in str(error) for error in found[len(good) :])
        assert waits == [1]
    else:
        assert good == [key for key, _ in members[2:38]], "none is lost, and none comes twice"
        assert waits == [1, 1], "it came further before it broke again"
    assert len(found) == 36
    assert streams[0].closed


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
    assert errors == [f"http://x/{name}: dead (1 try over 0.0 s)"] * 4 or len(set(errors)) == 1
    assert len(errors) == 4
    assert len(fetched) == 1


# -------------------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pipe:curl https://x/s.tar", "`pipe:` would run a command, and none is run here; write a folder, or a URL of"),
        (" PIPE:touch hit", "would run a command"),
        ("pipe://touch hit", "would run a command"),
        ("file:///data/shards", "a folder of this machine is written without file://"),
        ("local:///data", "a folder of this machine is written without local://"),
        ("reference://x", "shards are not read by the protocol 'reference'"),
        ("memory://x", "shards are not read by the protocol 'memory'"),
        ("htps://x", r"by the protocol 'htps'; did you mean https://\?"),
        ("simplecache::http://x/s", "this is a chain of URLs"),
        ("zip://*::https://x/y.zip", "this is a chain of URLs"),
        ("https://x::file:///etc", "this is a chain of URLs"),
        ("pipe:touch hit; #://x", "would run a command"),
    ],
)
def test_places_that_run_commands_or_lead_elsewhere_are_refused(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (check_place, read_index):
        with pytest.raises(DataError, match=message):
            use(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "place", ["/data/shards", "shards", "https://x/y", "s3://bucket/x", "gs://b", "c:/shards", "a:b"]
)
def test_folders_and_urls_of_object_stores_are_taken(place: str) -> None:
    check_place(place)


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/passwd", "a/b.tar", "pipe:touch hit", "x\0.tar", "x\n.tar", "..", "a\\b", "", "http://x"]
)
def test_names_in_an_index_that_would_leave_the_folder_are_refused(data: tuple[Path, Index], name: str) -> None:
    path = data[0] / "index.json"
    raw = json.loads(path.read_text())
    raw["splits"]["all"]["shards"][0]["name"] = name
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"index\.json"):
        read_index(data[0])


def test_an_index_without_end_is_refused(data: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsr_engine.data.index.MAX_INDEX", 100)
    server = Server(data[0])
    server.faults["index.json"] = ["endless"]
    for place in (data[0], server.url):
        with pytest.raises(DataError, match=r"index\.json: it has more than 100 bytes, the limit of an index"):
            read_index(place)
    server.close()


@pytest.mark.parametrize("way", ["random access", "streamed"])
@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "sparse", "claims 5 GB", "claims 10 GB", "pax"])
def test_a_bomb_in_a_tar_takes_no_memory(tmp_path: Path, kind: str, way: str) -> None:
    """Each would take 10 MB to 10 GB in the hands of tarfile alone."""
    if kind in ("gz", "bz2", "xz"):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode=f"w:{kind}") as tar:  # type: ignore[call-overload]
            info = tarfile.TarInfo("a.jpg")
            info.size = 10_000_000
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        bomb = stream.getvalue()
    else:
        names = {"sparse": "pax_sparse", "claims 5 GB": "huge", "claims 10 GB": "huge_binary", "pax": "huge_pax"}
        bomb = shards()[f"{names[kind]}.tar"]
    path = tmp_path / "bomb.tar"
    path.write_bytes(bomb)
    tracemalloc.start()
    read = TarShard(path).read if way == "random access" else lambda _: next(read_shard(path))
    with pytest.raises(DataError, match=r"bomb\.tar: this shard cannot be read past sample 0"):
        read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20  # tarfile's blocks of 10 KiB, and what it imports for it


def test_links_devices_and_names_that_lead_out_are_keys_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / "s.tar"
    path.write_bytes(shards()["links.tar"])
    shard = TarShard(path)
    keys = [shard.read(number).key for number in range(len(shard.samples))]
    assert keys == [raw.key for raw in read_shard(path)]
    assert keys == ["a", "/absolute", "../outside", "__remark__", "b", "c"]
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "s.tar"]


def test_nothing_in_a_shard_is_unpickled(tmp_path: Path) -> None:
    """webdataset's decoders would load .pyd and .pth members."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "hit"),)

    evil = pickle.dumps(Evil())
    content = {f"a.{suffix}": evil for suffix in ("pyd", "pickle", "pkl", "pth", "npy")}
    path = tmp_path / "all-000000.tar"
    path.write_bytes(tar_bytes({**content, "a.cls": b"1", "a.png": noise(0)}))
    for source in (
        RandomAccess(lambda name: TarShard(tmp_path / name), None),
        Streamed(str, lambda name: (tmp_path / name).open("rb"), None),
    ):
        (item,) = source.items([ShardSlice(path.name, 0, 1)])
        assert isinstance(source.load(item), Sample)
    assert not (tmp_path / "hit").exists()


BOMBS = """
import io, random, resource, sys
import numpy as np
from PIL import Image
from qsr_engine.data import decoding
from qsr_engine.data.images import check_image
from qsr_engine.data.errors import DataError
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import EvalView, TrainView

def encode(format, **options):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, format=format, **options)
    return stream.getvalue()

files = [encode("PNG"), encode("JPEG", quality=60), encode("JPEG", progressive=True), encode("JPEG", subsampling=0)]
decoders = [decoding.Decoder(16, TrainView(16, "crop_flip")), decoding.Decoder(16, EvalView(16))]
out = np.empty((16, 16, 3), np.uint8)

def outcome(data, number=0):
    try:
        decoders[number % 2].decode(Sample("s.tar", "k7", bytes(data), 0), random.Random(number), out)
        return ""
    except DataError as error:
        assert str(error).startswith("s.tar: sample 'k7' "), error
        return str(error)

for file in files:
    assert outcome(file) == ""  # all libraries are loaded
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

for regions in {False, decoding.REGIONS}:  # with and without the extension
    decoding.REGIONS = regions
    for width, height in [(60000, 60000), (65500, 65500), (60000, 1700), (10001, 10000)]:
        for file in files:
            data = bytearray(file)
            if data[:4] == b"\\x89PNG":
                import zlib
                data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
                data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
            else:
                frame = max(data.find(b"\\xff\\xc0"), data.find(b"\\xff\\xc2")) + 5
                data[frame : frame + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
            text = outcome(data)
            assert "limit" in text, (width, height, text)
            try:
                check_image(bytes(data), "x")
            except DataError as error:
                assert "limit" in str(error), error
            else:
                raise AssertionError("it was decoded")

rng = np.random.default_rng(0)
good = bad = 0
for file in files:
    cuts = [file[:at] for at in range(0, len(file), max(1, len(file) // 150))]
    for number in range(400):
        data = bytearray(file)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            data[at] = int(rng.integers(256))
        cuts.append(data)
    for number, data in enumerate(cuts):
        if outcome(data, number):
            bad += 1
        else:
            good += 1
print(good, bad)
"""


def test_image_bombs_and_broken_images_are_errors_and_never_a_crash(tmp_path: Path) -> None:
    """In a process of its own that may take 256 MiB more: 60,000 x 60,000 pixels would be 10.8 GB."""
    script = tmp_path / "bombs.py"
    script.write_text(BOMBS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    good, bad = map(int, done.stdout.split())
    assert good > 100
    assert bad > 600
