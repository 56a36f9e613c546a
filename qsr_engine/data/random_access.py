"""Samples from local shards, each read when it is wanted: a shuffle buffer holds positions, and no bytes."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from weakref import WeakSet

from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.images import check_limits
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.retrying import RETRY, Retry, Tries
from qsr_engine.data.rows import Header, Row
from qsr_engine.data.samples import Loaded, Placed, Position, Sample, at_position, check_label, sample_of
from qsr_engine.data.table import Table
from qsr_engine.data.tar_shard import TarShard

OPEN_SHARDS = 256  # kept open, and as many that samples of a batch hold: a process usually may have 1,024 files
ANNOUNCED = 60.0  # seconds for which a shard need not be announced again


class RandomAccess:
    """Samples from local files, each read when it is decoded, or where that is done by Pillow when it is loaded.

    A read that fails in a way that may pass is tried again, with the shard opened anew. Where the tries are used up,
    the sample is bad, and the shard is read without further tries until it is closed: a shard that is gone is waited
    for once, and not for every sample of it.

    Args:
        open_shard: a shard by its name; DataError where it cannot be had.
        table: the places of all samples.
        classes: number of classes, or None where it is not known.
        announce: called with the name of a shard some time before the first of its samples is loaded.
        retry: of a read.
    """

    def __init__(
        self,
        open_shard: Callable[[str], TarShard],
        table: Table,
        classes: int | None,
        announce: Callable[[str], None] | None = None,
        retry: Retry = RETRY,
    ) -> None:
        self.any_order = announce is None
        self._open_shard, self._table, self._classes, self._retry = open_shard, table, classes, retry
        self._announce = announce
        self._open: OrderedDict[str, TarShard | DataError] = OrderedDict()
        self._closing: WeakSet[TarShard] = WeakSet()  # not in _open any more, and held by samples perhaps
        self._given_up: set[str] = set()  # of those in _open, whose tries are used up
        self._announced: dict[str, float] = {}  # when, in seconds of the monotonic clock

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_closing": None}  # files are those of a process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._closing = WeakSet()

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Position]:
        for piece in slices:
            for number in range(piece.start, piece.stop):
                yield Position(piece.name, number)

    def load(self, item: Position) -> Loaded:
        row = self._table.row(item.shard, item.number)
        placed = self._placed(item, row) if row.fast and len(self._closing) < OPEN_SHARDS else None
        return placed or self._whole(item, row)

    def announce(self, item: Position) -> None:
        if self._announce is None or item.shard in self._open:
            return
        now = time.monotonic()
        if now - self._announced.get(item.shard, -math.inf) > ANNOUNCED:
            self._announce(item.shard)
            self._announced[item.shard] = now

    def pass_over(self, item: Position) -> None:
        pass

    def _placed(self, item: Position, row: Row) -> Placed | None:
        """A sample that its decoder reads; None where something is wrong already, of which _read() says what it is."""
        try:
            shard = self._shard(item.shard)
            check_label("", row.label, self._classes)
            check_limits(row.width, row.height, "")
        except DataError:
            return None
        header = Header(row.width, row.height, fast=True)
        return Placed(shard, shard.extent(row), row.label, header, partial(self._whole, item, row))

    def _whole(self, item: Position, row: Row) -> Sample | DataError:
        try:
            return self._read(item, row)
        except DataError as error:
            return at_position(error, item)

    def _read(self, item: Position, row: Row) -> Sample | DataError:
        """A sample, or what is wrong with it; a DataError of its shard is raised, with the tries that it may take."""
        name, tries = item.shard, Tries(self._retry)
        while True:
            try:
                shard = self._shard(name)
                key, image = shard.read(item.number, row)
                break
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
        return sample_of(shard.path, key, image, row, self._classes)

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
            self._closing.add(shard)
