"""Small images and tar files for the tests of shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from qsr_engine.data.index import TOKENS, Index, Split
from qsr_engine.data.samples import IMAGE_SUFFIXES, Sample
from qsr_engine.data.writing.folder import write_index
from qsr_engine.data.writing.shard import Written, write_shard


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


@cache
def noise(seed: int, mode: str = "PNG") -> bytes:
    """An image file of 8 x 8 pixels of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=mode)
    return stream.getvalue()


def shards_of(folder: Path, sizes: list[int], kind: str = "PNG") -> tuple[Path, Index]:
    """Noise images in shards of so many samples; label and key of each are its number. One split, "all"."""
    written, first = [], 0
    for shard, size in enumerate(sizes):
        suffix = "png" if kind == "PNG" else "jpg"
        samples = [(f"{n:08d}", suffix, noise(n, kind), n) for n in range(first, first + size)]
        written.append(write_shard(folder / f"all-{shard:06d}.tar", samples))
        first += size
    return folder, indexed(folder, written)


def indexed(folder: Path, written: Sequence[Written]) -> Index:
    """The index of written shards, one split "all", on disk with its table."""
    shards = [one.shard for one in written]
    split = Split(samples=sum(shard.samples for shard in shards), shards=shards)
    return write_index(folder, Index(classes=None, splits={"all": split}), [one.rows for one in written])


def read_members(path: Path) -> list[tuple[str, bytes]]:
    """Name and bytes of every file of a shard, as Python's tarfile reads them."""
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isfile()]  # type: ignore[union-attr]


def read_samples(folder: Path, index: Index, split: str) -> list[Sample]:
    """All samples of a split, in the order of its shards."""
    found = []
    for shard in index.split(split).shards:
        members = read_members(folder / shard.name)
        suffixes = IMAGE_SUFFIXES if index.text is None else (TOKENS,)
        labels = {Path(name).stem: int(data) for name, data in members if name.endswith(".cls")}
        found += [
            Sample(str(folder / shard.name), Path(name).stem, data, labels.get(Path(name).stem, 0))
            for name, data in members
            if Path(name).suffix[1:] in suffixes
        ]
    return found


def with_field(data: bytes, header: int, at: int, value: bytes) -> bytes:
    """A tar file with other bytes in one of its headers, and the right checksum."""
    changed = bytearray(data)
    changed[header + at : header + at + len(value)] = value
    changed[header + 148 : header + 156] = b" " * 8
    changed[header + 148 : header + 156] = b"%06o\0 " % sum(changed[header : header + 512])
    return bytes(changed)


def decoded(sample: Sample) -> Image.Image:
    return Image.open(io.BytesIO(sample.image))
