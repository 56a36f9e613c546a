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

from qsr_engine.data.errors import DataError
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.samples import RawSample, Sample
from qsr_engine.data.streaming import Streamed, read_shard
from qsr_engine.data.tar import key_and_suffix
from qsr_engine.data.tar_shard import TarShard
from qsr_engine.data.writing.scanning import scan_shard
from tests.fuzz.make_seeds import CORPUS
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
    """By both readers and by the check; what webdataset does not see is that a key comes back later."""
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
    expected: list[RawSample] = []
    error = ""
    try:
        for sample in group_by_keys(written):
            if sample["__key__"] in [one.key for one in expected]:
                raise ValueError
            expected.append(RawSample(sample["__key__"], {k: v for k, v in sample.items() if k[:2] != "__"}))
    except ValueError:
        error = f"{path}: this shard cannot be read past sample {len(expected)}: the key "
    found, shard = [], TarShard(path)
    with pytest.raises(DataError, match=re.escape(error)) if error else contextlib.nullcontext():
        for raw in read_shard(path):
            found.append(raw)
    assert found == expected
    assert [shard.read(number) for number in range(len(expected))] == expected
    with pytest.raises(DataError, match=re.escape(error)):
        shard.read(len(expected))
    scan = scan_shard(path, None)
    assert scan.samples >= len(expected) if error else scan.samples == len(expected)
    assert any("two members of one name" in text or "occurs more than once" in text for text in scan.problems) == (
        error != ""
    )


def test_a_damaged_header_is_found_and_samples_before_it_are_good(tmp_path: Path) -> None:
    folder, _ = shards_of(tmp_path, [5])
    path = folder / "all-000000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [info.offset for info in tar]
    for number, place in enumerate(places):
        for at in (0, 5, 100, 124, 130, 148, 156, 257, 345):
            damaged = bytearray(whole)
            damaged[place + at] ^= 0x11
            path.write_bytes(damaged)
            shard = TarShard(path)
            assert len(shard.samples) <= number // 2 + 1
            for good in range(number // 2):
                assert shard.read(good).members["cls"] == str(good).encode()
            with pytest.raises(DataError, match=r"all-000000\.tar: this shard (cannot be read past|ends after)"):
                shard.read(number // 2 + 1)


@pytest.mark.parametrize("byte", [b"9", b"8", b"-", b" ", b"\xff"])
def test_a_header_with_a_number_that_is_none_is_damage(tmp_path: Path, byte: bytes) -> None:
    folder, _ = shards_of(tmp_path, [3])
    path = folder / "all-000000.tar"
    for at in (124, 150):
        data = bytearray(path.read_bytes())
        data[at : at + 1] = byte
        (tmp_path / "damaged.tar").write_bytes(data)
        with pytest.raises(DataError, match=r"damaged\.tar: this shard cannot be read past sample 0"):
            TarShard(tmp_path / "damaged.tar").read(0)


def test_a_negative_size_does_not_send_the_walk_back(tmp_path: Path) -> None:
    """It once went round for ever, and took memory on every turn."""
    header = bytearray(512)
    header[:1], header[124:135], header[156:157] = b"x", b"-0000001000", b"0"
    (tmp_path / "all-000000.tar").write_bytes(bytes(512 * 4) + header)
    (tmp_path / "all-000001.tar").write_bytes(bytes(header) * 3)
    for name in ("all-000000.tar", "all-000001.tar"):
        with pytest.raises(DataError, match=name):
            TarShard(tmp_path / name).read(0)


def test_a_name_that_is_not_utf_8_is_read(tmp_path: Path) -> None:
    path = tmp_path / "all-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for suffix, content in (("cls", b"1"), ("png", noise(0))):
            info = tarfile.TarInfo(f"\xe9.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert TarShard(path).read(0) == next(read_shard(path))


@pytest.mark.parametrize("way", ["random access", "streamed"])
@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_bomb_in_a_tar_takes_no_memory(tmp_path: Path, kind: str, way: str) -> None:
    """Each would take 10 MB in the hands of tarfile alone; headers that announce more are in tests/fuzz/corpus."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{kind}") as tar:  # type: ignore[call-overload]
        info = tarfile.TarInfo("a.jpg")
        info.size = 10_000_000
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    path = tmp_path / "bomb.tar"
    path.write_bytes(stream.getvalue())
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
    path.write_bytes((CORPUS / "shards" / "links.tar").read_bytes())
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
