"""`qsr shards verify`: every kind of damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qsr_engine.cli.main import main
from qsr_engine.data import DataError, Index, index_shards, read_index, verify_shards
from qsr_engine.data.index import Shard, Split
from qsr_engine.data.writing.folder import write_index
from qsr_engine.data.writing.scanning import scan_shard
from tests.support.shard_files import picture, tar_bytes, write_tar

A, B = picture(8, 8, seed=0), picture(8, 8, seed=1)
WHOLE = {"a.jpg": A, "a.cls": b"0", "b.jpg": B, "b.cls": b"1"}


def write_set(folder: Path, content: dict[str, bytes], *, samples: int = 2) -> None:
    """One shard, and an index whose size and checksum fit."""
    path = folder / "train-000000.tar"
    write_tar(path, content)
    scan = scan_shard(path, None)
    shard = Shard(name=path.name, samples=samples, bytes=scan.bytes, sha256=scan.sha256)
    write_index(folder, Index(classes=["x", "y"], splits={"train": Split(samples=samples, shards=[shard])}))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Shards train-000000, train-000001 and val-000000, and their index."""
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        write_tar(tmp_path / name, WHOLE)
    index_shards(tmp_path)
    return tmp_path


def test_every_shard_that_changed_is_named(three: Path) -> None:
    assert verify_shards(three, decode=True) == read_index(three)
    changed = three / "train-000000.tar"
    changed.write_bytes(changed.read_bytes().replace(A, A[:-1] + b"?"))
    (three / "val-000000.tar").unlink()
    for processes in (1, 2):
        with pytest.raises(DataError) as caught:
            verify_shards(three, processes=processes)
        assert str(caught.value).splitlines() == [
            f"{changed}: its sha256 is not that of index.json; copy or write this shard again",
            f"{three}/val-000000.tar: this shard is missing; copy or write it again",
        ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "this shard is empty: it has 0 bytes, and index.json says 10240"),
        (lambda data: data[:1700], "this shard is truncated: it has 1700 bytes, and index.json says 10240"),
        (lambda data: data[:1700], r"this shard holds 1 samples, and index\.json says 2"),
        (lambda data: data[:1700], "this shard cannot be read past sample 1: it is truncated"),
        (lambda data: data + b"x", "this shard is too long: it has 10241 bytes, and index.json says 10240"),
        (lambda data: bytes(10240), r"this shard holds 0 samples, and index\.json says 2"),
        (lambda data: b"no tar file " * 1000, "this shard cannot be read past sample 0: it is truncated or not a tar"),
    ],
)
def test_damaged_files_are_named(three: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    shard = three / "train-000001.tar"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(DataError, match=rf"train-000001\.tar: {message}"):
        verify_shards(three)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**WHOLE, "c.jpg": A, "c.cls": b"0"}, r"this shard holds 3 samples, and index\.json says 2"),
        ({"a.jpg": A, "a.cls": b"0", "b.jpg": B}, r"sample 'b' has no label \(\.cls\); its members are: jpg"),
        ({"a.jpg": A, "a.cls": b"0", "b.cls": b"1"}, r"sample 'b' has no image .*; its members are: cls"),
        ({**WHOLE, "b.cls": b"dog"}, r"sample 'b' has the label b'dog'; a label is a whole number"),
        ({**WHOLE, "b.cls": b"2"}, r"sample 'b' has the label 2, and there are 2 classes \(0 to 1\)"),
        ({**WHOLE, "b.jpg": b""}, r"sample 'b' has an image of 0 bytes"),
        ({"a.jpg": A, "a.cls": b"0", "a.JPG": B}, "sample 'a' has two members of one name"),
        ({"a.jpg": A, "b.jpg": B, "b.cls": b"1", "a.cls": b"0"}, "sample 'a': this key occurs more than once"),
    ],
)
def test_wrong_samples_are_named(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    write_set(tmp_path, content)
    with pytest.raises(DataError, match=rf"train-000000\.tar: {message}"):
        verify_shards(tmp_path)


def test_members_that_belong_to_no_sample_are_passed_over(tmp_path: Path) -> None:
    write_set(tmp_path, {"__meta__/note.txt": b"x", "README": b"x", **WHOLE, "b.json": b"{}"})
    verify_shards(tmp_path)


def test_broken_images_are_found_where_they_are_decoded(tmp_path: Path) -> None:
    write_set(tmp_path, {**WHOLE, "b.jpg": B[:-30]})
    verify_shards(tmp_path)
    with pytest.raises(DataError, match=r"sample 'b': this does not decode as JPEG, PNG or WebP: .*truncated"):
        verify_shards(tmp_path, decode=True)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (picture(303, 3), "has 303 x 3 pixels; the limit is a side 100 times as long as the other"),
        (picture(8, 8) + 100 * b"\xff\xda", "has 101 scans; the limit is 100"),
        (b"\xff\xd8\xff", "this does not decode as JPEG, PNG or WebP: cannot identify the image; replace or delete it"),
    ],
)
def test_images_that_training_refuses_are_found_where_they_are_decoded(
    tmp_path: Path, image: bytes, message: str
) -> None:
    write_set(tmp_path, {**WHOLE, "b.jpg": image})
    verify_shards(tmp_path)
    with pytest.raises(DataError, match=rf"train-000000\.tar: sample 'b':? {message}$"):
        verify_shards(tmp_path, decode=True)


def test_a_tar_whose_middle_is_broken_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(WHOLE))
    header = data.index(b"b.jpg")
    data[header + 148] ^= 1  # in the checksum of the header
    (tmp_path / "train-0.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"train-0\.tar: this shard cannot be read past sample 1: .*no mark of the end"):
        index_shards(tmp_path)


def test_shards_that_the_index_does_not_list_are_named(three: Path) -> None:
    write_tar(three / "train-000002.tar", WHOLE)
    with pytest.raises(DataError, match=r"train-000002\.tar: index\.json does not list this shard"):
        verify_shards(three)


def test_of_many_problems_the_first_hundred_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path, {f"{n:03d}.txt": b"" for n in range(120)}, samples=120)  # neither image nor label
    assert main(["shards", "verify", str(tmp_path)]) == 1
    passed_over, *lines = capsys.readouterr().err.splitlines()
    assert passed_over == "qsr: passed over: 120 files .txt (the first: train-000000.tar: '000.txt')"
    assert len(lines) == 101
    assert "sample '049' has no label" in lines[99]
    assert lines[100] == "and 140 more"


def test_an_empty_set_and_a_wrong_index_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.json: this index is missing"):
        verify_shards(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "classes": None, "splits": {}}))
    assert verify_shards(tmp_path).splits == {}
