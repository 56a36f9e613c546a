"""Samples from local shards, each read when it is wanted: a shuffle buffer holds positions, and no bytes."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.retrying import RETRY, Retry, Tries
from qsr_engine.data.rows import Header, Row
from qsr_engine.data.samples import Item, Position, Sample, at_position, check_label, sample_or_error, where
from qsr_engine.data.table import Table
from qsr_engine.data.tar_shard import TarShard

# Shards that a reader keeps open. The samples of a shuffle buffer come from few shards, and from older ones now and
# then; a shard that was closed is walked again.
OPEN_SHARDS = 64
OPEN_FILES = 256  # where the index has their places: a file alone, of the 1,024 that a process usually may have
ANNOUNCED = 60.0  # seconds for which a shard need not be announced again


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
        rule: where the label of a sample is, as the index says.
        table: the places of all samples; None where the index has none, and shards are walked.
    """

    most_spares = 1 << 14  # positions, which are small

    def __init__(
        self,
        open_shard: Callable[[str], TarShard],
        classes: int | None,
        announce: Callable[[str], None] | None = None,
        retry: Retry = RETRY,
        rule: str = "cls",
        table: Table | None = None,
    ) -> None:
        self._rule, self._table = rule, table
        self.any_order = table is not None and announce is None
        self._most_open = OPEN_SHARDS if table is None else OPEN_FILES
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
            return self._read(item)
        except DataError as error:
            return at_position(error, item)

    def announce(self, item: Item) -> None:
        assert isinstance(item, Position)
        if self._announce is None or item.shard in self._open:
            return
        now = time.monotonic()
        if now - self._announced.get(item.shard, -math.inf) > ANNOUNCED:
            self._announce(item.shard)
            self._announced[item.shard] = now

    def _read(self, item: Position) -> Sample | DataError:
        """A sample, or what is wrong with it; a DataError of its shard is raised, with the tries that it may take."""
        name, tries = item.shard, Tries(self._retry)
        while True:
            try:
                shard = self._shard(name)
                if self._table is None:
                    return sample_or_error(shard.path, shard.read(item.number), self._classes, self._rule)
                return self._of_row(shard, item.number, self._table.row(name, item.number))
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

    def _of_row(self, shard: TarShard, number: int, row: Row) -> Sample | DataError:
        key, image = shard.read_row(number, row)
        header = Header(row.width, row.height, bool(row.fast)) if row.width else None
        try:
            label = check_label(where(shard.path, key), row.label, self._classes)
        except DataError as error:
            return error
        return Sample(str(shard.path), key, image, label, header)

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
        if len(self._open) > self._most_open:
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
