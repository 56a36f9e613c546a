"""The pictures in all formats: batches of 64 crops of 224 pixels, and what they are made of."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SIZE, BATCH = 224, 64
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SHUFFLE = 1000  # samples in a shuffle buffer, where a way has one
Box = tuple[int, int, int, int]  # left, top, width, height
Batches = Iterator[Any]  # pictures, or the number of pictures in the batch
Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Data:
    """One data set in all formats. `shards` and `folder` hold every picture `copies` times, as links."""

    root: Path
    copies: int

    @property
    def single(self) -> Path:
        """Shards of every picture once."""
        return self.root / "single"

    @property
    def shards(self) -> Path:
        return self.root / f"shards-{self.copies}"

    @property
    def written(self) -> Path:
        """The same, written by webdataset's ShardWriter."""
        return self.root / f"written-{self.copies}"

    @property
    def folder(self) -> Path:
        """train/CLASS/KEY.jpg."""
        return self.root / f"folder-{self.copies}"

    def tars(self, folder: Path | None = None) -> list[str]:
        return sorted(map(str, (folder or self.single).glob("*.tar")))

    def samples(self) -> Iterator[tuple[str, bytes, int]]:
        """Key, JPEG and label of every picture once."""
        for name in self.tars():
            with tarfile.open(name) as tar:
                members = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
                for member, stream in members.items():
                    label = members.get(f"{member.removesuffix('.jpg')}.cls")
                    if stream and label:
                        yield Path(member).stem, stream.read(), int(label.read())


def random_box(width: int, height: int, draw: random.Random) -> Box:
    for _ in range(10):
        area = width * height * draw.uniform(*SCALE)
        aspect = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    side = min(width, height)  # all but never reached
    return (width - side) // 2, (height - side) // 2, side, side


def make_once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder under another name first, so that what is there is whole."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    make(unfinished)
    unfinished.rename(path)


def make_base(source: Path, data: Data, short_side: int | None) -> None:
    """Make what every way starts from: shards and a folder of the source's pictures, or of their short side resized."""

    def single(folder: Path) -> None:
        folder.mkdir()
        for path in sorted(source.glob("*.tar")):
            if short_side is None:
                (folder / path.name).symlink_to(path.resolve())
            else:
                _reencode(path, folder / path.name, short_side)

    make_once(data.single, single)
    make_once(data.shards, partial(_copied_shards, data, data.single))
    make_once(data.root / "files", partial(_extract, data))
    make_once(data.folder, partial(_copied_folder, data))


def _reencode(source: Path, target: Path, short_side: int) -> None:
    from PIL import Image

    with tarfile.open(source) as read, tarfile.open(target, "w") as write:
        for member in read:
            stream = read.extractfile(member)
            if stream is None:
                continue
            content = stream.read()
            if member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(content)).convert("RGB")
                factor = short_side / min(image.size)
                size = round(image.width * factor), round(image.height * factor)
                encoded = io.BytesIO()
                image.resize(size, Image.Resampling.BILINEAR).save(encoded, "JPEG", quality=90)
                content = encoded.getvalue()
            info = tarfile.TarInfo(member.name)
            info.size = len(content)
            write.addfile(info, io.BytesIO(content))


def make_written(data: Data) -> None:
    """Shards of webdataset's ShardWriter, with its headers of two blocks more."""

    def write(folder: Path) -> None:
        import webdataset as wds

        folder.mkdir()
        with wds.ShardWriter(str(folder / "train-%06d.tar"), maxcount=125, verbose=0) as writer:
            for key, jpeg, label in data.samples():
                writer.write({"__key__": key, "jpg": jpeg, "cls": label})

    once = data.root / "written"
    make_once(once, write)
    make_once(data.written, partial(_copied_shards, data, once))


def _copied_shards(data: Data, single: Path, folder: Path) -> None:
    from qsr_engine.data import index_shards

    folder.mkdir()
    for number, (_, tar) in enumerate(itertools.product(range(data.copies), data.tars(single))):
        (folder / f"train-{number:06d}.tar").symlink_to(Path(tar).resolve())
    split = index_shards(folder).splits["train"]
    timm_split = {
        "name": "train",
        "num_samples": split.samples,
        "filenames": [shard.name for shard in split.shards],
        "shard_lengths": [shard.samples for shard in split.shards],
    }
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": timm_split}}), encoding="utf-8")


def _extract(data: Data, folder: Path) -> None:
    for key, jpeg, label in data.samples():
        path = folder / f"{label:04d}" / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)


def _copied_folder(data: Data, folder: Path) -> None:
    for path in sorted((data.root / "files").glob("*/*.jpg")):
        target = folder / "train" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(data.copies):
            (target / f"{path.stem}-{copy}.jpg").symlink_to(path.resolve())
