"""Samples: the members of one key in a shard, what they must be, and what messages call them.

Samples are raw bytes throughout. webdataset's decoders are never used: they unpickle what a shard tells them to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from qsr_engine.data.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")  # of the member that is the image, the first that is there


class RawSample(NamedTuple):
    """A key, and the bytes of its members by suffix."""

    key: str
    members: dict[str, bytes]


class Sample(NamedTuple):
    """One image as it lies in its shard, not decoded."""

    shard: str
    key: str
    image: bytes
    label: int

    @property
    def where(self) -> str:
        """How messages name it."""
        return where(self.shard, self.key)


class Position(NamedTuple):
    """A sample that has not been read: the name of its shard, and its number in it."""

    shard: str
    number: int


Item = Position | Sample | DataError
_OF_POSITION = re.compile(r"[^/:]+: sample \d+: ")  # what at_position() writes; names of shards have no colon


def where(shard: object, key: str) -> str:
    """How messages name a sample."""
    return f"{shard}: sample {key!r}"


def parse_sample(shard: object, raw: RawSample, classes: int | None) -> Sample:
    """Take image and label out of the members of a sample.

    Args:
        shard: its path, or what messages call it.
        classes: number of classes, or None where it is not known.
    Raises:
        DataError: one of them is missing or wrong.
    """
    place = where(shard, raw.key)
    return Sample(str(shard), raw.key, find_image(place, raw.members), find_label(place, raw.members, classes))


def sample_or_error(shard: object, raw: RawSample, classes: int | None) -> Sample | DataError:
    """As parse_sample(), with the error returned."""
    try:
        return parse_sample(shard, raw, classes)
    except DataError as error:
        return error


def find_image(place: str, members: Mapping[str, bytes]) -> bytes:
    """The image of a sample. Raises DataError where there is none."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in members:
            return members[suffix]
    raise DataError(f"{place} has no image (.jpg, .jpeg or .png); its members are: {listing(members)}")


def find_label(place: str, members: Mapping[str, bytes], classes: int | None) -> int:
    """The label of a sample. Raises DataError where there is none, or it is none of so many classes."""
    if "cls" not in members:
        raise DataError(f"{place} has no label (.cls); its members are: {listing(members)}")
    text = members["cls"].strip()
    if not (text.isdigit() and len(text) < 10):
        raise DataError(f"{place} has the label {text[:20]!r}; a label is a whole number from 0, in decimal digits")
    label = int(text)
    if classes is not None and label >= classes:
        raise DataError(f"{place} has the label {label}, and there are {classes} classes (0 to {classes - 1})")
    return label


def listing(suffixes: Iterable[str]) -> str:
    """Suffixes as messages list them; they come from elsewhere, and a stream may not print all of them."""
    return ", ".join(suffix if suffix.isprintable() else repr(suffix) for suffix in suffixes)


def at_position(error: DataError, item: Position) -> DataError:
    """What is wrong with a shard, said of one of its samples, so that bad samples can be told apart."""
    return DataError(f"{item.shard}: sample {item.number}: {error}")


def bad_sample(text: str) -> str:
    """Which sample an error is about, whatever else it says: how many tries there were differs from time to time."""
    found = _OF_POSITION.match(text)
    return found[0] if found else text
