"""What every rank reads, in which order, and what happens with samples that cannot be read."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qsr_engine.config import DataConfig
from qsr_engine.data import decoding, shards
from qsr_engine.data.index import DataError, Index, Shard, Split, measure_shard, write_index
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.order import plan_epoch, plan_evaluation
from qsr_engine.data.shards import read_shard, read_slices, write_shard

ROOT = Path(__file__).parents[2]
SHA = "0" * 64
SIZES = [30, 1, 40, 29]  # samples in the shards of `numbered`: 100, and the label of a sample is its number
Batch = tuple[torch.Tensor, torch.Tensor]


def noise(seed: int, mode: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=mode)
    return stream.getvalue()


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    """100 noise images in shards of uneven size; label and key of each are its number."""
    folder = tmp_path_factory.mktemp("numbered")
    shards, first = [], 0
    for shard, size in enumerate(SIZES):
        samples = [(f"{n:08d}", "png", noise(n), n) for n in range(first, first + size)]
        shards.append(write_shard(folder / f"all-{shard:06d}.tar", samples))
        first += size
    return folder, Index(classes=None, splits={"all": Split(samples=100, shards=shards)})


def config(**changes: Any) -> DataConfig:
    values = {"shards": "unused", "train": "all", "eval": "all", "image_size": 8, "augment": "crop_flip"}
    return DataConfig(**{**values, "shuffle_buffer": 16, **changes})


def train_loader(data: tuple[Path, Index], **changes: Any) -> TrainLoader:
    options = {"rank": 0, "ranks": 2, "batch_size": 6, "batches_per_epoch": 8, "seed": 0}
    own = {key: changes.pop(key) for key in list(changes) if key in options}
    return TrainLoader(*data, config(**changes), **{**options, **own})


def take(batches: Iterator[Batch], number: int) -> list[Batch]:
    return list(islice(batches, number))


def labels(batches: list[Batch]) -> list[int]:
    return [int(label) for _, batch in batches for label in batch]


def equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True)
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
    ranks=st.integers(1, 5),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_ranks_read_disjoint_parts_of_equal_size(
    sizes: list[int], ranks: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    split = split_of(sizes)
    per_rank = data.draw(st.integers(0, split.samples // ranks))
    plans = [plan_epoch(split, seed, epoch, rank, ranks, per_rank) for rank in range(ranks)]
    read = [position for plan in plans for position in positions(plan)]
    assert [len(positions(plan)) for plan in plans] == [per_rank] * ranks
    assert len(set(read)) == len(read) == ranks * per_rank
    assert set(read) <= {(shard.name, n) for shard in split.shards for n in range(shard.samples)}
    assert plans == [plan_epoch(split, seed, epoch, rank, ranks, per_rank) for rank in range(ranks)]


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), ranks=st.integers(1, 9))
def test_evaluation_parts_cover_every_sample_once_and_in_order(sizes: list[int], ranks: int) -> None:
    split = split_of(sizes)
    parts = [positions(plan_evaluation(split, rank, ranks)) for rank in range(ranks)]
    everything = [(shard.name, n) for shard in split.shards for n in range(shard.samples)]
    assert [position for part in parts for position in part] == everything
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_left_out_differs_from_epoch_to_epoch_even_in_one_shard() -> None:
    split = split_of([10])
    left_out = {
        frozenset(range(10)) - {n for r in range(3) for _, n in positions(plan_epoch(split, 0, epoch, r, 3, 3))}
        for epoch in range(100)
    }
    assert len(left_out) == 10


def test_an_epoch_that_is_too_long_or_has_no_batch_is_refused(numbered: tuple[Path, Index]) -> None:
    with pytest.raises(DataError, match="needs 104 samples, and the split has 100"):
        train_loader(numbered, batch_size=52, batches_per_epoch=1)
    with pytest.raises(DataError, match="an epoch has 0 batches of 6 samples"):
        train_loader(numbered, batches_per_epoch=0)
    with pytest.raises(DataError, match="no split 'al'; did you mean 'all'"):
        train_loader(numbered, train="al")


def test_keys_really_read_from_tar_files_are_disjoint(numbered: tuple[Path, Index]) -> None:
    folder, index = numbered
    for epoch in range(3):
        keys = [
            sample.key
            for rank in range(3)
            for sample in read_slices(folder, plan_epoch(index.split("all"), 5, epoch, rank, 3, 33), None)
        ]
        assert len(keys) == len(set(keys)) == 99


def test_only_shards_of_the_range_are_opened_and_samples_before_it_are_not_parsed(
    numbered: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    parsed: list[str] = []

    def reading(path: Path) -> Iterator[dict[str, Any]]:
        opened.append(path.name)
        return read_shard(path)

    def parsing(path: Path, raw: dict[str, Any], classes: int | None) -> str:
        parsed.append(raw["__key__"])
        return ""

    monkeypatch.setattr(shards, "read_shard", reading)
    monkeypatch.setattr(shards, "parse_sample", parsing)
    folder, index = numbered
    list(shards.read_slices(folder, plan_evaluation(index.split("all"), 1, 3), None))  # samples 33 to 65
    assert opened == ["all-000002.tar"]
    assert parsed == [f"{number:08d}" for number in range(33, 66)]


# ------------------------------------------------------------------------------------------------- training


def test_an_epoch_over_all_ranks_has_no_sample_twice(numbered: tuple[Path, Index]) -> None:
    seen = [label for rank in range(2) for label in labels(take(train_loader(numbered, rank=rank).batches(), 8))]
    assert len(seen) == len(set(seen)) == 96


def test_batches_have_the_promised_shape_and_scale(numbered: tuple[Path, Index]) -> None:
    loader = train_loader(numbered, ranks=1, batch_size=10, batches_per_epoch=10, augment="none", image_size=8)
    for images, batch_labels in take(loader.batches(), 2):
        assert (images.shape, images.dtype) == ((10, 3, 8, 8), torch.float32)
        assert (batch_labels.shape, batch_labels.dtype) == ((10,), torch.int64)
        pixels = np.asarray(Image.open(io.BytesIO(noise(int(batch_labels[3]))))) / 255
        expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(images[3].numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_order_and_augmentation_depend_on_seed_epoch_and_rank(numbered: tuple[Path, Index]) -> None:
    once = take(train_loader(numbered).batches(), 16)
    assert equal(once, take(train_loader(numbered).batches(), 16))
    assert labels(once[:8]) != labels(once[8:])
    assert labels(once) != labels(take(train_loader(numbered, seed=1).batches(), 16))
    assert labels(once) != labels(take(train_loader(numbered, rank=1).batches(), 16))


def test_the_buffer_shuffles_within_the_part_of_the_rank(numbered: tuple[Path, Index]) -> None:
    shuffled = labels(take(train_loader(numbered, shuffle_buffer=48).batches(), 8))
    as_read = labels(take(train_loader(numbered, shuffle_buffer=1).batches(), 8))
    assert shuffled != as_read
    assert sorted(shuffled) == sorted(as_read)


def test_the_same_image_is_augmented_differently_in_another_epoch(numbered: tuple[Path, Index]) -> None:
    batches = take(train_loader(numbered, ranks=1, batch_size=50, batches_per_epoch=2).batches(), 4)
    first, second = (
        {int(n): image for pair in part for image, n in zip(*pair, strict=True)} for part in (batches[:2], batches[2:])
    )
    same = sum(torch.equal(image, second[number]) for number, image in first.items())
    assert same < 30  # of 100; one of 18 crops and flips is drawn twice by chance


def test_no_two_batches_are_augmented_with_the_same_random_numbers(
    numbered: tuple[Path, Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def decode(samples: Any, transform: Any, seed: int) -> Batch:
        seeds.append(seed)
        return torch.empty(0), torch.empty(0)

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

    def decode(samples: Any, transform: Any, seed: int) -> Batch:
        decoded.append(seed)
        return decoding.decode_batch(samples, transform, seed)

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
    options = {"rank": 0, "ranks": 1, "batch_size": 10, "batches_per_epoch": 10, "seed": 0}
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


# ----------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("processes", [0, 2])
def test_evaluation_sees_every_sample_once_in_order(numbered: tuple[Path, Index], processes: int) -> None:
    loaders = [
        EvalLoader(*numbered, config(loader_processes=processes), rank=rank, ranks=3, batch_size=8) for rank in range(3)
    ]
    parts = [list(loader) for loader in loaders]
    assert [label for part in parts for label in labels(part)] == list(range(100))
    assert [[len(batch) for batch, _ in part] for part in parts] == [[8] * 4 + [1], [8] * 4 + [1], [8] * 4 + [2]]
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


def evaluate(data: tuple[Path, Index], processes: int = 0) -> list[Batch]:
    return list(EvalLoader(*data, config(loader_processes=processes), rank=0, ranks=1, batch_size=2))


def train(data: tuple[Path, Index], processes: int = 0) -> list[Batch]:
    samples = data[1].splits["all"].samples
    loader = train_loader(data, ranks=1, batch_size=1, batches_per_epoch=samples, loader_processes=processes)
    return take(loader.batches(), samples)


@pytest.mark.parametrize("read", [evaluate, train])
@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_sample_is_named_with_its_shard(
    tmp_path: Path, case: str, read: Callable[[tuple[Path, Index]], list[Batch]]
) -> None:
    sample, message = BROKEN[case]
    with pytest.raises(DataError, match=rf"all-000000\.tar: sample 'k7' .*{message}|sample 'k7' {message}"):
        read(broken_data(tmp_path, sample))


@pytest.mark.parametrize("case", ["no label", "truncated jpeg"])
@pytest.mark.parametrize("read", [evaluate, train])
def test_the_error_of_a_loader_process_is_as_plain(
    tmp_path: Path, case: str, read: Callable[[tuple[Path, Index], int], list[Batch]]
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
