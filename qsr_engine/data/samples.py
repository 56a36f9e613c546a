"""Samples: the members of one key in a shard, what they must be, and what messages call them.

Samples are raw bytes throughout. webdataset's decoders are never used: they unpickle what a shard tells them to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import TOKENS
from qsr_engine.data.rows import Header, Row

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # of the member that is the image, the first that is there


class Sample(NamedTuple):
    """One image as it lies in its shard, not decoded; of a text, one block of tokens, with the label 0."""

    shard: str
    key: str
    image: bytes
    label: int
    header: Header | None = None  # where the index knows it

    def whole(self) -> Sample:
        """With its bytes: this one."""
        return self

    @property
    def where(self) -> str:
        """How messages name it."""
        return where(self.shard, self.key)


class Position(NamedTuple):
    """A sample that has not been read: the name of its shard, and its number in it."""

    shard: str
    number: int


class Extent(NamedTuple):
    """Where bytes lie in a file that is open."""

    file: int
    offset: int
    length: int


class Placed(NamedTuple):
    """One image that has not been read, and whose size the index knows. Its file stays open as long as `shard` is held.

    `load` gives the sample with its bytes, or what is wrong with it.
    """

    shard: object
    extent: Extent
    label: int
    header: Header
    load: Callable[[], Sample | DataError]

    def whole(self) -> Sample:
        """With its bytes. Raises DataError where they cannot be had."""
        found = self.load()
        if isinstance(found, DataError):
            raise found
        return found


Loaded = Sample | Placed | DataError
_OF_POSITION = re.compile(r"[^:]+: sample \d+: ")  # what at_position() writes; names of shards have no colon


def where(shard: object, key: str) -> str:
    """How messages name a sample."""
    return f"{shard}: sample {key!r}"


def sample_of(shard: object, key: str, image: bytes, row: Row, classes: int | None) -> Sample | DataError:
    """The sample of a row whose image was read, or what is wrong with its label."""
    header = Header(row.width, row.height, bool(row.fast)) if row.width else None
    try:
        return Sample(str(shard), key, image, check_label(where(shard, key), row.label, classes), header)
    except DataError as error:
        return error


def find_image(place: str, members: Mapping[str, bytes], rule: str = "cls") -> bytes:
    """The image of a sample, or its block of tokens. Raises DataError where there is none."""
    suffix = image_suffix_of(members, rule)
    if suffix is not None:
        return members[suffix]
    what = "block of tokens (.npy)" if rule == TOKENS else "image (.jpg, .jpeg, .png or .webp)"
    raise DataError(f"{place} has no {what}; its members are: {listing(members)}")


def image_suffix_of(members: Iterable[str], rule: str = "cls") -> str | None:
    """Which member of a sample is its image, the first of IMAGE_SUFFIXES that is there; or its block of tokens."""
    there = set(members)
    return next((suffix for suffix in ((TOKENS,) if rule == TOKENS else IMAGE_SUFFIXES) if suffix in there), None)


def find_label(place: str, members: Mapping[str, bytes], classes: int | None, rule: str = "cls") -> int:
    """The label of a sample.

    Args:
        rule: "cls" or "txt", the member that is the label, or "json:FIELD", a field of the member .json; of TOKENS
            the label is 0.
    Raises:
        DataError: there is none, or it is none of so many classes.
    """
    if rule == TOKENS:
        return 0
    suffix, _, field = rule.partition(":")
    if suffix not in members:
        raise DataError(f"{place} has no label (.{suffix}); its members are: {listing(members)}")
    text = _field(place, members[suffix], field) if field else members[suffix].strip()
    if not (text.isdigit() and len(text) < 10):
        raise DataError(f"{place} has the label {text[:20]!r}; a label is a whole number from 0, in decimal digits")
    return check_label(place, int(text), classes)


def check_label(place: str, label: int, classes: int | None) -> int:
    """The label. Raises DataError where it is none of so many classes."""
    if classes is not None and label >= classes:
        raise DataError(f"{place} has the label {label}, and there are {classes} classes (0 to {classes - 1})")
    return label


def _field(place: str, data: bytes, field: str) -> bytes:
    """A field of a member .json, as text."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} has a .json that cannot be read: {error}") from error
    if not isinstance(content, dict) or field not in content:
        names = ", ".join(map(repr, list(content)[:10])) if isinstance(content, dict) else "none"
        raise DataError(f"{place} has no field {field!r} in its .json; the fields are: {names}")
    return str(content[field]).strip().encode(errors="backslashreplace")


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
