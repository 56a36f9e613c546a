"""From a tar shard to samples: one after another, grouped by the webdataset library, or at random from a local file.

Samples are raw bytes throughout. webdataset's own decoders are never used: they unpickle what a shard tells them to.
Nor is its opener, which gives what follows `pipe:` to a shell.
"""

from __future__ import annotations

import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from webdataset.tariterators import group_by_keys

from qsr_engine.data.images import IMAGE_SUFFIXES
from qsr_engine.data.index import DataError
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.random_access import TarShard
from qsr_engine.data.retrying import RETRY, PassingError, Retry, Tries
from qsr_engine.data.tar_members import TwiceError, ends_early, stream_members, unreadable

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
_OF_SAMPLE = re.compile(r"[^/:]+: sample \d+: ")  # what _of_sample() writes; names of shards have no colon


class Source(Protocol):
    """Where samples come from. Items are shuffled, and only those that this process decodes are loaded."""

    most_spares: int  # items that may be held beside a batch, to stand in for bad ones

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        """One item for every sample of the slices, in order."""

    def load(self, item: Item) -> Sample | DataError:
        """The sample of an item, or what is wrong with it."""

    def announce(self, item: Item) -> None:
        """Say that an item will be loaded soon."""


class RandomAccess:
    """Samples from local files, each read when it is loaded.

    A read that fails in a way that may pass is tried again, with the shard opened anew. Where the tries are used up,
    the sample is bad, and the shard is read without further tries until it is closed: a shard that is gone is waited
    for once, and not for every sample of it.

    Args:
        open_shard: a shard by its name; DataError where it cannot be had.
        classes: number of classes, or None where it is not known.
        announce: called with the name of a shard some time before the first of its samples is loaded.
        retry: of a read.
    """

    most_spares = 1 << 14  # positions, which are small

    def __init__(
        self,
        open_shard: Callable[[str], TarShard],
        classes: int | None,
        announce: Callable[[str], None] | None = None,
        retry: Retry = RETRY,
    ) -> None:
        self._open_shard, self._classes, self._announce, self._retry = open_shard, classes, announce, retry
        self._open: OrderedDict[str, TarShard | DataError] = OrderedDict()
        self._given_up: set[str] = set()  # of those in _open, whose tries are used up
        self._announced: dict[str, float] = {}  # when, in seconds of the monotonic clock

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        for piece in slices:
            for number in range(piece.start, piece.stop):
                yield Position(piece.name, number)

    def load(self, item: Item) -> Sample | DataError:
        assert isinstance(item, Position)
        try:
            path, raw = self._read(item)
        except DataError as error:
            return _of_sample(error, item)
        try:
            return parse_sample(path, raw, self._classes)
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

    def _read(self, item: Position) -> tuple[Path, dict[str, str | bytes]]:
        """The path of a shard, and a sample of it as TarShard.read() gives it; with the tries that it may take."""
        name, tries = item.shard, Tries(self._retry)
        while True:
            try:
                shard = self._shard(name)
                return shard.path, shard.read(item.number)
            except PassingError as error:
                if name in self._given_up:
                    raise
                try:
                    tries.again(error)
                except DataError as last:
                    self._open.setdefault(name, last)
                    self._given_up.add(name)
                    raise
                self._close(name)

    def _shard(self, name: str) -> TarShard:
        """An open shard. Raises DataError where it cannot be opened; that is remembered, unless it may pass."""
        if name in self._open:
            self._open.move_to_end(name)
        else:
            try:
                self._open[name] = self._open_shard(name)
            except PassingError:
                raise
            except DataError as error:
                self._open[name] = error
            self._tidy(name)
        found = self._open[name]
        if isinstance(found, DataError):
            raise found
        return found

    def _tidy(self, name: str) -> None:
        """Close the shard that was not used for longest, if there are too many, and copies without a name.

        Copies that the cache has forgotten meanwhile take space until they are closed.
        """
        if len(self._open) > OPEN_SHARDS:
            self._close(next(iter(self._open)))
        if self._announce is not None:
            for other, shard in list(self._open.items()):
                if other != name and isinstance(shard, TarShard) and shard.deleted:
                    self._close(other)

    def _close(self, name: str) -> None:
        self._given_up.discard(name)
        shard = self._open.pop(name, None)
        if isinstance(shard, TarShard):
            shard.close()


def _of_sample(error: DataError, item: Position) -> DataError:
    """What is wrong with a shard, said of one of its samples, so that bad samples can be told apart."""
    return DataError(f"{item.shard}: sample {item.number}: {error}")


def bad_sample(text: str) -> str:
    """Which sample an error is about, whatever else it says: how many tries there were differs from time to time."""
    found = _OF_SAMPLE.match(text)
    return found[0] if found else text


class Streamed:
    """Samples from shards that are read from beginning to end, and kept nowhere.

    A stream that breaks in a way that may pass is opened again, and read up to where it broke. Tries that came no
    further than the last are counted.

    Args:
        name: how messages call a shard.
        open_shard: a stream of a shard's bytes, by the shard's name.
        classes: number of classes, or None where it is not known.
        retry: of a shard.
    """

    most_spares = 64  # whole samples

    def __init__(
        self,
        name: Callable[[str], str],
        open_shard: Callable[[str], IO[bytes]],
        classes: int | None,
        retry: Retry = RETRY,
    ) -> None:
        self._name, self._stream, self._classes, self._retry = name, open_shard, classes, retry

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        for piece in slices:
            number = 0
            try:
                for raw in self._read(piece.name):
                    if number >= piece.start:
                        yield self._parse(piece.name, raw)
                    number += 1
                    if number == piece.stop:
                        break
                else:
                    raise ends_early(self._name(piece.name), number)
            except DataError as error:
                for left in range(max(number, piece.start), piece.stop):
                    yield _of_sample(error, Position(piece.name, left))

    def load(self, item: Item) -> Sample | DataError:
        assert not isinstance(item, Position)
        return item

    def announce(self, item: Item) -> None:
        pass

    def _read(self, shard: str) -> Iterator[dict[str, Any]]:
        """The samples of a shard, as read_stream() gives them, over as many breaks as there may be."""
        keys: list[str] = []  # of the samples that were given
        tries = Tries(self._retry)
        while True:
            try:
                for number, raw in enumerate(read_stream(self._name(shard), lambda: self._stream(shard))):
                    if number >= len(keys):
                        keys.append(raw["__key__"])
                        yield raw
                        tries = Tries(self._retry)  # a server may close what is read slowly, again and again
                    elif raw["__key__"] != keys[number]:
                        raise DataError(
                            f"{self._name(shard)}: this shard was replaced while it was read: its sample {number} was "
                            f"{keys[number]!r}, and is {raw['__key__']!r} now; begin again with its new index"
                        )
                return
            except PassingError as error:
                tries.again(error)

    def _parse(self, shard: str, raw: dict[str, Any]) -> Sample | DataError:
        try:
            return parse_sample(self._name(shard), raw, self._classes)
        except DataError as error:
            return error


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as webdataset groups them: `__key__`, and bytes by member suffix.

    Raises:
        DataError: the file is missing, is not a tar file, or ends in the middle, or a key is there twice; a
            PassingError where that may pass.
    """
    return read_stream(str(path), lambda: open(path, "rb"))


def read_stream(name: str, open_shard: Callable[[], IO[bytes]]) -> Iterator[dict[str, Any]]:
    """As read_shard(), of any stream; `name` is what messages call it."""
    done = 0
    keys = set()
    try:
        with open_shard() as stream:
            for sample in group_by_keys(stream_members(name, stream)):
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
