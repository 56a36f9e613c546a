"""Make a folder of shards with its index: from a folder of images, from scikit-learn's digits, or from existing shards.

The same input and seed give the same bytes. Shards are written first, each under a temporary name, and the index
last: a folder with an index is whole.
"""

from __future__ import annotations

import io
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from qsr_engine.data.index import DataError, Index, Split, measure_shard, refuse_existing_index, write_index

Item = TypeVar("Item")

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png"}  # of image files, to members of a shard
DIGITS_EVAL = 360  # of scikit-learn's 1,797 digits; the other 1,437 are for training


def write_imagefolder(
    root: str | Path,
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    split: str | None = None,
) -> Index:
    """Write shards from images in ImageNet's layout, ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.

    Sub-folders of root named train, val, validation (it becomes val) and test are splits. Without any of them, or
    with `split` given, root itself is one split, ROOT/CLASS/*, named `split` or "train". The class names in sorted
    order are the labels from 0. Image files (.jpg, .jpeg, .png) are stored byte for byte, in an order shuffled by seed.

    Raises:
        DataError: there are no classes, a class has no images, a split has a class that training has not, a file
            cannot be read, or out holds an index already.
    """
    root, out = Path(root), Path(out)
    _check_options(samples_per_shard, split)
    folders = _split_folders(root, split)
    classes = _class_names(folders.get("train") or next(iter(folders.values())))
    files = {name: _image_files(folder, classes) for name, folder in folders.items()}
    _make_folder(out)
    splits = {}
    for name, labelled in files.items():
        random.Random(seed).shuffle(labelled)
        splits[name] = _write_split(out, name, labelled, _load_file, samples_per_shard)
    return _finish(out, Index(classes=classes, splits=splits))


def write_digits(out: str | Path, *, samples_per_shard: int = 128, seed: int = 0) -> Index:
    """Write scikit-learn's 1,797 grey 8x8 digits as PNG: 1,437 in the split "train" and 360 in "val".

    Raises:
        DataError: out holds an index already.
    """
    from sklearn.datasets import load_digits  # takes a second to import, and only this function reads it

    _check_options(samples_per_shard, None)
    out = Path(out)
    _make_folder(out)
    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(seed).shuffle(order)

    def load(number: int) -> tuple[str, bytes, int]:
        return "png", _encode_digit(digits.images[number]), int(digits.target[number])

    parts = {"train": order[DIGITS_EVAL:], "val": order[:DIGITS_EVAL]}
    splits = {name: _write_split(out, name, part, load, samples_per_shard) for name, part in parts.items()}
    return _finish(out, Index(classes=[str(name) for name in digits.target_names], splits=splits))


def index_shards(folder: str | Path) -> Index:
    """Write the index of a folder of tar shards named SPLIT-NUMBER.tar. Every shard is read once.

    Class names are not known afterwards (None), so labels are not checked against them.

    Raises:
        DataError: there are no shards, a name has no split, a shard cannot be read or is empty, a sample has no image
            or no label, or there is an index already.
    """
    from qsr_engine.data import shards  # webdataset imports torch, which takes seconds

    folder = Path(folder)
    refuse_existing_index(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: there are no tar shards here; expected files such as {folder / 'train-000000.tar'}")
    found: dict[str, list[tuple[Path, int]]] = {}
    for path in tqdm(paths, desc="reading", unit="shard", disable=None):
        split, _, number = path.stem.rpartition("-")
        if not (split and number):
            raise DataError(f"{path}: this name does not say its split; rename it as train-000000.tar is named")
        samples = sum(1 for raw in shards.read_shard(path) if shards.parse_sample(path, raw, None))
        if samples == 0:
            raise DataError(f"{path}: this shard has no samples; delete it")
        found.setdefault(split, []).append((path, samples))
    splits = {
        split: Split(samples=sum(n for _, n in counted), shards=[measure_shard(path, n) for path, n in counted])
        for split, counted in found.items()
    }
    return _finish(folder, Index(classes=None, splits=splits))


def _check_options(samples_per_shard: int, split: str | None) -> None:
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}; write a number of at least 1")
    if split is not None and not re.fullmatch(r"\w+([.\-]\w+)*", split):
        raise DataError(f"the split name is {split!r}; write letters, digits, and single - or . between them")


def _make_folder(out: Path) -> None:
    refuse_existing_index(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: this folder cannot be made: {error.strerror}; choose another one") from error


def _finish(out: Path, index: Index) -> Index:
    write_index(out, index)
    return index


def _write_split(
    out: Path, split: str, items: Sequence[Item], load: Callable[[Item], tuple[str, bytes, int]], samples_per_shard: int
) -> Split:
    """Write the items in their order; `load` gives the image's suffix, its bytes and the label of one."""
    from qsr_engine.data.shards import write_shard  # webdataset imports torch, which takes seconds

    shards = []
    firsts = range(0, len(items), samples_per_shard)
    for shard, first in enumerate(tqdm(firsts, desc=split, unit="shard", disable=None)):
        numbered = enumerate(items[first : first + samples_per_shard], first)
        samples = ((f"{number:08d}", *load(item)) for number, item in numbered)
        shards.append(write_shard(out / f"{split}-{shard:06d}.tar", samples))
    return Split(samples=len(items), shards=shards)


def _split_folders(root: Path, split: str | None) -> dict[str, Path]:
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; name the folder that holds train/ and val/, or the classes")
    if split is not None:
        return {split: root}
    found: dict[str, Path] = {}
    for name, of_split in SPLIT_FOLDERS.items():
        if (root / name).is_dir():
            if of_split in found:
                raise DataError(f"{root}: both {found[of_split].name} and {name} are here; keep one of them")
            found[of_split] = root / name
    return found or {"train": root}


def _class_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: there are no class folders here; write one folder of images for each class")
    return names


def _image_files(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """(path, label) of every image of a split, sorted by class and name; str, as ImageNet has 1.3 million of them."""
    labelled = []
    for name in _class_names(folder):
        if name not in classes:
            raise DataError(f"{folder / name}: training has no class {name!r}; add it there, or take it away here")
        files = sorted(file for file in os.listdir(folder / name) if Path(file).suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{folder / name}: there are no images here (.jpg, .jpeg or .png); add some or delete it")
        labelled += [(os.path.join(folder, name, file), classes.index(name)) for file in files]
    return labelled


def _load_file(labelled: tuple[str, int]) -> tuple[str, bytes, int]:
    path, label = Path(labelled[0]), labelled[1]
    try:
        image = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: this image cannot be read: {error.strerror or error}") from error
    if not image:
        raise DataError(f"{path}: this image is an empty file; replace or delete it")
    return SUFFIXES[path.suffix.lower()], image, label


def _encode_digit(image: object) -> bytes:
    """PNG, mode L, of an 8x8 array of values from 0 to 16."""
    import numpy as np
    from PIL import Image

    pixels = np.round(np.asarray(image) * (255 / 16)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
