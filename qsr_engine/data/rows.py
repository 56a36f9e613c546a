"""What the index keeps of every sample: where its image lies, how large the picture is, its label. No numpy, no torch.

A row has 26 bytes. `samples.npy` beside index.json holds the rows of all samples, in the order of the splits and shards
of index.json, as one array of numpy (`table.py`).
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import NamedTuple

from PIL import Image

from qsr_engine.data.images import FORMATS

PACKED = struct.Struct("<QIIIiBB")
FIELDS = [  # as numpy has them
    *(("offset", "<u8"), ("length", "<u4"), ("width", "<u4"), ("height", "<u4"), ("label", "<i4")),
    *(("header", "u1"), ("fast", "u1")),
]
_SAMPLINGS = ((1, 1), (2, 1), (2, 2))  # of luma, across and down, where both colours have (1, 1)
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # markers of JPEG without a length
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those that begin a frame: SOF0 to SOF15


class Row(NamedTuple):
    """A sample.

    `offset` and `length` are those of the image in its shard, in bytes; `header` is the number of blocks of 512 bytes
    before it that are its headers. `width` and `height` are in pixels, 0 where the image's header cannot be read.
    `fast`: whether the kind of image is one that is decoded by regions.
    """

    offset: int
    length: int
    width: int
    height: int
    label: int
    header: int
    fast: int


class Header(NamedTuple):
    """What the header of an image says: its size in pixels, and whether it is of a kind that is decoded by regions."""

    width: int
    height: int
    fast: bool


def header_of(image: bytes) -> Header:
    """The header of a JPEG, PNG or WebP; zeros where there is none that can be read, and of a block of tokens."""
    if image.startswith(b"\x93NUMPY"):
        return Header(0, 0, False)
    found = _of_jpeg(image) if image[:2] == b"\xff\xd8" else None
    if found is not None:
        return found
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                return Header(*opened.size, False)
    except Exception:  # what Pillow raises for broken bytes depends on the format and on where they break
        return Header(0, 0, False)


def pack(offset: int, image: bytes, label: int, header: int) -> bytes:
    """The row of an image whose bytes are here."""
    width, height, fast = header_of(image)
    return PACKED.pack(*Row(offset, len(image), width, height, label, header, fast))


def _of_jpeg(data: bytes) -> Header | None:
    """From the markers up to the first scan: colours are found as libjpeg finds them."""
    at, frame, jfif, adobe = 2, b"", False, -1
    kind = 0
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if marker in _FRAMES:
            kind, frame = marker, body
        elif marker == 0xE0 and body[:5] == b"JFIF\0":
            jfif = True
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker == 0xDA:
            return _of_frame(kind, frame, body, jfif, adobe, whole=data[-2:] == b"\xff\xd9")
        at += 2 + length
    return None


def _of_frame(kind: int, frame: bytes, scan: bytes, jfif: bool, adobe: int, *, whole: bool) -> Header | None:
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5] or not scan:
        return None
    height, width, count = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5]
    if not (width and height):
        return None
    names = frame[6 : 6 + 3 * count : 3]
    samplings = [(value >> 4, value & 15) for value in frame[7 : 7 + 3 * count : 3]]
    if count == 3:
        plain = jfif or (adobe != 0 if adobe >= 0 else names != b"RGB")
        colours = plain and samplings[0] in _SAMPLINGS and samplings[1:] == [(1, 1), (1, 1)]
    else:
        colours = count == 1 and samplings == [(1, 1)]
    one_scan = scan[0] == count
    return Header(width, height, whole and kind in (0xC0, 0xC1) and frame[0] == 8 and one_scan and colours)
