"""Images as files, through Pillow and without torch: format, limits, whether they decode, smaller copies.

What training refuses is refused here too: the reader of shards has its limits from here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError, features

from qsr_engine.data.errors import DataError

MAX_PIXELS = 100_000_000  # 300 MB decoded; a larger image is a mistake or an attack
MAX_ASPECT = 100  # long side to short side; resizing the short side makes a bomb of a 1 x 100,000 image
MAX_SCANS = 100  # of a progressive JPEG; encoders write about 10, and each costs a pass over the whole image
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's names of those that are read
GREY = ("1", "L", "LA")  # Pillow's modes that become grey JPEG; all others become RGB
SIXTEEN_BITS = ("I;16", "I")  # those of a grey PNG of 16 bits: of this Pillow, and of older ones


class Shrink(NamedTuple):
    """Which images are made smaller, and how they are encoded then: JPEG of this quality.

    `max_side` bounds the long side, and `short_side` the short one, in pixels; one of them is None.
    """

    max_side: int | None
    short_side: int | None
    quality: int

    def size(self, width: int, height: int) -> tuple[int, int] | None:
        """The size that an image gets, or None where it stays as it is."""
        side, limit = (max, self.max_side) if self.max_side is not None else (min, self.short_side)
        now = side(width, height)
        if limit is None or now <= limit:
            return None
        sides = round(width * limit / now), round(height * limit / now)
        least = -(-max(sides) // MAX_ASPECT)  # rounding a short side down must not take the image over the limit
        return max(least, sides[0]), max(least, sides[1])


def encoder_version() -> str:
    """The libraries that decide the bytes of an image that is encoded here."""
    return f"Pillow {features.version('pil')}, JPEG {features.version('jpg')}"


def image_suffix(data: bytes, where: str) -> str:
    """ "jpg", "png" or "webp", by the content: one of ImageNet's .JPEG files is a PNG. Raises DataError for others."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    raise DataError(
        f"{where}: this is neither JPEG, PNG nor WebP, it begins with {data[:8]!r}; convert, replace or delete it"
    )


def check_limits(width: int, height: int, where: str) -> None:
    """Raises DataError where an image has more than MAX_PIXELS, or a side more than MAX_ASPECT times the other."""
    pixels = f"{width} x {height} pixels"
    if width * height > MAX_PIXELS:
        raise DataError(f"{where} has {pixels}; the limit is {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{where} has {pixels}; the limit is a side {MAX_ASPECT} times as long as the other")


def check_scans(data: bytes, where: str) -> None:
    """Raises DataError where the bytes of a JPEG have more than MAX_SCANS scans. Those of a PNG have none."""
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if scans > MAX_SCANS:
        raise DataError(f"{where} has {scans} scans; the limit is {MAX_SCANS}")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits as one of 8, value * 255 / 65535; an image of another mode as it is.

    Pillow's convert() makes every value above 255 white.
    """
    if image.mode not in SIXTEEN_BITS:
        return image
    scaled = image.convert("I").point(_eight_bits(), "L")
    scaled.info.pop("transparency", None)  # a value of 16 bits, which convert() would look for among those of 8
    return scaled


@cache
def _eight_bits() -> list[int]:
    """The 8 bits of every value of 16 bits."""
    return [(value + 128) // 257 for value in range(65536)]  # 65535 / 255 is 257


def reason(error: Exception) -> str:
    """What Pillow says of an image, without the address of an object in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify the image"
    return str(error) or type(error).__name__


def shrink_image(data: bytes, shrink: Shrink, where: str) -> bytes:
    """JPEG of the smaller image, RGB or grey; the same bytes where it is small enough already.

    An orientation in EXIF is ignored and lost, as training on ImageNet ignores it: the pixels keep their order.

    Raises:
        DataError: it does not decode, or is beyond the limits above.
    """
    with _opened(data, where) as image:
        size = shrink.size(*image.size)
        if size is None:
            return data
        # JPEG decodes to 1/2, 1/4 or 1/8 at little cost; twice the size that is wanted is left to the better filter.
        drafted = image.draft(None, (2 * size[0], 2 * size[1]))
        box = drafted[1] if drafted else None  # where the picture ends, which may be inside of the last pixels
        pixels = to_eight_bits(image)
        pixels = pixels.convert("L" if pixels.mode in GREY else "RGB")
        smaller = pixels.resize(size, Image.Resampling.LANCZOS, box)
    stream = io.BytesIO()
    smaller.save(stream, format="JPEG", quality=shrink.quality)
    return stream.getvalue()


def check_image(data: bytes, where: str) -> None:
    """Decode an image whole. Raises DataError as shrink_image() does."""
    with _opened(data, where) as image:
        image.load()


def encode_png(pixels: object) -> bytes:
    """PNG of a uint8 array [H, W] or [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")  # type: ignore[arg-type]
    return stream.getvalue()


@contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image.Image]:
    """The image, not decoded yet; whatever Pillow raises until the block ends becomes a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about pixels and about broken EXIF
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_limits(*image.size, where)
                check_scans(data, where)
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{where} has too many pixels; the limit is {MAX_PIXELS:,}") from error
    except Exception as error:  # what Pillow raises for broken bytes depends on the format and on where they break
        raise DataError(
            f"{where}: this does not decode as JPEG, PNG or WebP: {reason(error)}; replace or delete it"
        ) from error
