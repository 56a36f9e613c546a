"""From a tar shard to samples: through the webdataset library, one after another, or at random from a local file.

Samples are raw bytes throughout. webdataset's own decoders are never used: they unpickle what a shard tells them to.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from webdataset.tariterators import group_by_keys, tar_file_expander

from qsr_engine.data.images import IMAGE_SUFFIXES
from qsr_engine.data.index import DataError
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.random_access import TarShard, TwiceError, ends_early, unreadable

# Shards that a reader keeps open. The samples of a shuffle buffer come from few shards, and from older ones now and
# then; a shard that was closed is walked again.
OPEN_SHARDS = 64
ANNOUNCED = 60.0  # seconds for which a shard need not be announced again


class Sample(NamedTuple):
    """One image as it lies in its shard, not decoded."""

    shard: str
    key: str
    image: bytes
    label: int

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"{self.shard}: sample {self.key!r}"


class Position(NamedTuple):
    """A sample that has not been read: the name of its shard, and its number in it."""

    shard: str
    number: int


Item = Position | Sample | DataError


class Source(Protocol):
    """Where samples come from. Items are shuffled, and only those that this process decodes are loaded."""

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        """One item for every sample of the slices, in order."""

    def load(self, item: Item) -> Sample | DataError:
        """The sample of an item, or what is wrong with it."""

    def announce(self, item: Item) -> None:
        """Say that an item will be loaded soon."""


class RandomAccess:
    """Samples from local files, each read when it is loaded.

    Args:
        open_shard: a shard by its name; DataError where it cannot be had.
        classes: number of classes, or None where it is not known.
        announce: called with the name of a shard some time before the first of its samples is loaded.
    """

    def __init__(
        self, open_shard: Callable[[str], TarShard], classes: int | None, announce: Callable[[str], None] | None = None
    ) -> None:
        self._open_shard, self._classes, self._announce = open_shard, classes, announce
        self._open: OrderedDict[str, TarShard | DataError] = OrderedDict()
        self._announced: dict[str, float] = {}  # when, in seconds of the monotonic clock

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        for piece in slices:
            for number in range(piece.start, piece.stop):
                yield Position(piece.name, number)

    def load(self, item: Item) -> Sample | DataError:
        assert isinstance(item, Position)
        shard = self._shard(item.shard)
        if isinstance(shard, DataError):
            return _of_sample(shard, item.number)
        try:
            return parse_sample(shard.path, shard.read(item.number), self._classes)
        except DataError as error:
            return error

    def announce(self, item: Item) -> None:
        assert isinstance(item, Position)
        if self._announce is None or item.shard in self._open:
            return
        now = time.monotonic()
        if now - self._announced.get(item.shard, -math.inf) > ANNOUNCED:
            self._announce(item.shard)
            self._announced[item.shard] = now

    def _shard(self, name: str) -> TarShard | DataError:
        """An open shard, or why it cannot be opened; that is not tried again for every sample of it."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        try:
            self._open[name] = self._open_shard(name)
        except DataError as error:
            self._open[name] = error
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        if self._announce is not None:  # copies that the cache has forgotten meanwhile take space until they are closed
            for other, shard in list(self._open.items()):
                if other != name and isinstance(shard, TarShard) and shard.deleted:
                    del self._open[other]
        return self._open[name]


def _of_sample(error: DataError, number: int) -> DataError:
    """What is wrong with a shard, said of one of its samples, so that bad samples can be told apart."""
    return DataError(f"{error} (wanted: sample {number})")


class Streamed:
    """Samples from shards that are read from beginning to end by the webdataset library, and kept nowhere.

    Args:
        name: how messages call a shard.
        open_shard: a stream of a shard's bytes, by the shard's name.
        classes: number of classes, or None where it is not known.
    """

    def __init__(self, name: Callable[[str], str], open_shard: Callable[[str], IO[bytes]], classes: int | None) -> None:
        self._name, self._stream, self._classes = name, open_shard, classes

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        for piece in slices:
            number = 0
            try:
                for raw in read_stream(self._name(piece.name), lambda piece=piece: self._stream(piece.name)):  # type: ignore[misc]
                    if number >= piece.start:
                        yield self._parse(piece.name, raw)
                    number += 1
                    if number == piece.stop:
                        break
                else:
                    raise ends_early(self._name(piece.name), number)
            except DataError as error:
                for left in range(max(number, piece.start), piece.stop):
                    yield _of_sample(error, left)

    def load(self, item: Item) -> Sample | DataError:
        assert not isinstance(item, Position)
        return item

    def announce(self, item: Item) -> None:
        pass

    def _parse(self, shard: str, raw: dict[str, Any]) -> Sample | DataError:
        try:
            return parse_sample(self._name(shard), raw, self._classes)
        except DataError as error:
            return error


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as webdataset groups them: `__key__`, and bytes by member suffix.

    Raises:
        DataError: the file is missing, is not a tar file, or ends in the middle, or a key is there twice.
    """
    # The file is opened here and not by webdataset, which takes a path for a URL and leaves closing to chance.
    return read_stream(str(path), lambda: open(path, "rb"))


def read_stream(name: str, open_shard: Callable[[], IO[bytes]]) -> Iterator[dict[str, Any]]:
    """As read_shard(), of any stream; `name` is what messages call it."""
    done = 0
    keys = set()
    try:
        with open_shard() as stream:
            for sample in group_by_keys(tar_file_expander([{"url": name, "stream": stream}])):
                if sample["__key__"] in keys:
                    raise TwiceError(sample["__key__"])
                keys.add(sample["__key__"])
                yield sample
                done += 1
    except DataError:
        raise
    except Exception as error:  # tarfile, zlib, lzma, fsspec and webdataset raise a dozen types between them
        raise unreadable(name, done, error) from error


def parse_sample(path: Path | str, raw: dict[str, Any], classes: int | None) -> Sample:
    """Take image and label out of the members of a sample. Raises DataError where one is missing or wrong."""
    key = raw["__key__"]
    image = next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)
    text = raw.get("cls", b"").strip()
    if image is not None and text.isdigit() and len(text) < 10 and (classes is None or int(text) < classes):
        return Sample(str(path), key, image, int(text))
    where = f"{path}: sample {key!r}"
    members = ", ".join(name for name in raw if not name.startswith("__"))
    if image is None:
        raise DataError(f"{where} has no image ({key}.jpg, .jpeg or .png); its members are: {members}")
    if "cls" not in raw:
        raise DataError(f"{where} has no label ({key}.cls); its members are: {members}")
    if not (text.isdigit() and len(text) < 10):
        raise DataError(f"{where} has the label {text[:20]!r}; a label is a whole number from 0, in decimal digits")
    assert classes is not None
    raise DataError(f"{where} has the label {int(text)}, and there are {classes} classes (0 to {classes - 1})")
