"""Images as files, through Pillow and without torch: what format they have, whether they decode, smaller copies."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image, features

from qsr_engine.data.index import DataError

MAX_PIXELS = 100_000_000  # 300 MB decoded; a larger image is a mistake or an attack
GREY = ("1", "L", "LA")  # Pillow's modes that become grey JPEG; all others become RGB


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
        return max(1, round(width * limit / now)), max(1, round(height * limit / now))


def encoder_version() -> str:
    """The libraries that decide the bytes of an image that is encoded here."""
    return f"Pillow {features.version('pil')}, JPEG {features.version('jpg')}"


def image_suffix(data: bytes, where: str) -> str:
    """ "jpg" or "png", by the content: one of ImageNet's .JPEG files is a PNG. Raises DataError for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    raise DataError(
        f"{where}: this is neither JPEG nor PNG, it begins with {data[:8]!r}; convert, replace or delete it"
    )


def shrink_image(data: bytes, shrink: Shrink, where: str) -> bytes:
    """JPEG of the smaller image, RGB or grey; the same bytes where it is small enough already.

    An orientation in EXIF is ignored and lost, as training on ImageNet ignores it: the pixels keep their order.

    Raises:
        DataError: it does not decode, or has more than MAX_PIXELS.
    """
    with _opened(data, where) as image:
        size = shrink.size(*image.size)
        if size is None:
            return data
        # JPEG decodes to 1/2, 1/4 or 1/8 at little cost; twice the size that is wanted is left to the better filter.
        drafted = image.draft(None, (2 * size[0], 2 * size[1]))
        box = drafted[1] if drafted else None  # where the picture ends, which may be inside of the last pixels
        smaller = image.convert("L" if image.mode in GREY else "RGB").resize(size, Image.Resampling.LANCZOS, box)
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
    too_large = f"{where}: this image has more than {MAX_PIXELS:,} pixels; replace or delete it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about pixels and about broken EXIF
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(too_large)
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(too_large) from error
    except Exception as error:  # what Pillow raises for broken bytes depends on the format and on where they break
        raise DataError(f"{where}: this does not decode as JPEG or PNG: {error}; replace or delete it") from error
