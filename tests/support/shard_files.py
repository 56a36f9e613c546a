"""Small images and tar files for the tests of shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path, counts: dict[str, int], name: str = "{}.png") -> None:
    """So many small images in each folder, each of another grey."""
    grey = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            image = Image.new("L", (4, 4), grey := grey + 1)
            image.save(root / folder / name.format(number), format="JPEG" if "j" in name.lower() else "PNG")


def picture(width: int, height: int, *, mode: str = "RGB", kind: str = "JPEG", seed: int = 0) -> bytes:
    """An image file of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(stream, format=kind)
    return stream.getvalue()


def tar_bytes(content: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def write_tar(path: Path, content: dict[str, bytes]) -> None:
    path.write_bytes(tar_bytes(content))


def read_folder(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
