"""Images that are made smaller when they are written, and the limits of images."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from qsr_engine.data import DataError, write_imagefolder
from qsr_engine.data import images as writing_images
from qsr_engine.data.samples import Sample
from tests.support.shard_files import decoded, picture, read_samples


def write_one(tmp_path: Path, data: bytes, **options: int) -> Sample:
    (tmp_path / "images/cat").mkdir(parents=True)
    (tmp_path / "images/cat/it.JPEG").write_bytes(data)
    index = write_imagefolder(tmp_path / "images", tmp_path / "out", **options)  # type: ignore[arg-type]
    return read_samples(tmp_path / "out", index, "train")[0]


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"max_side": 50}, (200, 101), (50, 25)),
        ({"max_side": 50}, (101, 200), (25, 50)),
        ({"short_side": 50}, (200, 100), (100, 50)),
        ({"short_side": 50}, (100, 200), (50, 100)),
        ({"max_side": 50}, (500, 6), (50, 1)),
        ({"max_side": 149}, (1990, 20), (149, 2)),  # 149 x 1 would be refused by training
    ],
)
def test_large_images_are_resized(
    tmp_path: Path, options: dict[str, int], before: tuple[int, int], after: tuple[int, int]
) -> None:
    data = picture(*before)
    small = decoded(write_one(tmp_path, data, **options))
    assert (small.size, small.format, small.mode) == (after, "JPEG", "RGB")
    stream = io.BytesIO()
    decoded_whole = Image.open(io.BytesIO(data)).resize(after, Image.Resampling.LANCZOS)
    decoded_whole.save(stream, format="JPEG", quality=90)
    difference = np.asarray(small, int) - np.asarray(Image.open(stream), int)
    assert np.abs(difference).mean() < 2  # decoding at half of the size, which is faster, is hardly seen


@pytest.mark.parametrize("options", [{}, {"max_side": 60, "quality": 5}, {"short_side": 40, "quality": 5}])
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("PNG", "RGBA"), ("JPEG", "CMYK")])
def test_images_that_are_small_enough_stay_byte_for_byte(
    tmp_path: Path, options: dict[str, int], kind: str, mode: str
) -> None:
    data = picture(60, 40, kind=kind, mode=mode)
    assert write_one(tmp_path, data, **options).image == data
    suffix = "jpg" if kind == "JPEG" else "png"  # by content: the file is called it.JPEG
    assert f"00000000.{suffix}".encode() in (tmp_path / "out/train-000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("kind", "mode", "becomes"),
    [
        ("PNG", "RGBA", "RGB"),
        ("PNG", "P", "RGB"),
        ("PNG", "1", "L"),
        ("PNG", "LA", "L"),
        ("JPEG", "CMYK", "RGB"),
        ("JPEG", "L", "L"),
    ],
)
def test_other_modes_become_rgb_or_grey_jpeg(tmp_path: Path, kind: str, mode: str, becomes: str) -> None:
    small = decoded(write_one(tmp_path, picture(60, 40, kind=kind, mode=mode), max_side=30))
    assert (small.size, small.format, small.mode) == ((30, 20), "JPEG", becomes)


def test_quality_is_that_of_the_smaller_jpeg(tmp_path: Path) -> None:
    sizes = [len(write_one(tmp_path / str(q), picture(200, 200), max_side=150, quality=q).image) for q in (30, 90, 100)]
    assert sizes == sorted(sizes)
    default = write_one(tmp_path / "default", picture(200, 200), max_side=150).image
    assert len(default) == sizes[1]


def test_the_orientation_in_exif_is_ignored(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(picture(80, 40)))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    stream = io.BytesIO()
    image.save(stream, format="JPEG", exif=exif)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue()))).size == (40, 80)  # the trap is set
    small = decoded(write_one(tmp_path, stream.getvalue(), max_side=40))
    assert small.size == ImageOps.exif_transpose(small).size == (40, 20)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_header(10_001, 10_000), r"it\.JPEG has 10001 x 10000 pixels; the limit is 100,000,000$"),
        (png_header(60_000, 60_000), r"it\.JPEG has too many pixels; the limit is 100,000,000$"),
        (picture(303, 3), r"it\.JPEG has 303 x 3 pixels; the limit is a side 100 times as long as the other$"),
        (picture(60, 60) + 100 * b"\xff\xda", r"it\.JPEG has 101 scans; the limit is 100$"),
        (picture(60, 60)[:-300], r"it\.JPEG: this does not decode as JPEG, PNG or WebP: .*truncated"),
        (
            b"RIFF    WEBP",
            r"it\.JPEG: this does not decode as JPEG, PNG or WebP: cannot identify the image; replace",
        ),
    ],
)
def test_images_that_cannot_be_made_smaller_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_one(tmp_path, data, max_side=30)


def test_limits_are_those_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    writing_images.check_limits(10, 1000, "it")
    writing_images.check_scans(100 * b"\xff\xda", "no JPEG")
    writing_images.check_scans(b"\xff\xd8" + 100 * b"\xff\xda", "it")
    monkeypatch.setattr(writing_images, "MAX_PIXELS", 9_999)
    with pytest.raises(DataError, match=r"^it has 10 x 1000 pixels; the limit is 9,999$"):
        writing_images.check_limits(10, 1000, "it")
    monkeypatch.setattr(writing_images, "MAX_ASPECT", 2)
    with pytest.raises(DataError, match=r"^it has 1 x 3 pixels; the limit is a side 2 times as long as the other$"):
        writing_images.check_limits(1, 3, "it")
    monkeypatch.setattr(writing_images, "MAX_SCANS", 1)
    with pytest.raises(DataError, match=r"^it has 2 scans; the limit is 1$"):
        writing_images.check_scans(b"\xff\xd8" + 2 * b"\xff\xda", "it")


def test_reasons_have_no_addresses_and_are_never_empty() -> None:
    with pytest.raises(UnidentifiedImageError) as caught:
        Image.open(io.BytesIO(b"GIF"))
    assert writing_images.reason(caught.value) == "cannot identify the image"
    assert writing_images.reason(OSError("broken")) == "broken"
    assert writing_images.reason(EOFError()) == "EOFError"


def grey16(values: np.ndarray[Any, Any], **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(stream, format="PNG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_become_eight(mode: str) -> None:
    ramp = np.arange(65536).reshape(256, 256)
    with Image.open(io.BytesIO(grey16(ramp, transparency=40_000))) as image:
        assert image.mode == "I;16"
        eight = writing_images.to_eight_bits(image if mode == "I;16" else image.convert("I"))
    assert eight.mode == "L"
    assert np.array_equal(np.asarray(eight), np.round(ramp * 255 / 65535))
    assert np.array_equal(np.asarray(eight.convert("RGBA"))[..., 3], np.full((256, 256), 255))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F"])
def test_images_of_eight_bits_stay_as_they_are(mode: str) -> None:
    image = Image.new(mode, (2, 2))
    assert writing_images.to_eight_bits(image) is image


def test_a_png_of_sixteen_bits_is_not_made_white(tmp_path: Path) -> None:
    small = decoded(write_one(tmp_path, grey16(np.full((40, 60), 30_000)), max_side=30))
    assert (small.size, small.mode) == ((30, 20), "L")
    assert np.abs(np.asarray(small, int) - round(30_000 / 257)).max() <= 1
