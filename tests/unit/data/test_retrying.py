"""Reads that fail for a while, or for good: tries, waits, and what they cost."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest

from qsr_engine.data.decoding import REGIONS
from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.index import Index
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.remote import ShardStream
from qsr_engine.data.retrying import LONGEST_WAIT, Retry, retried
from qsr_engine.data.samples import Placed, Position, Sample, bad_sample
from qsr_engine.data.streaming import Streamed
from qsr_engine.data.table import open_table
from qsr_engine.data.tar import span_of
from qsr_engine.data.tar_shard import TarShard
from tests.support.bucket import bucket
from tests.support.loading import equal, load, train_loader
from tests.support.shard_files import shards_of

if REGIONS:
    from qsr_engine.data import _jpeg


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
    """Three reads in a row fail, twice, with every shard opened anew."""
    read, failures = os.pread, [3, 3]
    opened: list[Path] = []
    whole = list(islice(load(data).batches(), 12))

    def pread(file: int, size: int, offset: int) -> bytes:
        phase = 0 if len(opened) <= 3 else 1 if offset > 512 * 10 and len(opened) > 6 else None
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
    assert equal(list(islice(load(data, retry_seconds=1).batches(), 12)), whole)
    assert failures == [0, 0]
    assert waits[:3] == [1, 2, 4]
    assert len(waits) == 6
    assert len(opened) == 4 + 6


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_read_that_ends_before_its_file_is_tried_again_and_a_truncated_file_is_not(
    data: tuple[Path, Index], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems give less than was asked for, or for a moment nothing."""
    read, answers = os.pread, [10, 0, 10**9, 5, 5]
    monkeypatch.setattr(os, "pread", lambda f, size, at: read(f, min(size, answers.pop(0) if answers else size), at))
    table = open_table(data[0] / "samples.npy", data[1])
    source = RandomAccess(lambda name: TarShard(data[0] / name), table, None, retry=Retry(2, 1.0))
    found = [source.load(Position("all-000000.tar", number)) for number in (3, 4)]
    assert [isinstance(sample, Sample) for sample in found] == [True, True]
    assert (answers, waits) == ([], [1])
    os.truncate(data[0] / "all-000000.tar", 2000)
    assert "is truncated" in str(source.load(Position("all-000000.tar", 3)))
    assert waits == [1]


@pytest.mark.skipif(not REGIONS, reason="needs qsr_engine.data._jpeg")
def test_what_compiled_code_cannot_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shards_of(tmp_path, [12, 12], kind="JPEG")
    whole = list(islice(load(data).batches(), 6))
    decode, seen = _jpeg.decode_batch, list[bool]()

    def fails(sources: Sequence[bytes | tuple[int, int, int]], *rest: Any) -> list[str | None]:
        seen.extend(isinstance(source, tuple) for source in sources)
        decode(sources, *rest)
        rest[2][:] = 99  # what it leaves is anything
        return ["Input/output error"] * len(sources)

    monkeypatch.setattr(_jpeg, "decode_batch", fails)
    assert equal(list(islice(load(data).batches(), 6)), whole)
    assert seen == [True] * 24


@pytest.mark.skipif(not REGIONS, reason="needs qsr_engine.data._jpeg")
def test_files_stay_open_until_the_batch_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample of a batch lies in another shard, and few shards may be open."""
    data = shards_of(tmp_path, [2] * 24, kind="JPEG")
    options = {"shuffle": "samples", "batch_size": 24, "ranks": 1}
    whole = list(islice(train_loader(data, **options).batches(), 4))
    monkeypatch.setattr("qsr_engine.data.random_access.OPEN_SHARDS", 4)
    loader = train_loader(data, **options)
    assert equal(list(islice(loader.batches(), 4)), whole)
    source = loader._source
    assert isinstance(source, RandomAccess)
    loaded = [one for one in map(source.load, islice(loader.items(), 24)) if isinstance(one, Placed)]
    assert len(loaded) >= 8
    for one in loaded:
        assert os.pread(one.extent.file, one.extent.length, one.extent.offset) == one.whole().image
    del loaded, one
    assert (len(source._open), len(source._closing)) == (4, 0), "the others are closed"


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_file_that_comes_back_is_read(data: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(islice(load(data).batches(), 12))
    path, away = data[0] / "all-000002.tar", data[0] / "away"
    path.rename(away)
    waited = []

    def come_back(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            away.rename(path)

    monkeypatch.setattr("qsr_engine.data.retrying.time.sleep", come_back)
    assert equal(list(islice(load(data).batches(), 12)), whole)
    assert len(waited) == 2


@pytest.mark.filterwarnings("ignore:.*trying again", "ignore:skipped")
def test_a_shard_that_is_gone_is_waited_for_once_and_all_its_samples_count(
    data: tuple[Path, Index], waits: list[float]
) -> None:
    (data[0] / "all-000002.tar").unlink()
    found = list(islice(load(data, max_bad_samples=12).batches(), 24))  # two epochs
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
        list(islice(load(data, max_bad_samples=11).batches(), 12))
    with pytest.raises(DataError, match=r"^all-000002\.tar: sample \d+: .*\(4 tries over \d+\.\d s\)$"):
        list(islice(load(data).batches(), 12))


def test_samples_that_were_skipped_before_a_restart_count_once(data: tuple[Path, Index]) -> None:
    """With another number of tries, and so another text."""
    (data[0] / "all-000001.tar").unlink()
    before = list(islice(load(data, max_bad_samples=12, retries=0).batches(), 12))
    skipped = {text for batch in before for text in batch.skipped}
    assert len(skipped) == 12
    after = list(islice(load(data, max_bad_samples=12, retries=1).batches(12, skipped), 12))
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
    table = open_table(data[0] / "samples.npy", data[1])
    source = RandomAccess(lambda name: TarShard(data[0] / name), table, None, retry=Retry(2, 1.0))
    found = [source.load(Position("all-000000.tar", number)) for number in range(12)]
    good = [isinstance(sample, Sample) for sample in found]
    assert good == [True] * sum(good) + [False] * (12 - sum(good))
    assert 0 < sum(good) < 12
    assert waits == [1, 2]
    assert "Input/output error (3 tries over" in str(found[sum(good)])


class Breaking(ShardStream):
    """A stream that breaks before one of its bytes."""

    breaks = 0

    def read(self, size: int = -1) -> bytes:
        if self.at >= self.breaks:
            raise PassingError("s: broken")
        return super().read(size)


@pytest.mark.filterwarnings("ignore:.*trying again")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_stream_that_breaks_goes_on_where_it_broke(tmp_path: Path, waits: list[float], replaced: bool) -> None:
    _, index = shards_of(tmp_path, [40])
    name, table = "all-000000.tar", open_table(tmp_path / "samples.npy", index)
    places = [30_000, 50_000, 10**9]
    streams: list[Breaking] = []
    with bucket(tmp_path, "s3") as (url, opened):

        def open_stream(name: str, start: int) -> Breaking:
            if replaced and streams:
                fsspec.filesystem("s3").pipe("s3://bucket/set/" + name, bytes((tmp_path / name).stat().st_size))
            streams.append(Breaking(f"{url}/{name}", (tmp_path / name).stat().st_size, start))
            streams[-1].breaks = places[len(streams) - 1]
            return streams[-1]

        source = Streamed(open_stream, table, url, None, Retry(3, 1.0))
        found = [source.load(item) for item in source.items([ShardSlice(name, 2, 38)])]
    good = [item.label for item in found if isinstance(item, Sample)]
    assert len(found) == 36
    assert streams[0].closed
    if replaced:
        assert good == list(range(2, 2 + len(good)))
        assert 0 < len(good) < 36
        assert all("this shard has no image at byte" in str(error) for error in found[len(good) :])
        return
    assert good == list(range(2, 38)), "none is lost, and none comes twice"
    assert waits == [1, 1], "it came further before it broke again"
    spans = [span_of(table.row(name, number)) for number in range(40)]
    broke = [min(start for start, _ in spans if start >= place) for place in places[:2]]
    assert [start for _, start in opened] == [spans[2][0], *broke]
