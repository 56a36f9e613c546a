"""Samples and shards that are broken: named, or skipped with as many batches as before."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data import index_shards
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.order import plan_evaluation
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.remote import ShardStream
from qsr_engine.data.retrying import Retry
from qsr_engine.data.samples import Sample
from qsr_engine.data.streaming import Streamed
from qsr_engine.data.table import open_table
from qsr_engine.data.tar_shard import TarShard
from qsr_engine.data.writing.shard import write_shard
from tests.support.bucket import bucket
from tests.support.loading import data_config, equal, labels, load, take, train_loader
from tests.support.shard_files import indexed, noise, shards_of, write_tar

LABEL = {"k7.cls": b"1"}
IMAGE = {"k7.png": noise(7)}
BROKEN = {  # what has no label or no image has no row, and is refused by `qsr shards index`
    "class": (IMAGE | {"k7.cls": b"10"}, r"has the label 10, and there are 10 classes \(0 to 9\)"),
    "not an image": (LABEL | {"k7.jpg": b"hello"}, "does not decode as JPEG, PNG or WebP"),
    "truncated jpeg": (LABEL | {"k7.jpg": noise(7, "JPEG")[:-200]}, "does not decode as JPEG, PNG or WebP"),
    "damaged jpeg": (LABEL | {"k7.jpg": b"\xff\xd8" + noise(7, "JPEG")[300:]}, "does not decode as JPEG, PNG or WebP"),
    "truncated png": (LABEL | {"k7.png": noise(7)[:-40]}, "does not decode as JPEG, PNG or WebP"),
    "other format": (LABEL | {"k7.png": noise(7, "GIF")}, "does not decode as JPEG, PNG or WebP"),
}


def broken_data(folder: Path, sample: dict[str, bytes], good: int = 6) -> tuple[Path, Index]:
    """One shard with good samples before and after a broken one, k7; the index knows 10 classes."""
    content: dict[str, bytes] = {}
    for members in [{f"a{n}.cls": b"0", f"a{n}.png": noise(n)} for n in range(good)]:
        content |= members
    write_tar(folder / "all-000000.tar", {**content, **sample, "z.cls": b"0", "z.png": noise(0)})
    index = index_shards(folder, say=lambda _: None)
    return folder, index.model_copy(update={"classes": list("0123456789")})


def evaluate(data: tuple[Path, Index], processes: int = 0) -> list[ImageBatch]:
    return list(EvalLoader(*data, data_config(loader_processes=processes), rank=0, ranks=1, batch_size=2))


def train(data: tuple[Path, Index], processes: int = 0) -> list[ImageBatch]:
    samples = data[1].splits["all"].samples
    loader = train_loader(data, ranks=1, batch_size=1, loader_processes=processes)
    return take(loader.batches(), samples)


@pytest.mark.parametrize("read", [evaluate, train])
@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_sample_is_named_with_its_shard(
    tmp_path: Path, case: str, read: Callable[[tuple[Path, Index]], list[ImageBatch]]
) -> None:
    sample, message = BROKEN[case]
    with pytest.raises(DataError, match=rf"all-000000\.tar: sample 'k7' .*{message}|sample 'k7' {message}"):
        read(broken_data(tmp_path, sample))


@pytest.mark.parametrize("case", ["class", "truncated jpeg"])
def test_the_error_of_a_loader_process_is_as_plain(tmp_path: Path, case: str) -> None:
    data = broken_data(tmp_path, BROKEN[case][0])
    messages = []
    for processes in (0, 2):
        with pytest.raises(DataError) as raised:
            train(data, processes)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]


def test_batches_before_a_broken_image_are_given(tmp_path: Path) -> None:
    data = broken_data(tmp_path, BROKEN["not an image"][0])
    for processes in (0, 2):
        batches = iter(EvalLoader(*data, data_config(loader_processes=processes), rank=0, ranks=1, batch_size=2))
        assert len(take(batches, 3)) == 3
        with pytest.raises(DataError, match="'k7'"):
            next(batches)


def test_a_shard_cut_anywhere_is_a_data_error(tmp_path: Path) -> None:
    """tarfile takes some cuts for the end of the archive and says nothing; the count of samples finds those."""
    folder, index = broken_data(tmp_path, IMAGE | LABEL)
    path = folder / "all-000000.tar"
    whole = path.read_bytes()
    assert labels(evaluate((folder, index))) == [0, 0, 0, 0, 0, 0, 1, 0]
    last = whole.index(b"z.png")  # the header of the last member; its data follow after 512 bytes
    for length in [0, 1, 511, 512, 700, 1024, 1100, 5000, *range(512, last + 513, 512)]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"all-000000\.tar: "):
            evaluate((folder, index))
        path.write_bytes(whole)


def test_a_missing_shard_and_one_that_is_no_tar_file_are_named(tmp_path: Path) -> None:
    folder, index = broken_data(tmp_path, IMAGE | LABEL)
    path = folder / "all-000000.tar"
    path.write_bytes(b"hello, world" * 1000)
    with pytest.raises(DataError, match=r"all-000000\.tar: this shard (has no image|cannot be read past)"):
        evaluate((folder, index))
    path.unlink()
    with pytest.raises(DataError, match=r"all-000000\.tar: this shard cannot be read past sample 0: No such file"):
        evaluate((folder, index))


def test_an_index_without_a_table_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    folder, index = broken_data(tmp_path, IMAGE | LABEL)
    older = index.model_copy(update={"table": None})
    with pytest.raises(DataError, match=r"its index has no samples\.npy, .*`qsr shards index /.* --again` makes one"):
        evaluate((folder, older))


@pytest.mark.parametrize(("case", "processes"), [*((case, 0) for case in BROKEN), ("truncated jpeg", 2)])
def test_a_bad_sample_is_skipped_where_that_is_allowed(tmp_path: Path, case: str, processes: int) -> None:
    data = broken_data(tmp_path, BROKEN[case][0])
    options = data_config(max_bad_samples=2, loader_processes=processes)
    loader = TrainLoader(*data, options, rank=0, ranks=1, batch_size=4, seed=0)
    batches = take(loader.batches(), 4)  # two epochs: the sample is bad in both
    assert [len(batch.labels) for batch in batches] == [4] * 4
    skipped = [text for batch in batches for text in batch.skipped]
    assert len(skipped) == 2
    assert all(re.search(BROKEN[case][1], text) and "'k7'" in text for text in skipped)
    assert len(take(loader.batches(), 20)) == 20, "the same sample counts once, in however many epochs"
    with pytest.raises(DataError, match=r"'k7'.* is bad sample number 3 of this rank, and data\.max_bad_samples is 2"):
        take(loader.batches(skipped=["one", "another"]), 2)
    evaluated = list(EvalLoader(*data, options, rank=0, ranks=1, batch_size=3))
    assert labels(evaluated) == [0, 0, 0, 0, 0, 0, -1, 0]
    assert [len(batch.skipped) for batch in evaluated] == [0, 0, 1]


def test_the_rest_of_a_truncated_shard_is_skipped_where_that_is_allowed(tmp_path: Path) -> None:
    data = shards_of(tmp_path, [6, 6])
    path = tmp_path / "all-000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    table = open_table(tmp_path / "samples.npy", data[1])
    random_access = RandomAccess(lambda name: TarShard(tmp_path / name), table, None)
    sizes = {shard.name: shard.bytes for shard in data[1].split("all").shards}
    slices = plan_evaluation(data[1].split("all"), 0, 1)
    with bucket(tmp_path, "s3") as (url, _):
        streamed = Streamed(
            lambda name, start: ShardStream(f"{url}/{name}", sizes[name], start), table, url, None, Retry(0)
        )
        of_both = [[source.load(item) for item in source.items(slices)] for source in (streamed, random_access)]
    for found in of_both:
        assert len(found) == 12
        good = [sample.label for sample in found if isinstance(sample, Sample)]
        assert good == list(range(len(good)))
        assert 6 < len(good) < 12
        assert all("all-000001.tar: " in str(error) for error in found[len(good) :])
    loader = TrainLoader(*data, data_config(max_bad_samples=6), rank=0, ranks=1, batch_size=6, seed=0)
    assert sum(len(batch.skipped) for batch in take(loader.batches(), 2)) == 12 - len(good)


def test_micro_batches_of_one_skip_too(tmp_path: Path) -> None:
    """The picture that stands in is that of the next good sample, for any number of loader processes."""
    data = broken_data(tmp_path, BROKEN["not an image"][0])
    found = []
    for processes in (0, 2):
        options = data_config(max_bad_samples=1, loader_processes=processes, augment="none")
        loader = TrainLoader(*data, options, rank=0, ranks=1, batch_size=1, seed=0)
        found.append(take(loader.batches(), 16))
    assert equal(*found)
    assert sum(len(batch.skipped) for batch in found[0]) == 2
    place = next(number for number, batch in enumerate(found[0]) if batch.skipped)
    assert torch.equal(found[0][place].images, found[0][place + 1].images)


def corrupt(path: Path) -> None:
    """Overwrite 2 KiB in the middle: a header among them."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xa5" * 2048)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FAULTS: dict[str, Callable[[Path], None]] = {"corrupt": corrupt, "truncated": truncate, "missing": Path.unlink}


@pytest.mark.filterwarnings("ignore:.*trying again", "ignore:skipped")
@pytest.mark.parametrize("opened", [False, True], ids=["before", "while open"])
@pytest.mark.parametrize(("fault", "processes"), [*((fault, 0) for fault in FAULTS), ("truncated", 2)])
def test_both_ranks_give_as_many_full_batches_and_good_samples_do_not_change(
    data: tuple[Path, Index], fault: str, processes: int, opened: bool
) -> None:
    steps = 18  # three epochs of 6 batches a rank
    whole = [list(islice(load(data, rank, 2).batches(), steps)) for rank in range(2)]
    options: dict[str, Any] = {"max_bad_samples": 12, "loader_processes": processes, "retries": 1}
    streams = [load(data, rank, 2, **options).batches() for rank in range(2)]
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
    index = indexed(
        folder,
        [write_shard(folder / f"all-{n:06d}.tar", [(f"{i}", "png", noise(i), n) for i in range(100)]) for n in (0, 1)],
    )
    (folder / "all-000001.tar").unlink()
    options = {"shuffle_buffer": 1, "retries": 0}
    found = list(islice(load((folder, index), max_bad_samples=100, **options).batches(), 100))
    assert sum(len(batch.skipped) for batch in found) == 200
    assert set(labels(found)) == {0}
    with pytest.raises(DataError, match=r"bad|limit"):
        list(islice(load((folder, index), max_bad_samples=99, **options).batches(), 100))


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_evaluation_counts_what_is_gone(data: tuple[Path, Index]) -> None:
    (data[0] / "all-000003.tar").unlink()
    config = DataConfig(shards="unused", eval="all", image_size=8, max_bad_samples=12, retries=1, retry_seconds=0.01)
    parts = [list(EvalLoader(*data, config, rank=rank, ranks=2, batch_size=5)) for rank in range(2)]
    assert [len(part) for part in parts] == [5, 5]
    assert [labels(part).count(-1) for part in parts] == [0, 12]
