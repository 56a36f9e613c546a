"""From the bytes of an image to the pixels of its view: decode what the view needs, resize it.

JPEG images of the usual kinds are decoded by libjpeg-turbo, the rows and columns of the view only (`_jpeg.c`). All
others, and all where that extension was not built, are decoded whole by Pillow; both give the same pixels.
Pictures are uint8 [S, S, 3].
"""

from __future__ import annotations

import io
import math
from random import Random
from typing import Any, NamedTuple

import cykooz_resizer as resizer
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from qsr_engine.data.errors import DataError
from qsr_engine.data.images import check_limits, check_scans, reason, to_eight_bits
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import ChooseView, View

try:
    from qsr_engine.data import _jpeg
except ImportError:  # no compiler or no libjpeg-turbo when the package was installed
    REGIONS = False
else:
    REGIONS = True

# Where a crop is so many times larger than the picture even after it was halved, the DCT halves it. The difference to
# Pillow's resize of all pixels is 0.1 to 0.4 of 255 then, in the mean over crops of a photograph; with 2 it is 0.6.
REDUCED = 3

Pixels = NDArray[np.uint8]


def _options(box: tuple[float, float, float, float] | None) -> Any:
    algorithm = resizer.ResizeAlg.convolution(resizer.FilterType.bilinear)
    return resizer.ResizeOptions(algorithm, crop_box=resizer.CropBox(*box) if box else None)


_WHOLE = _options(None)


class Augment:
    """RandAugment on pictures [S, S, 3], with torch's global generator (Cubuk et al., arXiv 1909.13719).

    Args:
        operations: a picture's number of operations, N of the paper.
        magnitude: from 0 to 30, M of the paper.
    """

    def __init__(self, operations: int, magnitude: int) -> None:
        self.transform = v2.RandAugment(operations, magnitude)

    def __call__(self, picture: Pixels) -> Pixels:
        # Of a Pillow image: of a tensor on the CPU these operations take three times as long.
        return np.asarray(self.transform(Image.fromarray(picture)))


class Decoder:
    """Decodes samples into pictures of S x S pixels.

    Args:
        size: S.
        choose: the view of a sample.
        augment: applied to the picture afterwards.
    """

    def __init__(self, size: int, choose: ChooseView, augment: Augment | None = None) -> None:
        self.size, self.choose, self.augment = size, choose, augment
        self._made: Any = None  # resizer and target, made once: a target of its own for each picture costs 2 %

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # they cannot be pickled, and another process makes its own

    def decode(self, sample: Sample, random: Random, out: Pixels) -> None:
        """Decode one sample into `out`, uint8 [S, S, 3].

        Raises:
            DataError: the bytes are not a whole JPEG or PNG within the limits of images.py.
        """
        width, height, simple = image_size(sample)
        view = self.choose(width, height, random)
        region = Region.of(view, width, height, self.size)
        pixels = _decode_simple(sample, region) if simple else None
        picture = self._resize(decode_whole(sample, region) if pixels is None else pixels, region)
        if self.augment is None and not (view.dx or view.dy):
            _copy(picture, out, flip=view.flip)
            return
        picture = _moved(picture, view.dx, view.dy)
        if view.flip:
            picture = np.ascontiguousarray(picture[:, ::-1])
        out[:] = picture if self.augment is None else self.augment(picture)

    def _resize(self, pixels: bytes, region: Region) -> Pixels:
        """uint8 [S, S, 3]: the box of the region, antialiased, as Pillow's resize(..., BILINEAR, box=...)."""
        if self._made is None:
            self._made = resizer.Resizer(), resizer.ImageData(self.size, self.size, resizer.PixelType.U8x3)
        made, target = self._made
        source = resizer.ImageData(region.width, region.height, resizer.PixelType.U8x3, pixels)
        whole = region.box == (0, 0, region.width, region.height)
        made.resize(source, target, _WHOLE if whole else _options(region.box))
        return np.frombuffer(target.get_buffer(), np.uint8).reshape(self.size, self.size, 3)


class Region(NamedTuple):
    """The pixels that a view needs, in the image scaled by eighths / 8, and the box to resize inside them."""

    x: int
    y: int
    width: int
    height: int
    box: tuple[float, float, float, float]  # left, top, width, height
    eighths: int

    @classmethod
    def of(cls, view: View, width: int, height: int, size: int) -> Region:
        """The region of a view of an image of so many pixels, shown on size x size pixels."""
        eighths = 8
        while eighths > 1 and min(view.width, view.height) * eighths / 16 >= REDUCED * size:
            eighths //= 2
        scale = eighths / 8
        x, across, left, wide = _range(view.left, view.width, width, scale, size, view.context)
        y, down, top, high = _range(view.top, view.height, height, scale, size, view.context)
        return cls(x, y, across, down, (left, top, wide, high), eighths)


def _range(
    start: float, length: float, side: int, scale: float, size: int, context: bool
) -> tuple[int, int, float, float]:
    """One axis: first pixel and number of pixels to decode, then start and length of the box inside them."""
    side = math.ceil(side * scale)  # as libjpeg rounds it
    start, length = start * scale, length * scale
    # A bilinear filter reaches one pixel of the smaller of both images to each side.
    reach = math.ceil(max(1.0, length / size)) + 1 if context else 0
    first = max(0, math.floor(start) - reach)
    last = min(side, math.ceil(start + length) + reach)
    start -= first
    return first, last - first, start, min(length, last - first - start)


def image_size(sample: Sample) -> tuple[int, int, bool]:
    """Width and height of an image in pixels from its header, and whether libjpeg-turbo decodes it by regions.

    Raises:
        DataError: it is not a JPEG or PNG, or is larger than the limits of images.py.
    """
    data, simple = sample.image, False
    try:
        if REGIONS and data[:2] == b"\xff\xd8":
            width, height, simple = _jpeg.size(data)
            # A file that does not end as a JPEG does may be cut: what Pillow finds is what counts.
            simple = simple and data[-2:] == b"\xff\xd9"
        else:
            width, height = _size_by_pillow(data)
    except Exception:
        try:
            width, height = _size_by_pillow(data)
        except Exception as error:  # what Pillow raises for broken bytes depends on the format and on where they break
            raise _undecodable(sample, error) from error
    check_limits(width, height, sample.where)
    return width, height, simple


def _size_by_pillow(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        return image.size


def _decode_simple(sample: Sample, region: Region) -> bytes | None:
    """RGB pixels of the region, by libjpeg-turbo; None where it finds something to complain of."""
    try:
        pixels: bytes = _jpeg.decode(sample.image, region.x, region.y, region.width, region.height, region.eighths)
    except ValueError:
        return None
    return pixels


def decode_whole(sample: Sample, region: Region) -> bytes:
    """RGB pixels of the region, by Pillow, which decodes the whole image.

    Raises:
        DataError: the image cannot be decoded, or is a JPEG of too many scans.
    """
    data = sample.image
    check_scans(data, sample.where)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            check_limits(*image.size, sample.where)  # of this header: another reader may have found another
            scale = 8 // region.eighths
            image.draft(None, (image.width // scale, image.height // scale))  # of a JPEG; it does nothing to a PNG
            pixels = to_eight_bits(image).convert("RGB")
            if image.format == "PNG" and scale > 1:
                pixels = pixels.reduce(scale)
            box = (region.x, region.y, region.x + region.width, region.y + region.height)
            return pixels.crop(box).tobytes()
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(sample, error) from error


def _undecodable(sample: Sample, error: Exception) -> DataError:
    return DataError(f"{sample.where} does not decode as JPEG or PNG: {reason(error)}")


def _copy(picture: Pixels, out: Pixels, *, flip: bool) -> None:
    if flip:
        # torch flips channels-last images with SIMD: an eighth of numpy's time.
        source = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
        torch.from_numpy(out).copy_(torch.flip(source, (3,))[0].permute(1, 2, 0))
    else:
        out[:] = picture


def _moved(picture: Pixels, dx: int, dy: int) -> Pixels:
    """The picture moved to the right and down; what is moved in is black."""
    if dx == 0 and dy == 0:
        return picture
    height, width = picture.shape[:2]
    moved = np.zeros_like(picture)
    moved[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = picture[
        max(0, -dy) : height + min(0, -dy), max(0, -dx) : width + min(0, -dx)
    ]
    return moved
