"""From the bytes of an image to its picture: the same pixels by every decoder, and clear errors."""

from __future__ import annotations

import io
import math
import random
from array import array
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qsr_engine.data import decoding, randaugment
from qsr_engine.data.decoding import Decoder, Pixels, Region, decode_whole, image_size
from qsr_engine.data.errors import DataError
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import EvalView, TrainView, View
from tests.support.pictures import difference, encode, evaluation_decoder, photo, ramp, show, train_decoder

if decoding.REGIONS:
    from qsr_engine.data import _jpeg
with_libjpeg = pytest.mark.skipif(not decoding.REGIONS, reason="installed without a compiler or libjpeg-turbo")
SIDES = st.sampled_from([1, 2, 7, 8, 33, 64, 100])  # of pictures: with and without a rest in vectors


@with_libjpeg
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_region_has_the_pixels_of_the_whole_image_bit_for_bit(data: st.DataObject) -> None:
    """Against Pillow, whole: any size, sampling, restart markers and scale, and a region anywhere."""
    width, height = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    left, top = data.draw(st.integers(0, 640 - width)), data.draw(st.integers(0, 427 - height))
    image = photo().crop((left, top, left + width, top + height))
    options: dict[str, Any] = {"quality": data.draw(st.integers(20, 98))}
    if data.draw(st.booleans()):
        image = image.convert("L")
    else:
        options["subsampling"] = data.draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]))
    if data.draw(st.booleans()):
        options["restart_marker_blocks"] = data.draw(st.integers(1, 5))
    sample = encode(image, "JPEG", **options)
    eighths = data.draw(st.sampled_from([8, 4, 2, 1]))
    across, down = -(-width * eighths // 8), -(-height * eighths // 8)
    x, y = data.draw(st.integers(0, across - 1)), data.draw(st.integers(0, down - 1))
    w, h = data.draw(st.integers(1, across - x)), data.draw(st.integers(1, down - y))
    assert _jpeg.size(sample.image) == (width, height, True)
    pixels = _jpeg.decode(sample.image, x, y, w, h, eighths)
    # Smaller ones Pillow does not scale, and longer ones are refused before they come so far.
    if min(width, height) >= 8 // eighths and max(width, height) <= 100 * min(width, height):
        assert pixels == decode_whole(sample, Region(x, y, w, h, (0, 0, w, h), eighths)).tobytes()


@with_libjpeg
@pytest.mark.parametrize(
    "arguments",
    [
        *((-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 41, 1), (0, 0, 1, 31), (40, 0, 1, 1)),
        *((1, 0, 40, 1), (2**31, 0, 1, 1), (0, 0, 2**33, 2**33), (65500, 65500, 65500, 65500)),
        *((0, 0, 1, 1, 3), (0, 0, 1, 1, 0)),
    ],
)
def test_a_region_outside_of_the_image_is_refused(arguments: tuple[int, ...]) -> None:
    data = encode(photo().crop((0, 0, 40, 30)), "JPEG").image
    with pytest.raises((ValueError, MemoryError)):
        _jpeg.decode(data, *arguments)


@with_libjpeg
def test_only_simple_jpegs_are_decoded_by_regions() -> None:
    small = photo().crop((0, 0, 50, 40))
    others = {
        "progressive": encode(small, "JPEG", progressive=True),
        "CMYK": encode(small.convert("CMYK"), "JPEG"),
        "RGB inside": encode(small, "JPEG", keep_rgb=True),
    }
    for name, sample in others.items():
        assert _jpeg.size(sample.image) == (50, 40, False), name
        with pytest.raises(ValueError, match="not decoded by regions"):
            _jpeg.decode(sample.image, 0, 0, 1, 1)


@with_libjpeg
def test_foreign_bytes_never_do_more_than_raise() -> None:
    """3,000 damaged images: cut, overwritten, bits flipped, parts doubled; sizes in the header are kept sane."""
    rng = np.random.default_rng(0)
    whole = [
        encode(
            photo().crop((0, 0, 70, 50)), "JPEG", subsampling=sampling, quality=60, restart_marker_blocks=blocks
        ).image
        for sampling in ("4:4:4", "4:2:2", "4:2:0")
        for blocks in (0, 3)
    ]
    decoded = 0
    for _ in range(3000):
        data = bytearray(whole[rng.integers(len(whole))])
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            kind = rng.integers(4)
            if kind == 0:
                del data[at:]
            elif kind == 1:
                data[at : at + 4] = rng.bytes(4)
            elif kind == 2:
                data[at] ^= 1 << int(rng.integers(8))
            else:
                data[at:at] = data[at : at + 40]
            if not data:
                data = bytearray(b"\xff")
        try:
            width, height, simple = _jpeg.size(bytes(data))
            if simple and width * height < 10**6:
                _jpeg.decode(bytes(data), width // 3, height // 3, max(1, width // 2), max(1, height // 2))
                decoded += 1
        except ValueError:
            continue
    assert 0 < decoded < 2500


@with_libjpeg
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_that_are_no_jpeg_raise(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        _jpeg.size(b"\xff\xd8" + data)


def reference(sample: Sample, view: View, size: int) -> Pixels:
    """The obvious way, by Pillow: decode everything, cut the box out (or don't), resize, move, flip."""
    whole = Image.open(io.BytesIO(sample.image)).convert("RGB")
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    if not view.context:
        whole, box = whole.crop(tuple(map(round, box))), (0, 0, view.width, view.height)  # type: ignore[arg-type]
    picture = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, box=box))
    padded = np.pad(picture, ((size, size), (size, size), (0, 0)))
    picture = padded[size - view.dy : 2 * size - view.dy, size - view.dx : 2 * size - view.dx]
    return picture[:, ::-1] if view.flip else picture


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("size", [224, 72, 31])
def test_pictures_are_those_of_pillow(name: str, size: int) -> None:
    """Crops of photographs, against Pillow's antialiased resize of the same crop: bit for bit, where none is halved."""
    sample = encode(photo(name), "JPEG", quality=90)
    halved = 0
    for decoder in (train_decoder(size, "crop_flip"), evaluation_decoder(size), train_decoder(size, "none")):
        for seed in range(12):
            view = decoder.choose(640, 427, random.Random(seed))
            found, expected = show(decoder, sample, seed), reference(sample, view, size)
            if Region.of(view, 640, 427, size).eighths == 8:
                assert np.array_equal(found, expected), view
            else:
                halved += 1
                assert difference(found, expected) <= 0.5
    assert bool(halved) == (size == 31)


@with_libjpeg
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_box_is_resized_as_pillow_does_it(data: st.DataObject) -> None:
    """Regions of any shape, so that either pass is the first one; any box in them; up and down; flipped or not."""
    width, height = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    sample = crop_of_photo()
    x, y, size = data.draw(st.integers(0, 320 - width)), data.draw(st.integers(0, 310 - height)), data.draw(SIDES)
    ends = sorted(data.draw(st.lists(st.floats(0, width, width=32), min_size=2, max_size=2, unique=True)))
    sides = sorted(data.draw(st.lists(st.floats(0, height, width=32), min_size=2, max_size=2, unique=True)))
    whole, flip = data.draw(st.booleans()), data.draw(st.booleans())
    box = (0, 0, width, height) if whole else (ends[0], sides[0], ends[1], sides[1])
    out = np.full((2, size, size, 3), 77, np.uint8)
    plan = array("d", [1, x, y, width, height, 8, *box, flip])
    assert _jpeg.decode_batch([sample.image], plan, b"", out, size) == [None]
    crop = Image.open(io.BytesIO(sample.image)).convert("RGB").crop((x, y, x + width, y + height))
    expected = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR, box))
    assert np.array_equal(out[1], expected[:, ::-1] if flip else expected)
    assert (out[0] == 77).all(), "nothing else is written"


@cache
def crop_of_photo() -> Sample:
    return encode(photo().crop((0, 0, 320, 310)), "JPEG")


def plan(place: float = 0, **other: float) -> list[float]:
    values = {"x": 0, "y": 0, "width": 40, "height": 30, "eighths": 8, "left": 0, "top": 0, "right": 40, "bottom": 30}
    return [place, *{**values, **other}.values(), 0]


@with_libjpeg
def test_plans_that_are_nonsense_are_refused() -> None:
    data, out = encode(photo().crop((0, 0, 40, 30)), "JPEG").image, np.zeros((1, 8, 8, 3), np.uint8)
    assert _jpeg.decode_batch([data], array("d", plan()), b"", out, 8) == [None]
    outside = [{"x": 1.0}, {"y": 1.0}, {"width": 41.0}, {"height": 31.0}, {"eighths": 4.0}, {"x": 65500.0}]
    for wrong in outside:
        assert _jpeg.decode_batch([data], array("d", plan(**wrong)), b"", out, 8) == [
            "the region is not inside the image"
        ], wrong
    nonsense: list[dict[str, float]] = [
        *({name: value} for name in ("place", "x", "width", "top", "right") for value in (-1.0, math.nan, math.inf)),
        *({"place": 1.0}, {"width": 0.0}, {"left": 40.0}, {"right": 41.0}, {"bottom": 0.0}, {"eighths": 3.0}),
        {"x": 1e9},
    ]
    for wrong in nonsense:
        with pytest.raises(ValueError, match="is empty, negative or outside"):
            _jpeg.decode_batch([data], array("d", plan(**wrong)), b"", out, 8)
    right = array("d", plan())
    for arguments in ((right, b"", out, 0), (right, b"", out, 9000), (right[1:], b"", out, 8), (right, b"x", out, 8)):
        with pytest.raises(ValueError, match=r"have no such number"):
            _jpeg.decode_batch([data], *arguments)
    for threads in (0, -1, 257):
        with pytest.raises(ValueError, match=r"have no such number"):
            _jpeg.decode_batch([data], right, b"", out, 8, threads)
    with pytest.raises((TypeError, BufferError)):
        _jpeg.decode_batch(["text"], right, b"", out, 8)  # type: ignore[list-item]


@with_libjpeg
def test_threads_and_files_give_the_same_pictures(tmp_path: Path) -> None:
    """In any number of threads, from memory and from a file; what is wrong with one picture is said of that one."""
    good = [encode(photo().crop((n, 0, 300 + n, 200)), "JPEG").image for n in range(12)]
    sources = [*good, good[0][:3000], b"no JPEG", b""]
    path = tmp_path / "shard"
    path.write_bytes(b"".join(sources))
    plans = array("d", [v for n in range(15) for v in (n, 10, 10, 250, 150, 8, 0, 0, 250, 150, n % 2)])
    pictures = []
    with open(path, "rb") as stream:
        extents = [(stream.fileno(), sum(map(len, sources[:n])), len(sources[n])) for n in range(15)]
        for given, threads in ((sources, 1), (sources, 4), (extents, 3)):
            out = np.zeros((15, 64, 64, 3), np.uint8)
            said = _jpeg.decode_batch(given, plans, b"", out, 64, threads)
            assert [n for n, message in enumerate(said) if message] == [12, 13, 14]
            pictures.append(out[:12])
        too_long = (stream.fileno(), 0, path.stat().st_size + 1)
        assert _jpeg.decode_batch([too_long], plans[:11], b"", out, 64) == ["the file ends in the middle of the image"]
    assert _jpeg.decode_batch([(-1, 0, 100)], plans[:11], b"", out, 64) == ["Bad file descriptor"]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


def shown_as(view: View, width: int, height: int, draw: random.Random) -> View:
    return view


@with_libjpeg
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_kind_of_instructions_gives_pillows_pictures(level: int) -> None:
    """Those that the processor has not are as the kind below. Larger, smaller and narrow ones, of any width."""
    image = encode(photo(), "JPEG")
    _jpeg.set_vectors(level)
    try:
        for box in ((3, 5, 300, 200), (0, 0, 17, 9), (40, 30, 9, 380), (10, 10, 600, 33), (0, 0, 640, 427)):
            for size in (224, 97, 16):
                if min(box[2:]) >= 6 * size:
                    continue
                found = np.zeros((size, size, 3), np.uint8)
                view = View(*box, flip=size == 97)
                decoder = Decoder(size, partial(shown_as, view))
                assert not decoder.decode([image], random.Random(0), found[None])
                part = Image.open(io.BytesIO(image.image)).crop((box[0], box[1], box[0] + box[2], box[1] + box[3]))
                shown = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
                assert np.array_equal(found, shown[:, ::-1] if view.flip else shown), (box, size)
    finally:
        _jpeg.set_vectors(2)


@with_libjpeg
def test_tables_of_the_picture_before_are_not_used() -> None:
    """A JPEG without tables of its own is one of a stream; a reader that was used before would decode it."""
    whole = encode(photo().crop((0, 0, 64, 64)), "JPEG").image
    start = whole.index(b"\xff\xdb")
    without = whole[:start] + whole[whole.index(b"\xff\xc0") :]
    out = np.zeros((2, 8, 8, 3), np.uint8)
    plans = array("d", [value for n in range(2) for value in plan(n)])
    first, second = _jpeg.decode_batch([whole, without], plans, b"", out, 8)
    assert first is None
    assert second is not None
    assert "Quantization table" in second


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test compares with Pillow."""
    if decoding.REGIONS:
        assert decoding._check_regions() == ""
        monkeypatch.setattr(decoding._Job, "operations", lambda self, side: [(randaugment.SOLARIZE, 0, 0, 0, 0, 0, 0)])
        assert "its pixels are not Pillow's" in decoding._check_regions()
        monkeypatch.setattr(_jpeg, "decode_batch", lambda *arguments: ["the region is not inside the image"])
        assert decoding._check_regions() == "it does not decode a plain JPEG"


def test_large_crops_are_halved_by_the_dct() -> None:
    whole = View(0, 0, 640, 427)
    assert [Region.of(whole, 640, 427, size).eighths for size in (224, 72, 71, 36, 35, 10)] == [8, 8, 4, 4, 2, 1]
    assert Region.of(View(1, 1, 639, 3), 640, 427, 1).eighths == 8, "the shorter side decides"


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 700), height=st.integers(1, 700), size=st.integers(1, 300), seed=st.integers(0, 99),
    augment=st.sampled_from(["none", "crop", "crop_flip", "evaluation"]),
)  # fmt: skip
def test_the_box_is_inside_the_region_and_the_region_inside_the_image(
    width: int, height: int, size: int, seed: int, augment: str
) -> None:
    choose = EvalView(size) if augment == "evaluation" else TrainView(size, augment)
    region = Region.of(choose(width, height, random.Random(seed)), width, height, size)
    left, top, right, bottom = region.box
    assert region.x >= 0
    assert region.y >= 0
    assert region.x + region.width <= -(-width * region.eighths // 8)
    assert region.y + region.height <= -(-height * region.eighths // 8)
    assert 0 <= left < right <= region.width
    assert 0 <= top < bottom <= region.height


@with_libjpeg
def test_without_libjpeg_the_pictures_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [encode(photo(), "JPEG", subsampling=s, quality=85) for s in ("4:4:4", "4:2:2", "4:2:0")]
    samples.append(encode(photo().convert("L"), "JPEG"))
    samples.append(encode(photo().crop((0, 0, 40, 50)), "JPEG"))  # one that is moved, and then flipped
    decoders = [train_decoder(size, "crop_flip") for size in (224, 16)] + [evaluation_decoder(224)]
    decoders.append(Decoder(33, TrainView(33, "crop_flip"), randaugment.Composer(2, 10), threads=3))

    def pictures() -> list[Pixels]:
        return [show(decoder, sample, seed) for decoder in decoders for sample in samples for seed in range(5)]

    fast = pictures()
    monkeypatch.setattr(decoding, "REGIONS", False)
    monkeypatch.setattr(randaugment, "FAST", False)
    assert all(np.array_equal(one, other) for one, other in zip(fast, pictures(), strict=True))


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("1", "PNG", {}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("L", "JPEG", {"progressive": True}),
    ],
)
@pytest.mark.parametrize("side", [1, 90])
def test_every_kind_of_image_is_decoded(mode: str, format: str, options: dict[str, Any], side: int) -> None:
    image = photo().crop((300, 200, 300 + side, 200 + side)).convert(mode)
    sample = encode(image, format, **options)
    for decoder in (train_decoder(32, "crop_flip"), evaluation_decoder(32)):
        view = decoder.choose(side, side, random.Random(1))
        assert difference(show(decoder, sample, 1), reference(sample, view, 32)) <= 0.5


def test_grey_of_16_bits_keeps_its_levels() -> None:
    """Pillow alone makes white of everything above 255."""
    levels = np.linspace(0, 65535, 256 * 256).round().astype(np.uint16).reshape(256, 256)
    shown = show(train_decoder(256, "none"), encode(Image.fromarray(levels)))
    np.testing.assert_allclose(shown[:, :, 0], levels / 257, atol=1)


def test_pixels_of_a_png_of_the_right_size_are_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for decoder in (train_decoder(8, "none"), evaluation_decoder(8)):
        assert np.array_equal(show(decoder, Image.fromarray(pixels)), pixels)


def test_images_with_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsr_engine.data.images.MAX_PIXELS", 100)
    for format in ("PNG", "JPEG"):
        image_size(encode(Image.new("L", (10, 10)), format))
        with pytest.raises(DataError, match=r"train-000000\.tar: sample 'k7' has 11 x 10 pixels; the limit is 100"):
            show(train_decoder(8, "none"), encode(Image.new("L", (11, 10)), format))


def test_an_image_that_resizing_would_blow_up_is_refused() -> None:
    image_size(encode(Image.new("L", (100, 1))))
    with pytest.raises(DataError, match=r"sample 'k7' has 1 x 101 pixels; the limit is a side 100 times as long"):
        show(train_decoder(8, "none"), encode(Image.new("L", (1, 101))))


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """Each scan costs a pass over the image: a small file could keep a decoder busy for minutes."""
    sample = encode(photo(), "JPEG", progressive=True)
    scan = sample.image.rindex(b"\xff\xda")
    bomb = sample.image[:scan] + sample.image[scan:-2] * 200 + b"\xff\xd9"
    with pytest.raises(DataError, match=r"sample 'k7' has 20\d scans; the limit is 100"):
        show(train_decoder(8, "none"), sample._replace(image=bomb))


@pytest.mark.parametrize("cut", [2, 3, 100, 20_000])
def test_a_jpeg_that_is_cut_is_refused_whatever_the_crop(cut: int) -> None:
    sample = encode(photo(), "JPEG", quality=90)
    sample = sample._replace(image=sample.image[:-cut])
    for seed in range(10):
        if cut > 2:  # without its last two bytes all pixels are there, and Pillow takes it
            with pytest.raises(DataError, match=r"sample 'k7' does not decode as JPEG, PNG or WebP"):
                show(train_decoder(32, "crop"), sample, seed)


def test_what_follows_the_end_of_a_jpeg_does_no_harm() -> None:
    sample = encode(photo(), "JPEG")
    longer = sample._replace(image=sample.image + b"\0" * 100)
    assert np.array_equal(show(train_decoder(32, "crop"), sample), show(train_decoder(32, "crop"), longer))


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (64, 200), (100, 80), (256, 256), (1, 30)])
@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip", "evaluation"])
def test_every_shape_becomes_a_square_of_the_size(shape: tuple[int, int], augment: str) -> None:
    decoder = evaluation_decoder(32) if augment == "evaluation" else train_decoder(32, augment)
    show(decoder, ramp(*shape))


def test_none_crops_the_centre_of_a_wide_image() -> None:
    assert np.array_equal(show(train_decoder(8, "none"), ramp(8, 16)), np.asarray(ramp(8, 16))[:, 4:12])


def test_evaluation_of_a_large_image_leaves_the_margin_out() -> None:
    """224 of 256 pixels: the ramp from 0 to 255 is seen from 16/256 to 240/256 of its way."""
    assert np.array_equal(show(evaluation_decoder(224), ramp(256, 256)), np.asarray(ramp(256, 256))[16:240, 16:240])


def test_small_images_are_padded_by_an_eighth_and_cropped() -> None:
    """A white image of 16 pixels is moved by at most 2 pixels, into every place, and black comes in from outside."""
    white = encode(Image.new("RGB", (16, 16), "white"))
    places = set()
    for seed in range(300):
        lit = show(train_decoder(16, "crop"), white, seed)[:, :, 0] > 0
        places.add((int(lit.any(1).argmax()), int(lit.any(0).argmax()), int(lit.sum())))
    assert {(row, column) for row, column, _ in places} == {(row, column) for row in range(3) for column in range(3)}
    assert min(total for *_, total in places) == 14 * 14


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 900), (70, 4000)])
def test_random_crops_are_distributed_as_those_of_torchvision(width: int, height: int) -> None:
    """Means over 4,000 crops; their standard errors are below 1 % of the side, the tolerance is 3 %."""
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    generator = random.Random(0)
    views = [TrainView(224, "crop")(width, height, generator) for _ in range(4000)]
    ours = np.array([(view.top, view.left, view.height, view.width) for view in views])
    sides = np.array([height, width, height, width])
    np.testing.assert_allclose(ours.mean(0) / sides, theirs.mean(0) / sides, atol=0.03)
    np.testing.assert_allclose(ours.std(0) / sides, theirs.std(0) / sides, atol=0.03)


def test_flip_flips_half_of_the_images_and_crop_none() -> None:
    for augment, low, high in (("crop", 0, 0), ("crop_flip", 35, 65)):
        sample = encode(ramp(128, 128))
        rows = [show(train_decoder(32, augment), sample, seed)[0, :, 0].astype(int) for seed in range(100)]
        assert low <= sum(int(row[0] > row[-1]) for row in rows) <= high
