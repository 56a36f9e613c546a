"""Make a folder of shards with its index: from images, or from small data sets of others.

The same input, options and seed give the same bytes, for any number of processes, and whether or not the command was
killed and run again. A folder with an index is whole.
"""

from __future__ import annotations

import hashlib
import random
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from qsr_engine.config.extras import check_extra
from qsr_engine.data.errors import DataError
from qsr_engine.data.images import Shrink, encode_png, encoder_version, image_suffix, shrink_image
from qsr_engine.data.index import Index
from qsr_engine.data.writing.counted import say_passed_over
from qsr_engine.data.writing.folder import refuse_data_set
from qsr_engine.data.writing.imagefolder import find_images
from qsr_engine.data.writing.resuming import ShardPlan, ShardSize, write_planned
from qsr_engine.data.writing.stored import StoredImage

SHARD_BYTES = 256_000_000  # seconds of reading on a slow disk, and 600 shards of ImageNet for the ranks to share
QUALITY = 90  # of JPEG, where images are made smaller
CIFAR10_ROOT = Path("~/.cache/qsr_engine")
DIGITS, DIGITS_EVAL = 1797, 360  # scikit-learn's, and those of them in "val" unless said; the others are for training
DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def write_imagefolder(
    root: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    samples_per_shard: int | None = None,
    seed: int = 0,
    split: str | None = None,
    max_side: int | None = None,
    short_side: int | None = None,
    quality: int | None = None,
    processes: int = 1,
    say: Callable[[str], object] = print,
) -> Index:
    """Write shards from images in ImageNet's layout, ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.

    Sub-folders of root named train, val, validation (it becomes val) and test are splits. In place of train and val
    root may hold the archives ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz.
    Without any of them, or with `split` given, root itself is one split, ROOT/CLASS/*, named `split` or "train". The
    class names in sorted order are the labels from 0. Images (.jpg, .jpeg, .png, .webp) are shuffled once by seed, and
    stored byte for byte unless max_side or short_side is given.

    When this was killed, call it again: finished shards are kept where they still have their checksums.

    Args:
        shard_bytes: a shard has at most so many, unless it holds one image alone. Counted before images are made
            smaller, so that the same samples are in a shard for any quality.
        samples_per_shard: images in a shard, in place of shard_bytes.
        max_side: images whose long side has more pixels are resized to it, and become JPEG.
        short_side: the same for the short side; give one of them.
        quality: of that JPEG, 1 to 100, 90 by default.
        say: told which files lie beside the images and are passed over, a line for each kind.
        processes: number of processes that write. More than one needs a script with `if __name__ == "__main__":`.
    Raises:
        DataError: there are no classes, a class has no images, a split has a class that training has not, a file is
            empty, cannot be read or written, or is no image; an archive is broken; out holds another data set, or
            lies in a folder whose images are listed; an image to be resized is larger than training takes.
    """
    _check_options(split, shard_bytes=shard_bytes, samples_per_shard=samples_per_shard, processes=processes)
    shrink = _shrink(max_side, short_side, quality)
    root, out = Path(root), Path(out)
    refuse_data_set(out)  # before a million files are listed
    images = find_images(root, split, out)
    say_passed_over([("", images.passed_over)], say)
    for sources in images.splits.values():
        random.Random(seed).shuffle(sources)
    shard_size = ShardSize(None if samples_per_shard else shard_bytes, samples_per_shard)
    identity = {
        "images": images.digest,
        "seed": seed,
        "shard_bytes": shard_size.bytes,
        "samples_per_shard": shard_size.samples,
        **(shrink._asdict() if shrink else dict.fromkeys(Shrink._fields)),
        "encoder": encoder_version() if shrink else None,
    }
    sizes = {name: [source.size for source in sources] for name, sources in images.splits.items()}
    load = partial(_load_image, shrink=shrink)
    return write_planned(out, ShardPlan(images.classes, images.splits, sizes, load, shard_size, identity), processes)


def write_digits(
    out: str | Path, *, eval_samples: int = DIGITS_EVAL, samples_per_shard: int = 128, seed: int = 0
) -> Index:
    """Write scikit-learn's 1,797 grey 8x8 digits as PNG: eval_samples in the split "val", the others in "train".

    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: out holds another data set, or cannot be written; eval_samples leaves nothing for a split.
    """
    if not 0 < eval_samples < DIGITS:
        raise DataError(f"eval_samples is {eval_samples} of {DIGITS} digits; write a number from 1 to {DIGITS - 1}")
    check_extra("demo", "scikit-learn", "`qsr shards digits`", module="sklearn")
    import numpy as np
    from sklearn.datasets import load_digits  # takes a second to import, and only this function reads it

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = list(range(len(pixels)))
    random.Random(seed).shuffle(order)
    splits = {"train": order[eval_samples:], "val": order[:eval_samples]}
    classes = [str(name) for name in digits.target_names]
    return _write_arrays(
        out,
        classes,
        {name: _Arrays(pixels, digits.target, order) for name, order in splits.items()},
        seed,
        samples_per_shard,
    )


def write_cifar10(
    out: str | Path, *, root: str | Path | None = None, samples_per_shard: int = 1000, seed: int = 0
) -> Index:
    """Write torchvision's CIFAR-10 as PNG: its training images in the split "train", and its test images in "val".

    Args:
        root: folder with cifar-10-batches-py or cifar-10-python.tar.gz; what is missing there is downloaded (170 MB).
            By default ~/.cache/qsr_engine.
    Raises:
        DataError: the data cannot be downloaded; out holds another data set, or cannot be written.
    """
    from torchvision.datasets import CIFAR10  # imports torch, which takes seconds

    refuse_data_set(Path(out))
    folder = (CIFAR10_ROOT if root is None else Path(root)).expanduser()
    try:
        with _timeout(DOWNLOAD_TIMEOUT):
            parts = {"train": CIFAR10(folder, train=True, download=True), "val": CIFAR10(folder, train=False)}
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{folder}: CIFAR-10 is not here and cannot be downloaded ({error}); put {CIFAR10.filename} from "
            f"{CIFAR10.url} into this folder, or name a folder that has it with --root"
        ) from error
    splits = {}
    for name, part in parts.items():
        order = list(range(len(part.targets)))
        random.Random(seed).shuffle(order)
        splits[name] = _Arrays(part.data, part.targets, order)
    return _write_arrays(out, list(parts["train"].classes), splits, seed, samples_per_shard)


class _Arrays(NamedTuple):
    """Images in memory, uint8 [N, H, W] or [N, H, W, 3], and which of them are written in which order."""

    pixels: Any
    labels: Any
    order: list[int]


def _write_arrays(
    out: str | Path, classes: list[str], splits: Mapping[str, _Arrays], seed: int, samples_per_shard: int
) -> Index:
    _check_options(None, samples_per_shard=samples_per_shard)
    sha256 = hashlib.sha256()
    for arrays in splits.values():
        sha256.update(arrays.pixels[arrays.order].tobytes())
        sha256.update(str([int(arrays.labels[number]) for number in arrays.order]).encode())

    def load(item: tuple[str, int]) -> tuple[str, bytes, int]:
        pixels, labels, _ = splits[item[0]]
        return "png", encode_png(pixels[item[1]]), int(labels[item[1]])

    plan = ShardPlan(
        classes,
        splits={name: [(name, number) for number in arrays.order] for name, arrays in splits.items()},
        sizes={name: [0] * len(arrays.order) for name, arrays in splits.items()},  # shards end by number of samples
        load=load,
        shard_size=ShardSize(None, samples_per_shard),
        identity={"images": sha256.hexdigest(), "seed": seed, "samples_per_shard": samples_per_shard},
    )
    return write_planned(Path(out), plan, processes=1)


def _load_image(source: StoredImage, *, shrink: Shrink | None) -> tuple[str, bytes, int]:
    data = source.read()
    if shrink is not None:
        data = shrink_image(data, shrink, source.where)
    return image_suffix(data, source.where), data, source.label


def _shrink(max_side: int | None, short_side: int | None, quality: int | None) -> Shrink | None:
    _check_options(None, max_side=max_side, short_side=short_side, quality=quality)
    if max_side is not None and short_side is not None:
        raise DataError(f"both max_side ({max_side}) and short_side ({short_side}) are given; write one of them")
    if max_side is None and short_side is None:
        if quality is not None:
            raise DataError("quality is that of images that are made smaller; write max_side or short_side with it")
        return None
    if quality is not None and quality > 100:
        raise DataError(f"quality is {quality}; write a number from 1 to 100")
    return Shrink(max_side, short_side, QUALITY if quality is None else quality)


def _check_options(split: str | None, **numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise DataError(f"{name} is {number}; write a number of at least 1")
    if split is not None and not re.fullmatch(r"\w+([.\-]\w+)*", split):
        raise DataError(f"the split name is {split!r}; write letters, digits, and single - or . between them")


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Give up connections that don't answer: torchvision's downloads wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
