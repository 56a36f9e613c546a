"""What every rank reads, in which order, and what happens with samples that cannot be read."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.batches import ImageBatch, decode_batch
from qsr_engine.data.checking import measure_shard
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index, Shard, Split
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.order import epoch_of, plan_epoch, plan_evaluation, samples_before
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.samples import Position, RawSample, Sample
from qsr_engine.data.streaming import Streamed, read_shard
from qsr_engine.data.tar_shard import TarShard
from qsr_engine.data.writing.folder import write_index
from qsr_engine.data.writing.shard import write_shard

ROOT = Path(__file__).parents[3]
SHA = "0" * 64
SIZES = [30, 1, 40, 29]  # samples in the shards of `numbered`: 100, and the label of a sample is its number


@cache
def noise(seed: int, mode: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=mode)
    return stream.getvalue()


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    """100 noise images in shards of uneven size; label and key of each are its number."""
    return shards_of(tmp_path_factory.mktemp("numbered"), SIZES)


def shards_of(folder: Path, sizes: list[int]) -> tuple[Path, Index]:
    shards, first = [], 0
    for shard, size in enumerate(sizes):
        samples = [(f"{n:08d}", "png", noise(n), n) for n in range(first, first + size)]
        shards.append(write_shard(folder / f"all-{shard:06d}.tar", samples))
        first += size
    return folder, Index(classes=None, splits={"all": Split(samples=first, shards=shards)})


def config(**changes: Any) -> DataConfig:
    values = {"shards": "unused", "train": "all", "eval": "all", "image_size": 8, "augment": "crop_flip"}
    return DataConfig(**{**values, "shuffle_buffer": 16, "retry_seconds": 1e-3, **changes})


def train_loader(data: tuple[Path, Index], **changes: Any) -> TrainLoader:
    options = {"rank": 0, "ranks": 2, "batch_size": 6, "seed": 0}
    own = {key: changes.pop(key) for key in list(changes) if key in options}
    return TrainLoader(*data, config(**changes), **{**options, **own})


def take(batches: Iterator[ImageBatch], number: int) -> list[ImageBatch]:
    return list(islice(batches, number))


def labels(batches: list[ImageBatch]) -> list[int]:
    return [int(label) for batch in batches for label in batch.labels]


def equal(left: list[ImageBatch], right: list[ImageBatch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels) and one.skipped == two.skipped
        for one, two in zip(left, right, strict=True)
    )


# ---------------------------------------------------------------------------------------------------- order


def split_of(sizes: list[int]) -> Split:
    shards = [Shard(name=f"s-{n}.tar", samples=size, bytes=1, sha256=SHA) for n, size in enumerate(sizes)]
    return Split(samples=sum(sizes), shards=shards)


def positions(slices: list[Any]) -> list[tuple[str, int]]:
    return [(piece.name, position) for piece in slices for position in range(piece.start, piece.stop)]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    ranks=st.integers(1, 9),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 40),
)
def test_the_ranks_of_an_epoch_read_every_sample_exactly_once(
    sizes: list[int], ranks: int, seed: int, epoch: int
) -> None:
    split = split_of(sizes)
    plans = [plan_epoch(split, seed, epoch, rank, ranks) for rank in range(ranks)]
    read = [position for plan in plans for position in positions(plan)]
    assert sorted(read) == sorted((shard.name, n) for shard in split.shards for n in range(shard.samples))
    lengths = [len(positions(plan)) for plan in plans]
    assert max(lengths) - min(lengths) <= 1
    for rank, length in enumerate(lengths):
        before, after = (samples_before(e, split.samples, rank, ranks) for e in (epoch, epoch + 1))
        assert after - before == length
    streams = [samples_before(epoch, split.samples, rank, ranks) for rank in range(ranks)]
    assert max(streams) - min(streams) <= 1, "streams never drift apart"


@given(samples=st.integers(1, 50), ranks=st.integers(1, 9), data=st.data())
def test_a_position_is_found_in_its_epoch(samples: int, ranks: int, data: st.DataObject) -> None:
    rank, position = data.draw(st.integers(0, ranks - 1)), data.draw(st.integers(0, 500))
    epoch, before = epoch_of(position, samples, rank, ranks)
    start, stop = (samples_before(e, samples, rank, ranks) for e in (epoch, epoch + 1))
    assert start <= position < stop
    assert before == position - start


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ranks=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    buffer=st.integers(1, 40),
)
def test_keys_really_read_are_every_sample_once_an_epoch_and_steps_are_equal(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], ranks: int, batch_size: int, buffer: int
) -> None:
    """Real tar files, read by real loaders, over three epochs and more; every rank takes the same number of steps."""
    data = shards_of(tmp_path_factory.mktemp("keys"), sizes)
    total = sum(sizes)
    steps = -(-3 * total // (ranks * batch_size)) + 1
    loaders = [
        TrainLoader(*data, config(shuffle_buffer=buffer), rank=r, ranks=ranks, batch_size=batch_size, seed=1)
        for r in range(ranks)
    ]
    streams = [keys(loader, steps * batch_size) for loader in loaders]
    for epoch in range(3):
        read: list[str] = []
        for rank, stream in enumerate(streams):
            start, stop = (samples_before(e, total, rank, ranks) for e in (epoch, epoch + 1))
            read += stream[start:stop]
        assert sorted(read) == [f"{number:08d}" for number in range(total)], epoch


def keys(loader: TrainLoader, number: int, start: int = 0) -> list[str]:
    """The keys of so many samples from a place in the rank's stream on, read from the tar files."""
    samples = [loader._source.load(item) for item in islice(loader.items(start), number)]
    assert all(isinstance(sample, Sample) for sample in samples)
    return [sample.key for sample in samples if isinstance(sample, Sample)]


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), ranks=st.integers(1, 9))
def test_evaluation_parts_cover_every_sample_once_and_in_order(sizes: list[int], ranks: int) -> None:
    split = split_of(sizes)
    parts = [positions(plan_evaluation(split, rank, ranks)) for rank in range(ranks)]
    everything = [(shard.name, n) for shard in split.shards for n in range(shard.samples)]
    assert [position for part in parts for position in part] == everything
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_unknown_split_is_refused(numbered: tuple[Path, Index]) -> None:
    with pytest.raises(DataError, match="no split 'al'; did you mean 'all'"):
        train_loader(numbered, train="al")


def test_only_samples_of_the_batch_are_read_and_only_shards_that_hold_them_are_opened(
    numbered: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read: list[int] = []
    at = TarShard.read

    class Opened(TarShard):
        def __init__(self, path: Path) -> None:
            opened.append(path.name)
            super().__init__(path)

        def read(self, number: int) -> RawSample:
            read.append(number)
            return at(self, number)

    monkeypatch.setattr("qsr_engine.data.sources.TarShard", Opened)
    loader = train_loader(numbered, rank=1, shuffle_buffer=10)
    next(loader.batches(3))
    assert len(read) == 6
    assert len(opened) == len(set(opened)) <= 3
    assert opened == list(
        dict.fromkeys(item.shard for item in islice(loader.items(18), 6) if isinstance(item, Position))
    )


# ------------------------------------------------------------------------------------------------- training


def test_an_epoch_over_all_ranks_has_no_sample_twice(numbered: tuple[Path, Index]) -> None:
    seen = [n for rank in range(2) for n in labels(take(train_loader(numbered, rank=rank, batch_size=5).batches(), 10))]
    assert sorted(seen) == list(range(100))


def test_batches_have_the_promised_shape_and_pixels(numbered: tuple[Path, Index]) -> None:
    for processes in (0, 2):
        loader = train_loader(numbered, ranks=1, batch_size=10, augment="none", loader_processes=processes)
        for images, batch_labels, skipped in take(loader.batches(), 2):
            assert (images.shape, images.dtype) == ((10, 3, 8, 8), torch.uint8)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert (batch_labels.shape, batch_labels.dtype) == ((10,), torch.int64)
            assert skipped == ()
            pixels = np.asarray(Image.open(io.BytesIO(noise(int(batch_labels[3])))))
            assert np.array_equal(images[3].permute(1, 2, 0).numpy(), pixels)


def test_order_and_augmentation_depend_on_seed_epoch_and_rank(numbered: tuple[Path, Index]) -> None:
    once = take(train_loader(numbered).batches(), 16)
    assert equal(once, take(train_loader(numbered).batches(), 16))
    assert labels(once[:8]) != labels(once[8:])
    assert labels(once) != labels(take(train_loader(numbered, seed=1).batches(), 16))
    assert labels(once) != labels(take(train_loader(numbered, rank=1).batches(), 16))


def test_the_buffer_shuffles_within_the_part_of_the_rank(numbered: tuple[Path, Index]) -> None:
    shuffled = labels(take(train_loader(numbered, batch_size=5, shuffle_buffer=48).batches(), 10))
    as_read = labels(take(train_loader(numbered, batch_size=5, shuffle_buffer=1).batches(), 10))
    assert shuffled != as_read
    assert sorted(shuffled) == sorted(as_read)


def test_the_same_image_is_augmented_differently_in_another_epoch(numbered: tuple[Path, Index]) -> None:
    batches = take(train_loader(numbered, ranks=1, batch_size=50).batches(), 4)
    first, second = (
        {int(n): image for batch in part for image, n in zip(batch.images, batch.labels, strict=True)}
        for part in (batches[:2], batches[2:])
    )
    same = sum(torch.equal(image, second[number]) for number, image in first.items())
    assert same < 30  # of 100; one of 18 crops and flips is drawn twice by chance


def test_no_two_batches_are_augmented_with_the_same_random_numbers(
    numbered: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def decode(samples: Any, decoder: Any, seed: int, *_: Any, **__: Any) -> tuple[list[int], tuple[str, ...]]:
        seeds.append(seed)
        return [0], ()

    monkeypatch.setattr("qsr_engine.data.loader.decode_batch", decode)
    for rank in range(2):
        for seed in range(2):
            take(train_loader(numbered, rank=rank, seed=seed).batches(), 24)
    assert len(set(seeds)) == len(seeds) == 96


@pytest.mark.parametrize("start", [1, 7, 8, 19])
def test_resuming_at_a_batch_gives_the_batches_from_there(numbered: tuple[Path, Index], start: int) -> None:
    whole = take(train_loader(numbered).batches(), start + 4)
    assert equal(take(train_loader(numbered).batches(start), 4), whole[start:])


def test_batches_before_start_are_not_decoded(numbered: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def decode(samples: Any, decoder: Any, seed: int, *rest: Any, **options: Any) -> Any:
        decoded.append(seed)
        return decode_batch(samples, decoder, seed, *rest, **options)

    monkeypatch.setattr("qsr_engine.data.loader.decode_batch", decode)
    next(train_loader(numbered).batches(7))
    assert len(decoded) == 1


def test_loading_leaves_the_random_state_of_the_process_alone(numbered: tuple[Path, Index]) -> None:
    for processes in (0, 1):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        take(train_loader(numbered, loader_processes=processes).batches(), 3)
        list(EvalLoader(*numbered, config(loader_processes=processes), rank=0, ranks=1, batch_size=60))
        assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_does_not_depend_on_the_random_state_of_the_process(numbered: tuple[Path, Index]) -> None:
    torch.manual_seed(1)
    once = take(train_loader(numbered).batches(), 3)
    torch.manual_seed(2)
    assert equal(once, take(train_loader(numbered).batches(), 3))


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_processes_give_bit_identical_batches(numbered: tuple[Path, Index], processes: int) -> None:
    for start in (0, 5):
        alone = take(train_loader(numbered).batches(start), 12)  # goes on into another epoch
        assert equal(take(train_loader(numbered, loader_processes=processes).batches(start), 12), alone)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_loader_processes_end_with_a_rank_that_is_killed(numbered: tuple[Path, Index], tmp_path: Path) -> None:
    """They once went on for ever: torch watches the parent, which is the fork server, and that waited for them."""
    write_index(numbered[0], numbered[1])
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, str(script), str(numbered[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == b"ready\n"
        servers = children(rank.pid)
        below = servers + [process for server in servers for process in children(server)]
        assert len(below) == 4  # the resource tracker, the fork server and two loader processes
        rank.kill()
    deadline = time.monotonic() + 15
    while (left := [process for process in below if running(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


RANK = """
import sys, time
from qsr_engine.config import DataConfig
from qsr_engine.data import read_index
from qsr_engine.data.loader import TrainLoader

if __name__ == "__main__":
    config = DataConfig(shards=sys.argv[1], train="all", image_size=8, loader_processes=2)
    options = {"rank": 0, "ranks": 1, "batch_size": 10, "seed": 0}
    batches = TrainLoader(sys.argv[1], read_index(sys.argv[1]), config, **options).batches()
    next(batches)
    print("ready", flush=True)
    time.sleep(60)
"""


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("processes", [1, 3])
def test_a_rank_may_keep_batches(numbered: tuple[Path, Index], processes: int) -> None:
    """A batch lies in memory that is used again, but not while somebody has it or a part of it."""
    alone = take(train_loader(numbered).batches(), 30)
    batches = train_loader(numbered, loader_processes=processes).batches()
    kept, rows = [], []
    for number in range(30):
        batch = next(batches)
        if number % 3 == 0:
            kept.append(batch)
        else:
            rows.append((number, batch.images[2, 1]))
    assert equal(kept, alone[::3])
    assert all(torch.equal(row, alone[number].images[2, 1]) for number, row in rows)


def test_batches_outlive_the_loader(numbered: tuple[Path, Index]) -> None:
    batches = train_loader(numbered, loader_processes=2).batches()
    first = next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert equal([first], take(train_loader(numbered).batches(), 1))


def test_memory_is_used_again(numbered: tuple[Path, Index]) -> None:
    places = {batch.images.data_ptr() for batch in islice(train_loader(numbered, loader_processes=2).batches(), 40)}
    assert len(places) <= 6, "two processes of three slots each"


def test_more_loader_processes_than_shards_and_batches(tmp_path: Path) -> None:
    data = shards_of(tmp_path, [3])
    alone = take(train_loader(data, ranks=1, batch_size=2).batches(), 9)
    assert equal(take(train_loader(data, ranks=1, batch_size=2, loader_processes=5).batches(), 9), alone)
    assert len(list(EvalLoader(*data, config(loader_processes=5), rank=0, ranks=1, batch_size=2))) == 2


def test_a_loader_process_that_is_killed_is_an_error(numbered: tuple[Path, Index]) -> None:
    batches = train_loader(numbered, loader_processes=1).batches()
    next(batches)
    own = [process for process in multiprocessing.active_children() if process.name.startswith("ForkServerProcess")]
    for process in own:
        os.kill(process.pid or 0, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader process was ended by SIGKILL; was it killed, perhaps"):
        take(batches, 10)


def test_a_failure_of_ours_has_its_traceback(numbered: tuple[Path, Index]) -> None:
    loader = train_loader(numbered, loader_processes=1)
    loader._decoder.choose = broken_view
    with pytest.raises(RuntimeError, match=r"(?s)a loader process failed:.*in broken_view.*division by zero"):
        next(loader.batches())


def broken_view(width: int, height: int, random: Any) -> Any:
    return 1 / 0


# ------------------------------------------------------------------------------- both ways of reading, and URLs


def test_the_webdataset_library_gives_the_same_samples_in_the_same_order(numbered: tuple[Path, Index]) -> None:
    folder, index = numbered
    slices = plan_epoch(index.split("all"), 3, 1, 1, 2)
    streamed = Streamed(str, lambda name: (folder / name).open("rb"), 100)
    random_access = RandomAccess(lambda name: TarShard(folder / name), 100)
    one, other = ([source.load(item) for item in source.items(slices)] for source in (streamed, random_access))
    assert [(s.key, s.image, s.label) for s in one if isinstance(s, Sample)] == [
        (s.key, s.image, s.label) for s in other if isinstance(s, Sample)
    ]
    assert len(one) == 50


NAMES = [
    "a.jpg",
    "a.cls",
    "b.c.jpg",
    "b.cls",
    "B.CLS",
    "d/e.jpg",
    "d/e.cls",
    "d.f/g.cls",
    "./h.cls",
    ".i",
    "j",
    "__k__.x",
]
NAMES += [
    "__l__/m.cls",
    "n..cls",
    "o.",
    "d/.p",
    "q" * 99 + ".jpg",
    "r" * 150 + ".jpg",
    "s" * 90 + "/" + "t" * 90 + ".cls",
]


@settings(max_examples=200, deadline=None)
@given(names=st.lists(st.sampled_from(NAMES), max_size=8, unique=True), format=st.sampled_from([0, 1, 2]))
def test_members_are_grouped_as_webdataset_groups_them(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], format: int
) -> None:
    path = tmp_path_factory.mktemp("names") / "all-000000.tar"
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
    try:
        expected = [dict(raw.members, __key__=raw.key) for raw in read_shard(path)]
    except DataError as error:
        expected = [{"error": str(error)}]
    shard = TarShard(path)
    found = [shard.read(number) for number in range(len(shard.samples))]
    if "error" in (expected[0] if expected else {}):
        with pytest.raises(DataError) as raised:
            shard.read(len(shard.samples))
        assert str(raised.value) == expected[0]["error"]
    else:
        assert [dict(raw.members, __key__=raw.key) for raw in found] == expected


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


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "all-000000.tar"
    write_shard(path, [(key, "png", noise(0), 0) for key in ("a", "b", "a")])
    for read in (lambda: list(read_shard(path)), lambda: TarShard(path).read(2)):
        with pytest.raises(
            DataError, match=r"all-000000\.tar: this shard .* past sample 2: the key 'a' is there twice"
        ):
            read()


# ----------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("processes", [0, 2])
def test_evaluation_sees_every_sample_once_in_order(numbered: tuple[Path, Index], processes: int) -> None:
    loaders = [
        EvalLoader(*numbered, config(loader_processes=processes), rank=rank, ranks=3, batch_size=8) for rank in range(3)
    ]
    parts = [list(loader) for loader in loaders]
    assert [label for part in parts for label in labels(part)] == list(range(100))
    assert [[len(batch.images) for batch in part] for part in parts] == [[8] * 4 + [1], [8] * 4 + [1], [8] * 4 + [2]]
    assert all(equal(list(loader), part) for loader, part in zip(loaders, parts, strict=True))


def test_a_rank_may_have_nothing_to_evaluate(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "all-000000.tar", [("a", "png", noise(0), 0)])
    index = Index(classes=["only"], splits={"all": Split(samples=1, shards=[shard])})
    sizes = [len(list(EvalLoader(tmp_path, index, config(), rank=r, ranks=3, batch_size=4))) for r in range(3)]
    assert sorted(sizes) == [0, 0, 1]


# ------------------------------------------------------------------------------------------- broken samples

LABEL = {"k7.cls": b"1"}
IMAGE = {"k7.png": noise(7)}
BROKEN = {
    "no label": (IMAGE, "has no label"),
    "no image": (LABEL, "has no image"),
    "word": (IMAGE | {"k7.cls": b"cat"}, "has the label b'cat'; a label is a whole number"),
    "negative": (IMAGE | {"k7.cls": b"-1"}, "has the label b'-1'; a label is a whole number"),
    "huge": (IMAGE | {"k7.cls": b"9" * 5000}, "a label is a whole number"),
    "class": (IMAGE | {"k7.cls": b"10"}, r"has the label 10, and there are 10 classes \(0 to 9\)"),
    "not an image": (LABEL | {"k7.jpg": b"hello"}, "does not decode as JPEG or PNG"),
    "truncated jpeg": (LABEL | {"k7.jpg": noise(7, "JPEG")[:-200]}, "does not decode as JPEG or PNG"),
    "truncated png": (LABEL | {"k7.png": noise(7)[:-40]}, "does not decode as JPEG or PNG"),
    "other format": (LABEL | {"k7.png": noise(7, "GIF")}, "does not decode as JPEG or PNG"),
}


def broken_data(folder: Path, sample: dict[str, bytes], good: int = 6) -> tuple[Path, Index]:
    """One shard with good samples before and after a broken one, k7; the index knows 10 classes."""
    path = folder / "all-000000.tar"
    with tarfile.open(path, "w") as tar:
        before = [{f"a{n}.cls": b"0", f"a{n}.png": noise(n)} for n in range(good)]
        for members in [*before, sample, {"z.cls": b"0", "z.png": noise(0)}]:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shards = [measure_shard(path, good + 2)]
    return folder, Index(classes=list("0123456789"), splits={"all": Split(samples=good + 2, shards=shards)})


def evaluate(data: tuple[Path, Index], processes: int = 0) -> list[ImageBatch]:
    return list(EvalLoader(*data, config(loader_processes=processes), rank=0, ranks=1, batch_size=2))


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


@pytest.mark.parametrize("case", ["no label", "truncated jpeg"])
@pytest.mark.parametrize("read", [evaluate, train])
def test_the_error_of_a_loader_process_is_as_plain(
    tmp_path: Path, case: str, read: Callable[[tuple[Path, Index], int], list[ImageBatch]]
) -> None:
    data = broken_data(tmp_path, BROKEN[case][0])
    messages = []
    for processes in (0, 2):
        with pytest.raises(DataError) as raised:
            read(data, processes)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]


def test_batches_before_a_broken_image_are_given(tmp_path: Path) -> None:
    data = broken_data(tmp_path, BROKEN["not an image"][0])
    for processes in (0, 2):
        batches = iter(EvalLoader(*data, config(loader_processes=processes), rank=0, ranks=1, batch_size=2))
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


def test_a_missing_shard_and_one_that_is_no_tar_file_are_named(tmp_path: Path) -> None:
    folder, index = broken_data(tmp_path, IMAGE | LABEL)
    path = folder / "all-000000.tar"
    path.write_bytes(b"hello, world" * 1000)
    with pytest.raises(DataError, match=r"all-000000\.tar: this shard cannot be read past sample 0: it is truncated"):
        evaluate((folder, index))
    path.unlink()
    with pytest.raises(DataError, match=r"all-000000\.tar: this shard cannot be read past sample 0: No such file"):
        evaluate((folder, index))


def test_a_shard_with_fewer_samples_than_its_index_says_is_named(tmp_path: Path) -> None:
    folder, index = broken_data(tmp_path, IMAGE | LABEL)
    shard = index.splits["all"].shards[0].model_copy(update={"samples": 9})
    more = Index(classes=None, splits={"all": Split(samples=9, shards=[shard])})
    with pytest.raises(DataError, match=r"all-000000\.tar: this shard ends after 8 samples"):
        evaluate((folder, more))


def test_a_shard_name_is_never_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by reading webdataset's gopen: it gives what follows `pipe:` to a shell."""
    monkeypatch.chdir(tmp_path)
    folder = Path("pipe:touch hit;#")
    folder.mkdir()
    write_index(folder, broken_data(folder, IMAGE | LABEL)[1])
    evaluate((folder, broken_data(folder, IMAGE | LABEL)[1]))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


# ------------------------------------------------------------------------------------------- skipping bad samples


@pytest.mark.parametrize(
    ("case", "processes"), [*((case, 0) for case in BROKEN), ("no label", 2), ("truncated jpeg", 2)]
)
def test_a_bad_sample_is_skipped_where_that_is_allowed(tmp_path: Path, case: str, processes: int) -> None:
    data = broken_data(tmp_path, BROKEN[case][0])
    options = config(max_bad_samples=2, loader_processes=processes)
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
    streamed = Streamed(str, lambda name: (tmp_path / name).open("rb"), None)
    random_access = RandomAccess(lambda name: TarShard(tmp_path / name), None)
    slices = plan_evaluation(data[1].split("all"), 0, 1)
    for source in (streamed, random_access):
        found = [source.load(item) for item in source.items(slices)]
        assert len(found) == 12
        good = [sample.label for sample in found if isinstance(sample, Sample)]
        assert good == list(range(len(good)))
        assert 6 < len(good) < 12
        assert all("all-000001.tar: " in str(error) for error in found[len(good) :])
    loader = TrainLoader(*data, config(max_bad_samples=6), rank=0, ranks=1, batch_size=6, seed=0)
    assert sum(len(batch.skipped) for batch in take(loader.batches(), 2)) == 12 - len(good)


def test_micro_batches_of_one_skip_too(tmp_path: Path) -> None:
    """The picture that stands in is that of the next good sample, for any number of loader processes."""
    data = broken_data(tmp_path, BROKEN["not an image"][0])
    found = []
    for processes in (0, 2):
        options = config(max_bad_samples=1, loader_processes=processes, augment="none")
        loader = TrainLoader(*data, options, rank=0, ranks=1, batch_size=1, seed=0)
        found.append(take(loader.batches(), 16))
    assert equal(*found)
    assert sum(len(batch.skipped) for batch in found[0]) == 2
    place = next(number for number, batch in enumerate(found[0]) if batch.skipped)
    assert torch.equal(found[0][place].images, found[0][place + 1].images)


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


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM])
def test_loader_processes_end_whatever_they_do_with_signals(numbered: tuple[Path, Index], number: int) -> None:
    """A stopped process does not see SIGTERM; the rank once waited for it at the end of an evaluation."""
    before = set(multiprocessing.active_children())
    batches = train_loader(numbered, loader_processes=1).batches()
    next(batches)
    (own,) = set(multiprocessing.active_children()) - before
    if number == signal.SIGSTOP:
        os.kill(own.pid or 0, number)
    started = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 5
    assert not own.is_alive()
