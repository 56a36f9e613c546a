"""From the bytes of images to the pixels of their views: decode what a view needs, resize it, augment it.

JPEG images of the usual kinds are made by one call of compiled code for all pictures (`_batch.c`): libjpeg-turbo
decodes the rows and columns of the view only. All others, and all where that extension is not there, are made by
Pillow. Both give the same pixels, those of Pillow's resize(..., BILINEAR, box=...). Pictures are uint8 [S, S, 3].
"""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsr_engine.data.errors import DataError
from qsr_engine.data.images import FORMATS, check_limits, check_scans, reason, to_eight_bits
from qsr_engine.data.randaugment import MOVE, NO_OPERATION, Augment, Composer, Drawn, encoded
from qsr_engine.data.samples import Loaded, Placed, Sample
from qsr_engine.data.views import ChooseView, View

try:
    from qsr_engine.data import _jpeg
except ImportError as error:  # no compiler or no libjpeg-turbo when the package was installed
    REGIONS, NO_REGIONS = False, f"qsr_engine.data._jpeg was not built: {error}"
else:
    REGIONS, NO_REGIONS = True, ""

# Where a crop is so many times larger than the picture even after it was halved, the DCT halves it. The difference to
# Pillow's resize of all pixels is 0.1 to 0.4 of 255 then, in the mean over crops of a photograph; with 2 it is 0.6.
REDUCED = 3

Pixels = NDArray[np.uint8]


class Decoder:
    """Decodes samples into pictures of S x S pixels.

    Args:
        size: S.
        choose: the view of a sample.
        augment: applied to the pictures afterwards.
        threads: that decode at the same time.
    """

    def __init__(self, size: int, choose: ChooseView, augment: Augment | None = None, threads: int = 1) -> None:
        self.size, self.choose, self.augment, self.threads = size, choose, augment, threads
        self.shape: tuple[int, ...] = (size, size, 3)

    @property
    def of_torch(self) -> bool:
        """Whether it draws from torch's global generator."""
        return self.augment is not None and self.augment.of_torch

    def decode(self, samples: Sequence[Loaded], random: Random, out: Pixels) -> dict[int, DataError]:
        """Decode samples into `out`, uint8 [B, S, S, 3].

        Returns:
            By number what is wrong with a sample, or was before: its bytes are not a whole JPEG, PNG or WebP within
            the limits of images.py. Its picture is anything.
        """
        bad: dict[int, DataError] = {}
        jobs: list[_Job] = []
        for number, sample in enumerate(samples):
            try:
                if isinstance(sample, DataError):
                    raise sample
                jobs.append(self._job(number, sample, random))
            except DataError as error:
                bad[number] = error
        for job in self._decode_simple(jobs, out):
            try:
                self._decode_whole(job, out[job.number])
            except DataError as error:
                bad[job.number] = error
        if self.augment is not None and not isinstance(self.augment, Composer):
            for job in jobs:
                if job.number not in bad:
                    out[job.number] = self.augment(out[job.number], random)
        return bad

    def _job(self, number: int, sample: Sample | Placed, random: Random) -> _Job:
        """What is drawn for a sample, all of it before anything is decoded."""
        width, height, simple = image_size(sample)
        view = self.choose(width, height, random)
        drawn = self.augment.draw(random, self.size) if isinstance(self.augment, Composer) else []
        return _Job(number, sample, view, Region.of(view, width, height, self.size), simple, drawn)

    def _decode_simple(self, jobs: Sequence[_Job], out: Pixels) -> list[_Job]:
        """By libjpeg-turbo, in one call. Returns the jobs that it does not take, or finds something to complain of."""
        simple = [job for job in jobs if job.simple]
        if not simple:
            return list(jobs)
        plans, operations = array("d"), array("d")
        lists = [job.operations(self.size) for job in simple]
        most = max(map(len, lists))
        for job, listed in zip(simple, lists, strict=True):
            plans.extend((job.number, *job.region[:4], job.region.eighths, *job.region.box, job.view.flip))
            for values in [*listed, *[NO_OPERATION] * (most - len(listed))]:
                operations.extend(values)
        sources = [one.extent if isinstance(one, Placed) else one.image for one in (job.sample for job in simple)]
        found = _jpeg.decode_batch(sources, plans, operations, out, self.size, self.threads)
        failed = {job.number for job, message in zip(simple, found, strict=True) if message is not None}
        return [job for job in jobs if not job.simple or job.number in failed]

    def _decode_whole(self, job: _Job, out: Pixels) -> None:
        """By Pillow. Raises DataError where the image cannot be decoded."""
        pixels, view = decode_whole(job.sample.whole(), job.region), job.view
        shown = pixels.resize((self.size, self.size), Image.Resampling.BILINEAR, job.region.box)
        picture = _moved(np.asarray(shown), view.dx, view.dy)
        out[:] = picture[:, ::-1] if view.flip else picture
        if isinstance(self.augment, Composer):
            out[:] = self.augment.apply(out, job.drawn)


class _Job(NamedTuple):
    """A sample, its place in the batch, and what was drawn for it."""

    number: int
    sample: Sample | Placed
    view: View
    region: Region
    simple: bool
    drawn: Drawn

    def operations(self, side: int) -> list[tuple[float, ...]]:
        """What is done to the picture, as compiled code reads it. It is flipped already when it is moved."""
        dx, dy = self.view.dx, self.view.dy
        moved = [(MOVE, dx if self.view.flip else -dx, -dy, 0, 0, 0, 0)] if dx or dy else []
        return [*moved, *encoded(self.drawn, side)]


class Region(NamedTuple):
    """The pixels that a view may show, in the image scaled by eighths / 8, and the box to resize inside them."""

    x: int
    y: int
    width: int
    height: int
    box: tuple[float, float, float, float]  # left, top, right, bottom
    eighths: int

    @classmethod
    def of(cls, view: View, width: int, height: int, size: int) -> Region:
        """The region of a view of an image of so many pixels, shown on size x size pixels."""
        eighths = 8
        while eighths > 1 and min(view.width, view.height) * eighths / 16 >= REDUCED * size:
            eighths //= 2
        scale = eighths / 8
        x, across, left, right = _range(view.left, view.width, width, scale, view.context)
        y, down, top, bottom = _range(view.top, view.height, height, scale, view.context)
        return cls(x, y, across, down, (left, top, right, bottom), eighths)


def _range(start: float, length: float, side: int, scale: float, context: bool) -> tuple[int, int, float, float]:
    """One axis: first pixel and number of pixels of the region, then where the box begins and ends inside them."""
    side = math.ceil(side * scale)  # as libjpeg rounds it
    start, end = max(0.0, start * scale), min(side, (start + length) * scale)
    first, last = (0, side) if context else (math.floor(start), math.ceil(end))
    return first, last - first, start - first, end - first


def image_size(sample: Sample | Placed) -> tuple[int, int, bool]:
    """Width and height of an image in pixels, and whether libjpeg-turbo decodes it by regions: from the index, or where
    that does not know them from the header.

    Raises:
        DataError: it is not a JPEG, PNG or WebP, or is larger than the limits of images.py.
    """
    if isinstance(sample, Placed):
        return sample.header.width, sample.header.height, REGIONS
    data, simple = sample.image, False
    if sample.header is not None:  # decoders check that the crop lies in the image, or that this is its size
        width, height, simple = sample.header
        check_limits(width, height, sample.where)
        return width, height, simple and REGIONS
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
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.size


def decode_whole(sample: Sample, region: Region) -> Image.Image:
    """RGB of the region, by Pillow, which decodes the whole image.

    Raises:
        DataError: the image cannot be decoded, or is a JPEG of too many scans.
    """
    data = sample.image
    check_scans(data, sample.where)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_limits(*image.size, sample.where)  # of this header: another reader may have found another
            if sample.header is not None and image.size != sample.header[:2]:
                known = "{} x {} pixels, and its index says {} x {}".format(*image.size, *sample.header[:2])
                raise DataError(f"{sample.where} has {known}; `qsr shards index DIR --again` makes the index again")
            scale = 8 // region.eighths
            image.draft(None, (image.width // scale, image.height // scale))  # of a JPEG; it does nothing to a PNG
            pixels = to_eight_bits(image).convert("RGB")
            if image.format != "JPEG" and scale > 1:
                pixels = pixels.reduce(scale)
            box = (region.x, region.y, region.x + region.width, region.y + region.height)
            return pixels.crop(box)
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(sample, error) from error


def _undecodable(sample: Sample, error: Exception) -> DataError:
    return DataError(f"{sample.where} does not decode as JPEG, PNG or WebP: {reason(error)}")


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


def _check_regions() -> str:
    """Why compiled code is not used: its picture of a small image is not Pillow's. Empty where it is."""
    y, x = np.mgrid[:90, :120]
    pixels = np.stack([x * 2, y * 2, (x * y) % 256], 2).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    sample = Sample("", "", stream.getvalue(), 0)
    found = np.zeros((2, 16, 16, 3), np.uint8)
    view = View(7, 5, 90, 80, flip=True)
    decoder = Decoder(16, lambda width, height, random: view)
    try:
        width, height, simple = _jpeg.size(sample.image)
        job = _Job(0, sample, view, Region(7, 5, 90, 80, (0, 0, 90, 80), 8), simple, [])
        left = decoder._decode_simple([job], found)
        decoder._decode_whole(job, found[1])
    except (ValueError, DataError, OSError) as error:
        return f"it failed: {error}"
    if left or (width, height) != (120, 90):
        return "it does not decode a plain JPEG"
    return "" if np.array_equal(*found) else "its pixels are not Pillow's; are both built for one libjpeg-turbo?"


if REGIONS and (NO_REGIONS := _check_regions()):
    REGIONS, NO_REGIONS = False, f"qsr_engine.data._jpeg was built, and {NO_REGIONS}"
