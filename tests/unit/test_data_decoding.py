"""Decoding and augmentation of single images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from qsr_engine.data import decoding
from qsr_engine.data.decoding import EvalTransform, TrainTransform, decode_batch, decode_image
from qsr_engine.data.index import DataError
from qsr_engine.data.shards import Sample


def encode(image: Image.Image, format: str = "PNG") -> Sample:
    stream = io.BytesIO()
    image.save(stream, format=format)
    return Sample("train-000000.tar", "k7", stream.getvalue(), 3)


def ramp(height: int, width: int) -> torch.Tensor:
    """Rises from left to right, so that a flip and the place of a crop can be seen."""
    return torch.linspace(0, 255, width).to(torch.uint8).expand(3, height, width).contiguous()


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("1", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "JPEG"),
    ],
)
def test_every_mode_decodes_to_rgb(mode: str, format: str) -> None:
    decoded = decode_image(encode(Image.new(mode, (5, 4)), format))
    assert (decoded.shape, decoded.dtype) == ((3, 4, 5), torch.uint8)


def test_pixels_of_a_png_are_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    decoded = decode_image(encode(Image.fromarray(pixels)))
    assert np.array_equal(decoded.numpy(), pixels.transpose(2, 0, 1))


def test_images_with_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    decode_image(encode(Image.new("L", (10, 10))))
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 'k7' has 11 x 10 pixels; the limit is 100"):
        decode_image(encode(Image.new("L", (11, 10))))


def test_an_image_that_resizing_would_blow_up_is_refused() -> None:
    decode_image(encode(Image.new("L", (100, 1))))
    with pytest.raises(DataError, match=r"sample 'k7' has 1 x 101 pixels; the limit is a side 100 times as long"):
        decode_image(encode(Image.new("L", (1, 101))))


def test_a_bomb_is_refused() -> None:
    header = bytearray(encode(Image.new("L", (1, 1))).image)
    header[16:24] = (40_000).to_bytes(4, "big") * 2  # width and height of a PNG
    with pytest.raises(DataError, match=r"train-000000\.tar: sample 'k7' "):
        decode_image(Sample("train-000000.tar", "k7", bytes(header), 0))


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (64, 200), (100, 80), (256, 256), (1, 30)])
@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip", "evaluation"])
def test_every_shape_becomes_a_square_of_the_size(shape: tuple[int, int], augment: str) -> None:
    transform = EvalTransform(32) if augment == "evaluation" else TrainTransform(32, augment)
    image = transform(ramp(*shape))
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)


def test_none_and_evaluation_leave_an_image_of_the_size_as_it_is() -> None:
    image = ramp(8, 8)
    assert torch.equal(TrainTransform(8, "none")(image), image)
    assert torch.equal(EvalTransform(8)(image), image)


def test_none_crops_the_centre_of_a_wide_image() -> None:
    assert torch.equal(TrainTransform(8, "none")(ramp(8, 16)), ramp(8, 16)[:, :, 4:12])


def test_evaluation_of_a_large_image_leaves_the_margin_out() -> None:
    """224 of 256 pixels: the ramp from 0 to 255 is seen from 16/256 to 240/256 of its way."""
    row = EvalTransform(224)(ramp(256, 256))[0, 0]
    assert torch.equal(row, ramp(256, 256)[0, 0, 16:240])


def test_small_images_are_padded_by_an_eighth_and_cropped() -> None:
    """A white image of 16 pixels is moved by at most 2 pixels, into every place, and black comes in from outside."""
    transform = TrainTransform(16, "crop")
    white = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    places = set()
    for seed in range(200):
        torch.manual_seed(seed)
        lit = transform(white)[0] > 0
        places.add((int(lit.any(1).nonzero()[0]), int(lit.any(0).nonzero()[0]), int(lit.sum())))
    assert {(row, column) for row, column, _ in places} == {(row, column) for row in range(3) for column in range(3)}
    assert min(total for *_, total in places) == 14 * 14


def test_large_images_are_cropped_at_random_scale() -> None:
    transform = TrainTransform(32, "crop")
    spans = set()
    for seed in range(20):
        torch.manual_seed(seed)
        row = transform(ramp(128, 128))[0, 0].int()
        spans.add(int(row[-1] - row[0]))
        assert row[-1] > row[0]
    assert len(spans) > 10


def test_flip_flips_half_of_the_images_and_crop_none() -> None:
    for augment, low, high in (("crop", 0, 0), ("crop_flip", 35, 65)):
        transform = TrainTransform(32, augment)
        torch.manual_seed(0)
        rows = [transform(ramp(128, 128))[0, 0].int() for _ in range(100)]
        assert low <= sum(int(row[0] > row[-1]) for row in rows) <= high


def test_a_batch_depends_on_its_seed_alone() -> None:
    samples = [encode(Image.fromarray(ramp(80, 80).permute(1, 2, 0).numpy())) for _ in range(3)]
    transform = TrainTransform(16, "crop_flip")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    images, labels = decode_batch(samples, transform, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(decode_batch(samples, transform, seed=11)[0], images)
    assert not torch.equal(decode_batch(samples, transform, seed=12)[0], images)
    assert not torch.equal(images[0], images[1])
    assert labels.tolist() == [3, 3, 3]


def test_the_random_state_is_restored_after_an_error_too() -> None:
    before = torch.get_rng_state()
    with pytest.raises(DataError):
        decode_batch([Sample("train-000000.tar", "k7", b"", 0)], TrainTransform(8, "crop"), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
