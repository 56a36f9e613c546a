"""The index of a folder, and the places and names that it may have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsr_engine.data.checking import check_shards
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index, Shard, Split, read_index
from qsr_engine.data.places import check_place
from tests.support.server import Server

SHA = "0" * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"index\.json: not JSON that can be read"),
        ("[]", r"index\.json"),
        ('{"format": 2, "classes": null, "splits": {}}', "format: found 2; input should be 1"),
        ('{"format": 1, "classes": null, "splits": {}, "extra": 1}', "extra: unknown key"),
        ('{"format": 1, "classes": null, "splits": {"train": {"samples": 3, "shards": []}}}', "samples is 3"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_index(tmp_path)


def test_a_missing_index_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"qsr shards index {tmp_path}"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../x.tar", "/etc/passwd", "a//b.tar", "pipe:touch hit", "x\0.tar", "x\n.tar", "..", "a\\b", "", "http://x"],
)
def test_shard_names_that_are_no_plain_file_names_are_refused(tmp_path: Path, name: str) -> None:
    shard = {"name": name, "samples": 1, "bytes": 1, "sha256": SHA}
    raw = {"format": 1, "classes": None, "splits": {"train": {"samples": 1, "shards": [shard]}}}
    (tmp_path / "index.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"splits\.train\.shards\.0\.name"):
        read_index(tmp_path)


def test_a_shard_listed_twice_is_refused() -> None:
    shard = Shard(name="train-0.tar", samples=1, bytes=1, sha256=SHA)
    with pytest.raises(ValueError, match=r"'train-0\.tar' is listed twice"):
        Split(samples=2, shards=[shard, shard])


def test_unknown_and_empty_splits_are_named(small: Path) -> None:
    index = read_index(small)
    with pytest.raises(DataError, match="no split 'vall'; did you mean 'val'"):
        check_shards(small, index, "vall")
    empty = Index(classes=None, splits={"train": Split(samples=0, shards=[])})
    with pytest.raises(DataError, match="'train' has no samples"):
        check_shards(small, empty, "train")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (None, "this shard is missing"),
        (0, "this shard is empty: it has 0 bytes, and index.json says 10240"),
        (10239, "this shard is truncated: it has 10239 bytes, and index.json says 10240"),
        (10241, "this shard is too long: it has 10241 bytes, and index.json says 10240"),
    ],
)
def test_shards_of_another_size_are_found_without_reading(small: Path, size: int | None, message: str) -> None:
    shard = small / "train-000001.tar"
    if size is None:
        shard.unlink()
    else:
        shard.write_bytes(bytes(size))
    index = read_index(small)
    check_shards(small, index, "val")
    with pytest.raises(DataError, match=rf"train-000001\.tar: {message}"):
        check_shards(small, index, "train")


def test_an_index_without_end_is_refused(data: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsr_engine.data.index.MAX_INDEX", 100)
    server = Server(data[0])
    server.faults["index.json"] = ["endless"]
    for place in (data[0], server.url):
        with pytest.raises(DataError, match=r"index\.json: it has more than 100 bytes, the limit of an index"):
            read_index(place)
    server.close()


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
