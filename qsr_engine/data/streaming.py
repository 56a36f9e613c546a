"""Samples from shards that are read from beginning to end: from a server, without a copy on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import IO

from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.retrying import RETRY, Retry, Tries
from qsr_engine.data.samples import Item, Position, RawSample, Sample, at_position, sample_or_error
from qsr_engine.data.tar import TwiceError, Uncompressed, ends_early, open_tar, read_members, unreadable


class Streamed:
    """Samples from shards that are read from beginning to end, and kept nowhere.

    A stream that breaks in a way that may pass is opened again, and read up to where it broke. Tries that came no
    further than the last are counted.

    Args:
        name: how messages call a shard.
        open_shard: a stream of a shard's bytes, by the shard's name.
        classes: number of classes, or None where it is not known.
        retry: of a shard.
        rule: where the label of a sample is, as the index says.
    """

    any_order = False
    most_spares = 64  # whole samples

    def __init__(
        self,
        name: Callable[[str], str],
        open_shard: Callable[[str], IO[bytes]],
        classes: int | None,
        retry: Retry = RETRY,
        rule: str = "cls",
    ) -> None:
        self._name, self._stream, self._classes, self._retry = name, open_shard, classes, retry
        self._rule = rule

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        for piece in slices:
            number = 0
            try:
                for raw in self._read(piece.name):
                    if number >= piece.start:
                        yield sample_or_error(self._name(piece.name), raw, self._classes, self._rule)
                    number += 1
                    if number == piece.stop:
                        break
                else:
                    raise ends_early(self._name(piece.name), number)
            except DataError as error:
                for left in range(max(number, piece.start), piece.stop):
                    yield at_position(error, Position(piece.name, left))

    def load(self, item: Item) -> Sample | DataError:
        assert not isinstance(item, Position)
        return item

    def announce(self, item: Item) -> None:
        pass

    def _read(self, shard: str) -> Iterator[RawSample]:
        """The samples of a shard, as read_stream() gives them, over as many breaks as there may be."""
        keys: list[str] = []  # of the samples that were given
        tries = Tries(self._retry)
        while True:
            try:
                for number, raw in enumerate(read_stream(self._name(shard), lambda: self._stream(shard))):
                    if number >= len(keys):
                        keys.append(raw.key)
                        yield raw
                        tries = Tries(self._retry)  # a server may close what is read slowly, again and again
                    elif raw.key != keys[number]:
                        raise DataError(
                            f"{self._name(shard)}: this shard was replaced while it was read: its sample {number} was "
                            f"{keys[number]!r}, and is {raw.key!r} now; begin again with its new index"
                        )
                return
            except PassingError as error:
                tries.again(error)


def read_shard(path: Path) -> Iterator[RawSample]:
    """Yield the samples of a shard: neighbouring members of one key.

    Raises:
        DataError: the file is missing, is not a tar file, or ends in the middle, or a key is there twice; a
            PassingError where that may pass.
    """
    return read_stream(str(path), lambda: open(path, "rb"))


def read_stream(name: str, open_shard: Callable[[], IO[bytes]]) -> Iterator[RawSample]:
    """As read_shard(), of any stream; `name` is what messages call it."""
    keys: set[str] = set()
    try:
        with open_shard() as stream, open_tar(Uncompressed(stream), "r|") as tar:
            for key, members in groupby(read_members(tar), key=lambda member: member.key):
                sample = RawSample(key, {})
                for member in members:
                    if key in keys or member.suffix in sample.members:
                        raise TwiceError(key)
                    sample.members[member.suffix] = member.data
                yield sample
                keys.add(key)
    except DataError:
        raise
    except Exception as error:  # tarfile, zlib, lzma and fsspec raise a dozen types between them
        raise unreadable(name, len(keys), error) from error
