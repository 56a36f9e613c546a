"""Feeds damaged JPEGs, random plans and random operations to a build of _jpeg: `python pictures.py FOLDER COUNT SEED`.

FOLDER holds a `_jpeg` module, one with sanitizers as a rule, which end the process where they find something. Here is
checked what they cannot see: a picture that is given must not depend on what was decoded before it.
"""

from __future__ import annotations

import io
import random
import sys
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Change = Callable[[random.Random, bytearray], None]


def files() -> list[bytes]:
    """Every kind that is taken, and kinds that are not."""
    y, x = np.mgrid[:70, :90]
    image = Image.fromarray(np.stack([x * 2, y * 3, (x * y) % 256], 2).astype(np.uint8))
    kinds: list[tuple[Image.Image, dict[str, Any]]] = [
        *((image, {"subsampling": n, "restart_marker_blocks": blocks}) for n in (0, 1, 2) for blocks in (0, 3)),
        (image.convert("L"), {}),
        (image.convert("CMYK"), {}),
        (image, {"progressive": True}),
        (image, {"keep_rgb": True}),
        (image.resize((1, 1)), {}),
        (image.resize((300, 9)), {}),
        (image.resize((9, 300)), {}),
    ]
    found = []
    for picture, options in kinds:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=80, **options)
        found.append(stream.getvalue())
    return found


def in_frame(offset: int, values: Callable[[random.Random], bytes]) -> Change:
    def change(draw: random.Random, data: bytearray) -> None:
        frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        if frame >= 0:
            new = values(draw)
            data[frame + offset : frame + offset + len(new)] = new

    return change


def cut(draw: random.Random, data: bytearray) -> None:
    del data[draw.randrange(len(data)) :]


def overwrite(draw: random.Random, data: bytearray) -> None:
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] = draw.randrange(256)


def double(draw: random.Random, data: bytearray) -> None:
    at = draw.randrange(len(data))
    data[at:at] = data[at : at + draw.randrange(300)]


def without_tables(draw: random.Random, data: bytearray) -> None:
    marker = draw.choice([b"\xff\xdb", b"\xff\xc4"])
    if (at := data.find(marker)) >= 0:
        del data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]


def nothing(draw: random.Random, data: bytearray) -> None:
    pass


CHANGES: list[Change] = [
    nothing,
    cut,
    overwrite,
    double,
    without_tables,
    in_frame(1, lambda draw: bytes([draw.choice([0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA])])),  # progressive, arithmetic
    in_frame(4, lambda draw: bytes([draw.choice([2, 8, 12, 16])])),  # bits
    in_frame(5, lambda draw: draw.choice([0, 1, 16, 1000, 65500, 65535]).to_bytes(2, "big")),  # rows
    in_frame(7, lambda draw: draw.choice([0, 1, 16, 1000, 65500, 65535]).to_bytes(2, "big")),  # columns
    in_frame(11, lambda draw: bytes([draw.choice([0x11, 0x21, 0x12, 0x22, 0x41, 0x44, 0x00])])),  # sampling
]
VALUES = [-1.0, 0.0, 0.5, 1.0, 3.0, 8.0, 9.5, 1e9, -1e300, float("inf"), float("nan")]


def plan(draw: random.Random, width: int, height: int) -> list[float]:
    """One inside the image, mostly."""
    eighths = draw.choice([8, 8, 4, 2, 1])
    across, down = -(-width * eighths // 8), -(-height * eighths // 8)
    x, y = draw.randrange(across), draw.randrange(down)
    w, h = draw.randint(1, min(400, across - x)), draw.randint(1, min(400, down - y))
    left, top = draw.uniform(0, 0.9) * w, draw.uniform(0, 0.9) * h
    right, bottom = draw.choice([w, draw.uniform(left, w)]), draw.choice([h, draw.uniform(top, h)])
    values: list[float] = [0, x, y, w, h, eighths, left, top, right, bottom, draw.randrange(2)]
    if draw.random() < 0.05:
        values[draw.randrange(len(values))] = draw.choice(VALUES)
    return values


def operations(draw: random.Random) -> list[float]:
    found: list[float] = []
    for _ in range(2):
        kind, values = draw.randint(-1, 9), [draw.uniform(-3, 9) for _ in range(6)]
        if draw.random() < 0.05:
            values[draw.randrange(6)] = draw.choice(VALUES)
        found += [float(draw.choice([kind, kind, kind, draw.choice(VALUES)])), *values]
    return found


def main() -> None:
    folder, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, folder)
    import _jpeg  # type: ignore[import-not-found]

    draw, seeds = random.Random(seed), files()
    good, bad = 0, 0
    for _ in range(count):
        data = bytearray(draw.choice(seeds))
        draw.choice(CHANGES)(draw, data)
        if not data:
            continue
        try:
            width, height, _ = _jpeg.size(bytes(data))
            size, planned, doing = draw.choice([1, 7, 16, 33]), array("d"), array("d", operations(draw))
            planned.extend(plan(draw, width, height))
            _jpeg.decode(bytes(data), *map(int, planned[1:6])) if draw.random() < 0.1 else None
            pictures = []
            for before in (seeds[0], seeds[6]):  # what buffers and tables hold when the picture comes
                out = np.full((1, size, size, 3), len(before) % 256, np.uint8)
                _jpeg.decode_batch([before], array("d", [0, 0, 0, 90, 70, 8, 0, 0, 90, 70, 0]), b"", out, size)
                said = _jpeg.decode_batch([bytes(data)], planned, doing, out, size, draw.randint(1, 3))
                pictures.append(None if said[0] else out.copy())
        except (ValueError, OverflowError, MemoryError):
            bad += 1
            continue
        one, other = pictures
        if one is None or other is None:
            assert one is other
            bad += 1
        else:
            assert np.array_equal(one, other), (bytes(data), planned, doing)
            good += 1
    print(good, bad)


if __name__ == "__main__":
    main()
