"""The batches of every rank: what is in them, in which order, from any batch on."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from qsr_engine.data.batches import decode_batch
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.order import samples_before
from qsr_engine.data.rows import Row
from qsr_engine.data.tar_shard import TarShard
from qsr_engine.data.writing.folder import write_index
from tests.support.loading import data_config, equal, labels, take, train_loader
from tests.support.shard_files import noise, shards_of


def keys(loader: TrainLoader, number: int, start: int = 0) -> list[str]:
    """The keys of so many samples from a place in the rank's stream on, read from the tar files."""
    samples = [loader._source.load(item) for item in islice(loader.items(start), number)]
    assert not any(isinstance(sample, DataError) for sample in samples)
    return [sample.whole().key for sample in samples if not isinstance(sample, DataError)]


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
        TrainLoader(*data, data_config(shuffle_buffer=buffer), rank=r, ranks=ranks, batch_size=batch_size, seed=1)
        for r in range(ranks)
    ]
    streams = [keys(loader, steps * batch_size) for loader in loaders]
    for epoch in range(3):
        read: list[str] = []
        for rank, stream in enumerate(streams):
            start, stop = (samples_before(e, total, rank, ranks) for e in (epoch, epoch + 1))
            read += stream[start:stop]
        assert sorted(read) == [f"{number:08d}" for number in range(total)], epoch


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

        def read(self, number: int, row: Row) -> tuple[str, bytes]:
            read.append(number)
            return at(self, number, row)

    monkeypatch.setattr("qsr_engine.data.sources.TarShard", Opened)
    loader = train_loader(numbered, rank=1, shuffle_buffer=10)
    next(loader.batches(3))
    assert len(read) == 6
    assert len(opened) == len(set(opened)) <= 3
    assert opened == list(dict.fromkeys(item.shard for item in islice(loader.items(18), 6)))


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


@pytest.mark.parametrize(("start", "kind"), [(1, "composer"), (7, "torchvision"), (8, "composer"), (19, "torchvision")])
def test_resuming_at_a_batch_gives_the_batches_from_there(numbered: tuple[Path, Index], start: int, kind: str) -> None:
    augmented = {"randaugment": {"kind": kind}}
    whole = take(train_loader(numbered, **augmented).batches(), start + 4)
    assert equal(take(train_loader(numbered, **augmented).batches(start), 4), whole[start:])


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
        list(EvalLoader(*numbered, data_config(loader_processes=processes), rank=0, ranks=1, batch_size=60))
        assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_does_not_depend_on_the_random_state_of_the_process(numbered: tuple[Path, Index]) -> None:
    torch.manual_seed(1)
    once = take(train_loader(numbered).batches(), 3)
    torch.manual_seed(2)
    assert equal(once, take(train_loader(numbered).batches(), 3))


@pytest.mark.parametrize("processes", [0, 2])
def test_evaluation_sees_every_sample_once_in_order(numbered: tuple[Path, Index], processes: int) -> None:
    config = data_config(loader_processes=processes)
    loaders = [EvalLoader(*numbered, config, rank=rank, ranks=3, batch_size=8) for rank in range(3)]
    parts = [list(loader) for loader in loaders]
    assert [label for part in parts for label in labels(part)] == list(range(100))
    assert [[len(batch.images) for batch in part] for part in parts] == [[8] * 4 + [1], [8] * 4 + [1], [8] * 4 + [2]]
    assert all(equal(list(loader), part) for loader, part in zip(loaders, parts, strict=True))


def test_a_rank_may_have_nothing_to_evaluate(tmp_path: Path) -> None:
    data = shards_of(tmp_path, [1])
    sizes = [len(list(EvalLoader(*data, data_config(), rank=r, ranks=3, batch_size=4))) for r in range(3)]
    assert sorted(sizes) == [0, 0, 1]


def test_a_shard_name_is_never_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by reading webdataset's gopen: it gives what follows `pipe:` to a shell."""
    monkeypatch.chdir(tmp_path)
    folder = Path("pipe:touch hit;#")
    folder.mkdir()
    data = shards_of(folder, [3])
    write_index(*data)
    assert labels(list(EvalLoader(*data, data_config(), rank=0, ranks=1, batch_size=2))) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_first_rank_says_that_pillow_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("qsr_engine.data.loader.REGIONS", False)
    monkeypatch.setattr("qsr_engine.data.loader.NO_REGIONS", "there is no compiler")
    data = shards_of(tmp_path, [3])
    for rank in range(2):
        train_loader(data, rank=rank)
    assert [record.getMessage() for record in caplog.records] == [
        "pictures are decoded by Pillow, at half the speed: there is no compiler"
    ]


def test_a_recipe_that_names_a_decoder() -> None:
    """Older recipes and checkpoints say cpu, which is what there is."""
    assert data_config(decoder="cpu") == data_config()
    with pytest.raises(ValidationError, match=r"decoder is .gpu., and .* on the CPU only; leave decoder out"):
        data_config(decoder="gpu")
    for threads in (0, 257):
        with pytest.raises(ValidationError, match="loader_threads"):
            data_config(loader_threads=threads)
