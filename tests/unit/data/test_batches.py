"""Batches: their seed, bad samples, augmentation, and what the device does to them."""

from __future__ import annotations

import ctypes
import random
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from qsr_engine.data.batches import ImageBatch, decode_batch
from qsr_engine.data.decoding import Decoder, Pixels
from qsr_engine.data.device import MEAN, STD, Event, MixUp, Normalise, copied_ahead, on_device
from qsr_engine.data.errors import DataError
from qsr_engine.data.randaugment import Augment, Composer, Torchvision
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import TrainView
from tests.support.pictures import encode, photo, train_decoder

CPU = torch.device("cpu")


def batch(
    samples: list[Sample | DataError], decoder: Decoder, seed: int = 11, skip: bool = False, replace: bool = True
) -> tuple[Pixels, list[int], tuple[str, ...]]:
    out = np.full((len(samples), decoder.size, decoder.size, 3), 77, np.uint8)
    labels, skipped = decode_batch(samples, decoder, seed, out, skip=skip, replace=replace)
    return out, labels, skipped


@pytest.mark.parametrize("augment", [None, Torchvision(2, 10), Composer(2, 10)])
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
    augmented = batch(samples, Decoder(32, TrainView(32, "crop_flip"), Torchvision(2, 10)))[0]
    none = batch(samples, Decoder(32, TrainView(32, "crop_flip"), Torchvision(0, 10)))[0]
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


class LateCopies:
    """Stands in for a GPU's copy engine, which is not here: a copy is made when two more were started."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.done = 0

    def start(self, batch: ImageBatch) -> tuple[ImageBatch, Event]:
        copy, source = ImageBatch(torch.zeros_like(batch.images), batch.labels.clone()), batch.images
        self.started.append(int(batch.labels))
        return copy, LateEvent(self, copy.images, source.data_ptr(), source.numel())

    def hand_over(self, batch: ImageBatch, event: Event) -> None:
        pass


class LateEvent:
    def __init__(self, copies: LateCopies, target: Tensor, address: int, size: int) -> None:
        self.copies, self.target, self.address, self.size, self.come = copies, target, address, size, False
        self.number = len(copies.started)

    def query(self) -> bool:
        if len(self.copies.started) >= self.number + 2:
            self.synchronize()
        return self.come

    def synchronize(self) -> None:
        if not self.come:  # reads the memory of the host by its address, as a GPU does: nothing holds it here
            read = bytearray(ctypes.string_at(self.address, self.size))
            self.target.view(-1).copy_(torch.frombuffer(read, dtype=torch.uint8))
            self.come, self.copies.done = True, self.copies.done + 1


def test_memory_of_the_host_is_held_until_its_copy_is_done() -> None:
    """Of six slots each is filled anew when nobody holds it; a slot that is let go too soon has the next batch."""
    room = [np.zeros(300, np.uint8) for _ in range(6)]
    free, copies = list(range(6)), LateCopies()

    def batches() -> Iterator[ImageBatch]:
        for number in range(10):
            slot = free.pop()
            room[slot][:] = number + 1
            view = room[slot].view()
            weakref.finalize(view, free.append, slot)
            yield ImageBatch(torch.from_numpy(view), torch.tensor(number))
            del view

    seen = []
    for batch in copied_ahead(batches(), copies):
        assert copies.started[-1] == min(int(batch.labels) + 1, 9), "the next one is on its way"
        seen.append(batch)
    assert copies.done == 10
    for number, batch in enumerate(seen):
        assert (batch.images == number + 1).all(), number
    assert len(free) >= 5
