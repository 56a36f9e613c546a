"""Tar shards through the webdataset library: write one, read one.

Samples are raw bytes throughout. webdataset's own decoders are never used: they unpickle what a shard tells them to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from qsr_engine.data.index import DataError, Shard, measure_shard, replacing
from qsr_engine.data.order import ShardSlice

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")


class Sample(NamedTuple):
    """One image as it lies in its shard, not decoded."""

    shard: str
    key: str
    image: bytes
    label: int


def write_shard(path: Path, samples: Iterable[tuple[str, str, bytes, int]]) -> Shard:
    """Write (key, image suffix, image bytes, label) as one tar file; the same samples give the same bytes."""
    written = 0
    with (
        replacing(path) as stream,
        TarWriter(stream, user="", group="", mtime=0, encoder=False) as writer,
    ):
        for key, suffix, image, label in samples:
            writer.write({"__key__": key, suffix: image, "cls": str(label).encode()})
            written += 1
    return measure_shard(path, written)


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as webdataset groups them: `__key__`, and bytes by member suffix.

    Raises:
        DataError: the file is missing, is not a tar file, or ends in the middle.
    """
    done = 0
    try:
        # The file is opened here and not by webdataset, which takes a path for a URL and leaves closing to chance.
        with open(path, "rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                yield sample
                done += 1
    except Exception as error:  # tarfile, zlib, lzma and webdataset raise a dozen types between them
        reason = getattr(error, "strerror", None) or "it is truncated or not a tar file; copy or write it again"
        raise DataError(f"{path}: this shard cannot be read past sample {done}: {reason}") from error


def read_slices(folder: Path, slices: Iterable[ShardSlice], classes: int | None) -> Iterator[Sample]:
    """Yield the samples of each slice in order; those before its start are passed over.

    Args:
        classes: number of classes, or None where it is not known.
    Raises:
        DataError: as read_shard() and parse_sample(), or a shard that holds fewer samples than the index says.
    """
    for piece in slices:
        path = folder / piece.name
        found = 0
        for raw in islice(read_shard(path), piece.stop):
            if found >= piece.start:
                yield parse_sample(path, raw, classes)
            found += 1
        if found < piece.stop:
            raise DataError(
                f"{path}: this shard ends after {found} samples, and its index says that there are more; "
                "copy or write it again"
            )


def parse_sample(path: Path, raw: dict[str, Any], classes: int | None) -> Sample:
    """Take image and label out of the members of a sample. Raises DataError where one is missing or wrong."""
    key = raw["__key__"]
    where = f"{path}: sample {key!r}"
    members = ", ".join(name for name in raw if not name.startswith("__"))
    image = next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)
    if image is None:
        raise DataError(f"{where} has no image ({key}.jpg, .jpeg or .png); its members are: {members}")
    if "cls" not in raw:
        raise DataError(f"{where} has no label ({key}.cls); its members are: {members}")
    text = raw["cls"].strip()
    if not (text.isdigit() and len(text) < 10):
        raise DataError(f"{where} has the label {text[:20]!r}; a label is a whole number from 0, in decimal digits")
    if classes is not None and int(text) >= classes:
        raise DataError(f"{where} has the label {int(text)}, and there are {classes} classes (0 to {classes - 1})")
    return Sample(str(path), key, image, int(text))
