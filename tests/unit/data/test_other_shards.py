"""Shards that others wrote: names, labels, what they hold besides, and the places of all samples beside the index."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from qsr_engine.data import DataError, index_shards, read_index, shuffle_shards, verify_shards, write_imagefolder
from qsr_engine.data.index import Index, Shard, Split
from qsr_engine.data.loader import TrainLoader
from qsr_engine.data.places import expand_places
from qsr_engine.data.rows import header_of
from qsr_engine.data.samples import Placed, Position
from qsr_engine.data.sources import make_source
from qsr_engine.data.table import DTYPE, open_table
from qsr_engine.data.tar import read_at
from qsr_engine.data.writing.folder import write_index
from tests.support.loading import data_config, equal, take, train_loader
from tests.support.server import Server
from tests.support.shard_files import noise, picture, read_samples, tar_bytes, write_images, write_tar

ONE = {"a.jpg": noise(0, "JPEG"), "a.cls": b"0"}


def write_by_webdataset(folder: Path, samples: int = 30) -> Path:
    """Shards of webdataset's own writer, with PAX headers; the last key is longer than a header has room."""
    folder.mkdir(exist_ok=True)
    with wds.ShardWriter(str(folder / "train-%06d.tar"), maxcount=12, verbose=0) as writer:
        for number in range(samples):
            key = f"{number:06d}" if number < samples - 1 else "k" * 150
            writer.write({"__key__": key, "jpg": noise(number, "JPEG"), "cls": number % 7, "json": {"label": number}})
    return folder


def test_a_sample_is_read_at_its_place_and_is_what_tarfile_finds(tmp_path: Path) -> None:
    folder = write_by_webdataset(tmp_path)
    index = index_shards(folder, say=lambda _: None)
    rows = np.load(folder / "samples.npy", mmap_mode="r")
    assert (rows.dtype, rows.dtype.itemsize, len(rows)) == (DTYPE, 26, 30)
    source = make_source(folder, index, data_config(train="train"), "train")
    expected = read_samples(folder, index, "train")
    for shard in index.splits["train"].shards:
        for number in range(shard.samples):
            sample, other = source.load(Position(shard.name, number)), expected.pop(0)
            assert isinstance(sample, Placed)
            assert sample.header == header_of(other.image) == (8, 8, True)
            assert os.pread(sample.extent.file, sample.extent.length, sample.extent.offset) == other.image
            assert sample.whole() == other._replace(header=sample.header)
    path = folder / "train-000001.tar"
    path.write_bytes(bytes(512) + path.read_bytes()[:-512])  # of the same size, and moved
    found = source.load(Position("train-000001.tar", 3))
    assert isinstance(found, Placed)
    assert "this shard has no image at byte" in str(found.load())
    (folder / "samples.npy").write_bytes(b"other")
    with pytest.raises(DataError, match=r"samples\.npy: this table of samples is not that of index\.json"):
        open_table(folder / "samples.npy", index)


def test_a_million_samples_start_at_once(tmp_path: Path) -> None:
    """The rows of 1.28 million samples in 1,000 shards: mapped, not read into every process."""
    shards = [Shard(name=f"train-{n:06d}.tar", samples=1280, bytes=1, sha256="0" * 64) for n in range(1000)]
    index = Index(classes=None, splits={"train": Split(samples=1_280_000, shards=shards)})
    write_index(tmp_path, index, [bytes(26 * 1_280_000)])
    config = data_config(train="train", shuffle="samples")
    tracemalloc.start()
    started = time.monotonic()
    loader = TrainLoader(tmp_path, read_index(tmp_path), config, rank=3, ranks=8, batch_size=4, seed=0)
    items = list(islice(loader.items(1_000_000), 100))  # in the seventh epoch
    seconds, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(items)) == 100
    assert seconds < 3  # 0.4 on an idle machine
    assert peak < 50e6
    assert len(pickle.dumps(loader._source)) < 100_000  # what a loader process is given


def test_all_samples_are_shuffled_and_a_loader_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = write_by_webdataset(tmp_path)
    data = folder, index_shards(folder, say=lambda _: None)
    options = {"train": "train", "shuffle": "samples", "batch_size": 5}
    loaders = [train_loader(data, rank=rank, **options) for rank in range(2)]
    drawn = [item for loader in loaders for item in islice(loader.items(), 15)]
    assert len(set(drawn)) == 30
    assert drawn != sorted(drawn, key=str)
    whole = take(iter(loaders[0]), 6)
    other = train_loader(data, rank=0, **options)
    take(iter(other), 2)
    resumed = train_loader(data, rank=0, **options)
    resumed.load_state_dict(other.state_dict())
    assert equal(take(iter(resumed), 4), whole[2:])


LABELS: dict[str, tuple[str, bytes]] = {
    "json:label": ("json", b'{"label": 3}'),
    "json:text": ("json", b'{"text": "3"}'),
    "txt": ("txt", b" 3\n"),
    "cls": ("CLS", b"3"),
}


@pytest.mark.parametrize("rule", list(LABELS))
@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "WebP"])
def test_images_and_labels_of_every_kind_are_taken(tmp_path: Path, rule: str, suffix: str) -> None:
    image = picture(9, 8, kind={"jpg": "JPEG"}.get(suffix, suffix.upper()))
    member, label = LABELS[rule]
    write_tar(tmp_path / "00000.tar", {f"a.{suffix}": image, f"a.{member}": label})
    index = index_shards(tmp_path, splits={"train": "{00000..00000}.tar"}, label=rule, say=print)
    assert verify_shards(tmp_path, decode=True) == index == read_index(tmp_path)
    row = np.load(tmp_path / "samples.npy")[0]
    assert [row[name].item() for name in ("label", "width", "height")] == [3, 9, 8]
    assert next(
        TrainLoader(tmp_path, index, data_config(train="train"), rank=0, ranks=1, batch_size=1, seed=0).batches()
    ).labels.tolist() == [3]


@pytest.mark.parametrize(
    ("content", "label", "message"),
    [
        ({"a.jpg": b"A", "a.json": b"{"}, "json:label", "sample 'a' has a .json that cannot be read"),
        (
            {"a.jpg": b"A", "a.json": b'{"b": 1}'},
            "json:label",
            "has no field 'label' in its .json; the fields are: 'b'",
        ),
        (
            {"a.jpg": b"A", "a.json": b'{"label": true}'},
            "json:label",
            "has the label b'True'; a label is a whole number",
        ),
        ({"a.jpg": b"A"}, "txt", r"has no label \(\.txt\)"),
        (ONE, "cat", "the label is 'cat'; write cls, txt, or json:FIELD"),
    ],
)
def test_labels_that_are_none_are_named(tmp_path: Path, content: dict[str, bytes], label: str, message: str) -> None:
    write_tar(tmp_path / "train-0.tar", content)
    with pytest.raises(DataError, match=message):
        index_shards(tmp_path, label=label)


def test_splits_come_from_info_from_folders_and_from_patterns(tmp_path: Path) -> None:
    for name in ("a/train/0.tar", "a/validation/0.tar", "b/x-train-0.tar", "b/x-validation-0.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / name, ONE)
    assert {n: s.shards[0].name for n, s in index_shards(tmp_path / "a").splits.items()} == {
        "train": "train/0.tar",
        "val": "validation/0.tar",
    }
    verify_shards(tmp_path / "a")
    info = {"splits": {n: {"filenames": [f"x-{n}-0.tar"]} for n in ("train", "validation")}}
    (tmp_path / "b/_info.json").write_text(json.dumps(info))
    assert list(index_shards(tmp_path / "b").splits) == ["train", "val"]
    for splits, message in (
        ({"a": "*.tar", "b": "x-train*"}, "'x-train-0.tar' is in two splits"),
        ({"a": "y-{0..2}.tar"}, "no file is named 'y-0.tar'"),
    ):
        with pytest.raises(DataError, match=message):
            index_shards(tmp_path / "b", splits=splits, out=tmp_path / "c")
    joined = read_index([str(tmp_path / "{a,b}")])
    loader = TrainLoader(
        [str(tmp_path / "{a,b}")], joined, data_config(train="train"), rank=0, ranks=1, batch_size=2, seed=0
    )
    assert next(loader.batches()).labels.tolist() == [0, 0]
    assert expand_places(str(tmp_path / "b/x-train-{0..1}.tar")) == [
        (str(tmp_path / "b"), ["x-train-0.tar", "x-train-1.tar"])
    ]
    with pytest.raises(DataError, match=r"its index has no shard 'x-train-1\.tar'"):
        read_index(str(tmp_path / "b/x-train-{0..1}.tar"))
    (tmp_path / "b/y.tar.gz").touch()
    with pytest.raises(DataError, match=r"'y\.tar\.gz' is a compressed archive; decompress it"):
        index_shards(tmp_path / "b", splits={"a": "*"}, out=tmp_path / "c")


def test_shards_behind_a_url_are_indexed_here(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    write_tar(tmp_path / "there/train-0.tar", ONE)
    server = Server(tmp_path / "there")
    with pytest.raises(DataError, match="name a folder for it with --out"):
        index_shards(server.url)
    options = {"splits": {"train": "train-{0..0}.tar"}, "out": tmp_path / "here"}
    index = index_shards(server.url, **options)  # type: ignore[arg-type]
    assert index.place == server.url
    for cache in (1.0, 0.0):
        config = data_config(train="train", cache_dir=str(tmp_path / "cache"), cache_gb=cache)
        loader = TrainLoader(tmp_path / "here", index, config, rank=0, ranks=1, batch_size=1, seed=0)
        assert next(loader.batches()).labels.tolist() == [0]
    server.close()


def joined(data: bytes) -> bytes:
    return data + tar_bytes({"b.jpg": b"B", "b.cls": b"1"})


def linked(data: bytes) -> bytes:
    stream = io.BytesIO(data)
    with tarfile.open(fileobj=stream, mode="a") as tar:
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    return stream.getvalue()


def test_what_lies_behind_the_end_is_an_error_and_what_nothing_reads_is_said(tmp_path: Path) -> None:
    path, said = tmp_path / "train-0.tar", list[str]()
    path.write_bytes(joined(tar_bytes(ONE)))
    with pytest.raises(DataError, match=r"train-0\.tar: this shard goes on behind its mark of the end, at byte 10240"):
        index_shards(tmp_path)
    path.write_bytes(linked(tar_bytes({**ONE, "README": b"x", "a.npy": b"x", "a.png": noise(0)})))
    commands: list[Callable[[], object]] = [
        lambda: index_shards(tmp_path, say=said.append),
        lambda: verify_shards(tmp_path, say=said.append),
    ]
    for command in commands:
        said.clear()
        command()
        assert sorted(line.partition("(")[0] for line in said) == [
            "passed over: 1 file .npy ",
            "passed over: 1 file .png ",
            "passed over: 1 file a link, a device or of another kind that is no file ",
            "passed over: 1 file of a name that belongs to no sample ",
        ]


def test_the_order_of_classes_is_named_and_shuffling_ends_it(tmp_path: Path) -> None:
    content, said = dict[str, bytes](), list[str]()
    for number in range(120):
        content |= {f"{number:03d}.png": noise(number), f"{number:03d}.cls": b"%d" % (number // 12)}
    (tmp_path / "sorted").mkdir()
    write_tar(tmp_path / "sorted/train-0.tar", content)
    before = index_shards(tmp_path / "sorted", say=said.append)
    assert "92 % of neighbours have the same label, and 10 % would by chance" in said[0]
    assert f"qsr shards shuffle {tmp_path / 'sorted'} OUT" in said[0]
    after = shuffle_shards(tmp_path / "sorted", tmp_path / "out", shard_bytes=50_000)
    both = [
        read_samples(folder, index, "train")
        for folder, index in ((tmp_path / "sorted", before), (tmp_path / "out", after))
    ]
    assert sorted((s.image, s.label) for s in both[0]) == sorted((s.image, s.label) for s in both[1])
    said.clear()
    assert index_shards(tmp_path / "out", again=True, say=said.append) == after
    assert said == []


def test_files_beside_the_images_of_a_folder_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"train/cat": 1})
    (tmp_path / "images/train/cat/b.webp").write_bytes(picture(8, 8, kind="WEBP"))
    for name in ("cat/c.gif", "cat/d.gif", "notes.txt"):
        (tmp_path / "images/train" / name).touch()
    said: list[str] = []
    index = write_imagefolder(tmp_path / "images", tmp_path / "out", say=said.append)
    assert index.splits["train"].samples == 2
    assert [line.partition(" (")[0] for line in said] == [
        "passed over: 1 file beside the classes",
        "passed over: 2 files .gif",
    ]


def test_a_short_read_is_no_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pread = tmp_path / "x", os.pread
    path.write_bytes(bytes(range(256)))
    monkeypatch.setattr("os.pread", lambda file, size, at: pread(file, min(size, 7), at))
    with open(path, "rb") as stream:
        assert read_at(stream.fileno(), 100, 30) == bytes(range(30, 130))
        assert read_at(stream.fileno(), 100, 200) == bytes(range(200, 256))
