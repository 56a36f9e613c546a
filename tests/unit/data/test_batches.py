"""Batches: their seed, bad samples, augmentation, and what the device does to them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from qsr_engine.data.batches import ImageBatch, decode_batch
from qsr_engine.data.decoding import Augment, Decoder, Pixels
from qsr_engine.data.device import MEAN, STD, MixUp, Normalise, on_device
from qsr_engine.data.errors import DataError
from qsr_engine.data.gpu_decoding import GPUDecoder, in_thread
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import TrainView
from tests.support.pictures import difference, encode, photo, train_decoder

CPU = torch.device("cpu")


def batch(
    samples: list[Sample | DataError], decoder: Decoder, seed: int = 11, skip: bool = False, replace: bool = True
) -> tuple[Pixels, list[int], tuple[str, ...]]:
    out = np.full((len(samples), decoder.size, decoder.size, 3), 77, np.uint8)
    labels, skipped = decode_batch(samples, decoder, seed, out, skip=skip, replace=replace)
    return out, labels, skipped


@pytest.mark.parametrize("augment", [None, Augment(2, 10)])
def test_a_batch_depends_on_its_seed_alone(augment: Augment | None) -> None:
    samples: list[Sample | DataError] = [encode(photo(), "JPEG")] * 3
    decoder = Decoder(32, TrainView(32, "crop_flip"), augment)
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate()
    pictures, labels, _ = batch(samples, decoder)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.manual_seed(4)
    assert np.array_equal(batch(samples, decoder)[0], pictures)
    assert not np.array_equal(batch(samples, decoder, seed=12)[0], pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    assert labels == [3, 3, 3]


def test_randaugment_changes_pictures_after_the_crop() -> None:
    samples: list[Sample | DataError] = [encode(photo(), "JPEG")] * 8
    plain = batch(samples, train_decoder(32, "crop_flip"))[0]
    augmented = batch(samples, Decoder(32, TrainView(32, "crop_flip"), Augment(2, 10)))[0]
    none = batch(samples, Decoder(32, TrainView(32, "crop_flip"), Augment(0, 10)))[0]
    assert np.array_equal(plain, none), "the crops are the same"
    assert sum(not np.array_equal(one, other) for one, other in zip(plain, augmented, strict=True)) >= 6


def test_bad_samples_are_replaced_or_marked() -> None:
    good = [encode(photo(), "JPEG", label=n) for n in range(3)]
    wrong = DataError("train-000001.tar: sample 'x' has no label")
    broken = good[0]._replace(image=b"hello", key="h")
    samples: list[Sample | DataError] = [wrong, good[0], good[1], broken, good[2], wrong]
    with pytest.raises(DataError, match="sample 'x' has no label"):
        batch(samples, train_decoder(32, "none"))
    pictures, labels, skipped = batch(samples, train_decoder(32, "none"), skip=True)
    assert labels == [0, 0, 1, 2, 2, 0]
    assert len(skipped) == 3
    assert "sample 'h' does not decode" in skipped[1]
    assert np.array_equal(pictures[3], pictures[4])
    pictures, labels, skipped = batch(samples, train_decoder(32, "none"), skip=True, replace=False)
    assert labels == [-1, 0, 1, -1, 2, -1]
    assert not pictures[3].any()
    with pytest.raises(DataError, match=r"all 2 samples of a batch are bad, .*; the last: .*no label"):
        batch([broken, wrong], train_decoder(32, "none"), skip=True)


def test_pictures_are_normalised_on_the_device() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    found = Normalise(CPU, torch.float32)(images)
    mean, std = (torch.tensor(value, dtype=torch.float64).view(1, 3, 1, 1) for value in (MEAN, STD))
    # fp32 has 24 bits, and values reach 2.6 in three operations.
    torch.testing.assert_close(found.double(), (images.double() / 255 - mean) / std, rtol=0, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert Normalise(CPU, torch.bfloat16)(images).dtype == torch.bfloat16


def test_mixup_mixes_neighbours_and_their_labels_alike() -> None:
    torch.manual_seed(0)
    images, labels = torch.eye(4)[:, :, None, None].expand(4, 4, 2, 2), torch.arange(4)  # a channel for each class
    drawn = []
    for _ in range(50):
        mixed, shares = MixUp(0.2, 4)(images, labels)
        torch.testing.assert_close(mixed[:, :, 1, 0], shares)
        assert shares[1, 0] == 1 - shares[1, 1] == shares[0, 3]
        drawn.append(float(shares[1, 1]))
    assert len(set(drawn)) > 30
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.2), "symmetric, with a standard error of 0.06"


def test_on_a_cpu_batches_pass_unchanged() -> None:
    batches = [ImageBatch(torch.zeros(1, 3, 2, 2), torch.tensor([n]), ("x",)) for n in range(3)]
    passed = list(on_device(batches, CPU))
    assert [int(b.labels) for b in passed] == [0, 1, 2]
    assert passed[0].skipped == ("x",)


@pytest.mark.parametrize("size", [64, 16])
def test_the_gpu_decoder_shows_the_same_crops(size: int) -> None:
    """Run on the CPU here: torchvision's decode_jpeg gives no nvJPEG without a GPU."""
    samples: list[Sample | DataError] = [
        *(encode(photo(name), "JPEG", label=1) for name in ("china.jpg", "flower.jpg") for _ in range(3)),
        encode(photo(), "JPEG", progressive=True),
        encode(photo().crop((0, 0, 40, 50)), "JPEG"),
        encode(photo(), "PNG"),
    ]
    decoder = train_decoder(size, "crop_flip")
    ours = batch(samples, decoder)[0]
    theirs = GPUDecoder(decoder, CPU).batch(samples, 11, skip=False)
    assert theirs.labels.tolist() == [1] * 6 + [3] * 3
    assert theirs.images.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(ours, theirs.images.permute(0, 2, 3, 1).numpy(), strict=True):
        # Two antialiased resizes round at other places; where the DCT has halved (16), 0.5 more.
        assert difference(one, other) <= (1.0 if size == 64 else 1.5)


def test_the_gpu_decoder_finds_the_bad_one() -> None:
    good = encode(photo(), "JPEG")
    rotten = good._replace(image=good.image[:5000] + b"\0" * 20_000 + good.image[25_000:], key="rotten")
    broken = good._replace(image=b"\xff\xd8", key="broken")
    decoder = GPUDecoder(train_decoder(32, "crop"), CPU)
    with pytest.raises(DataError, match="sample 'broken' does not decode"):
        decoder.batch([good, broken], 1, skip=False)
    found = decoder.batch([broken, good, rotten], 1, skip=True)
    assert any("sample 'broken'" in text for text in found.skipped)
    assert found.labels.tolist() == [3, 3, 3]
    assert torch.equal(found.images[0], found.images[1])


def test_a_thread_reads_ahead_and_hands_over_its_error() -> None:
    def items() -> Any:
        yield from range(3)
        raise DataError("no more")

    seen = in_thread(items())
    assert [next(seen) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="no more"):
        next(seen)
    assert list(in_thread(range(20))) == list(range(20))
