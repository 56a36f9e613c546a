"""What is read of a tar file by every reader, and what is refused."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys

from qsr_engine.data import index_shards
from qsr_engine.data.errors import DataError
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.remote import ShardStream
from qsr_engine.data.rows import PACKED, Row
from qsr_engine.data.samples import Sample
from qsr_engine.data.streaming import Streamed
from qsr_engine.data.table import open_table
from qsr_engine.data.tar import key_and_suffix
from qsr_engine.data.tar_shard import TarShard
from qsr_engine.data.writing.scanning import scan_shard
from tests.fuzz.make_seeds import CORPUS
from tests.support.bucket import bucket
from tests.support.shard_files import noise, shards_of, tar_bytes

REMARK = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over
NAMES = [
    *("a.jpg", "a.JPG", "a.cls", "b.c.jpg", "b.cls", "B.CLS", "d/e.jpg", "d/e.cls", "d.f/g.cls", "./h.cls", ".i", "j"),
    *("__k__.x", "__l__/m.cls", "n..cls", "o.", "d/.p"),
    *("q" * 99 + ".jpg", "r" * 150 + ".jpg", "s" * 90 + "/" + "t" * 90 + ".cls"),
]


@settings(max_examples=300, deadline=None)
@given(name=st.text("aB._/\n\u00e9", max_size=10) | st.sampled_from(NAMES))
def test_keys_and_suffixes_are_those_of_webdataset(name: str) -> None:
    key, suffix = base_plus_ext(name)
    assert key_and_suffix(name) == (None if key is None or REMARK.match(name) else (key, suffix.lower()))


@settings(max_examples=200, deadline=None)
@given(names=st.lists(st.sampled_from(NAMES), max_size=8, unique=True), format=st.sampled_from([0, 1, 2]))
def test_members_are_grouped_as_webdataset_groups_them(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], format: int
) -> None:
    """By the scan that makes the index; what webdataset does not see is that a key comes back later."""
    path = tmp_path_factory.mktemp("names") / "all-000000.tar"
    written = []
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        if len(names) == 3:
            tar.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            with contextlib.suppress(ValueError):  # too long for this format
                tar.addfile(info, io.BytesIO(name.encode()))
                if not REMARK.match(name):
                    written.append({"fname": name, "data": name.encode(), "__url__": ""})
    expected: list[str] = []
    error = False
    try:
        for sample in group_by_keys(written):
            if sample["__key__"] in expected:
                raise ValueError
            expected.append(sample["__key__"])
    except ValueError:
        error = True
    scan = scan_shard(path, None)
    assert scan.samples >= len(expected) if error else scan.samples == len(expected)
    assert any("two members of one name" in text or "occurs more than once" in text for text in scan.problems) == error


def test_an_image_is_read_only_where_a_header_of_its_name_and_size_is(tmp_path: Path) -> None:
    folder, index = shards_of(tmp_path, [5])
    path = folder / "all-000000.tar"
    table = open_table(folder / "samples.npy", index)
    rows = [table.row(path.name, number) for number in range(5)]
    whole = path.read_bytes()
    for at in (0, 5, 124, 130, 345):  # name, size, and what would be a longer name
        damaged = bytearray(whole)
        damaged[rows[2].offset - 512 + at] ^= 0x11
        path.write_bytes(damaged)
        shard = TarShard(path)
        for good in (0, 1, 3, 4):
            assert shard.read(good, rows[good]) == (f"{good:08d}", noise(good))
        if at in (0, 5):
            assert shard.read(2, rows[2])[0] != "00000002"  # another key is as good as this one
        else:
            with pytest.raises(
                DataError, match=r"all-000000\.tar: this shard has no image at byte \d+, where its index"
            ):
                shard.read(2, rows[2])
    with pytest.raises(DataError, match=r"has no image at byte"):
        shard.read(1, rows[1]._replace(offset=rows[1].offset + 512))


@pytest.mark.parametrize("byte", [b"9", b"8", b"-", b"\xff"])
def test_a_header_with_a_number_that_is_none_is_damage(tmp_path: Path, byte: bytes) -> None:
    folder, index = shards_of(tmp_path, [3])
    path = folder / "all-000000.tar"
    row = open_table(folder / "samples.npy", index).row(path.name, 0)
    data = bytearray(path.read_bytes())
    data[row.offset - 512 + 124 : row.offset - 512 + 125] = byte
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"all-000000\.tar: this shard has no image"):
        TarShard(path).read(0, row)


def test_a_negative_size_does_not_send_the_scan_back(tmp_path: Path) -> None:
    """It once went round for ever, and took memory on every turn."""
    header = bytearray(512)
    header[:1], header[124:135], header[156:157] = b"x", b"-0000001000", b"0"
    (tmp_path / "all-000000.tar").write_bytes(bytes(512 * 4) + header)
    (tmp_path / "all-000001.tar").write_bytes(bytes(header) * 3)
    for name in ("all-000000.tar", "all-000001.tar"):
        assert any(name in text for text in scan_shard(tmp_path / name, None).problems)


def test_a_name_that_is_not_utf_8_is_read(tmp_path: Path) -> None:
    path = tmp_path / "all-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for suffix, content in (("cls", b"1"), ("png", noise(0))):
            info = tarfile.TarInfo(f"\xe9.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert TarShard(path).read(0, Row(*PACKED.unpack(scan_shard(path, None).rows))) == ("\udce9", noise(0))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_bomb_in_a_tar_takes_no_memory(tmp_path: Path, kind: str) -> None:
    """Each would take 10 MB in the hands of tarfile alone; headers that announce more are in tests/fuzz/corpus."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{kind}") as tar:  # type: ignore[call-overload]
        info = tarfile.TarInfo("a.jpg")
        info.size = 10_000_000
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    path = tmp_path / "bomb.tar"
    path.write_bytes(stream.getvalue())
    tracemalloc.start()
    (problem,) = scan_shard(path, None).problems
    assert "bomb.tar: this shard cannot be read past sample 0: it is compressed; decompress it" in problem
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
    path.write_bytes((CORPUS / "shards" / "links.tar").read_bytes())
    scan = scan_shard(path, None)
    keys = [TarShard(path).read(0, Row(*row))[0] for row in PACKED.iter_unpack(scan.rows)]
    assert keys == ["a", "b", "c"]
    assert [text.split("'")[1] for text in scan.problems] == ["/absolute", "../outside", "__remark__"]
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
    index = index_shards(tmp_path, say=lambda _: None)
    table = open_table(tmp_path / "samples.npy", index)
    with bucket(tmp_path, "s3") as (url, _):
        for source in (
            RandomAccess(lambda name: TarShard(tmp_path / name), table, None),
            Streamed(lambda name, start: ShardStream(f"{url}/{name}", None, start), table, url, None),
        ):
            (item,) = source.items([ShardSlice(path.name, 0, 1)])
            assert isinstance(source.load(item), Sample)
    assert not (tmp_path / "hit").exists()
