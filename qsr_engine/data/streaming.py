"""Samples from shards on a server, without a copy on this machine: each shard is read from beginning to end.

A shuffle buffer holds positions. The images of those that are wanted later are held from when they come by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.remote import ShardStream
from qsr_engine.data.retrying import RETRY, Retry, Tries
from qsr_engine.data.samples import Loaded, Position, Sample, at_position, sample_of
from qsr_engine.data.table import Table
from qsr_engine.data.tar import image_of, span_of

FAR = 4 << 20  # bytes; where nothing is wanted of so many, another request is made behind them


@dataclass
class _Reading:
    """Samples of a shard from `start` on: those before `next` have come by, and who is wanted later of them is held.

    `done`, a byte a sample: whether it was given, or passed over.
    """

    start: int
    done: bytearray
    next: int
    held: dict[int, Sample | DataError] = field(default_factory=dict)
    stream: ShardStream | None = None
    broken: DataError | None = None  # its tries are used up

    @classmethod
    def of(cls, start: int, stop: int) -> _Reading:
        return cls(start, bytearray(stop - start), start)

    def wants(self, number: int) -> bool:
        """Whether a sample is one of these, and still to come."""
        return 0 <= number - self.start < len(self.done) and not self.done[number - self.start]

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = None


class Streamed:
    """Samples from shards that are read from beginning to end, and kept nowhere.

    What was passed over before the first sample is not read: a resumed run reads what is in its shuffle buffer, and
    goes on behind it. A stream that breaks in a way that may pass is opened again where it broke. Tries that came no
    further than the last are counted.

    Args:
        open_shard: a stream of a shard's bytes, by the shard's name and the byte where it begins.
        table: the places of all samples.
        url: of the folder of the shards.
        classes: number of classes, or None where it is not known.
        retry: of a shard.
    """

    any_order = False

    def __init__(
        self,
        open_shard: Callable[[str, int], ShardStream],
        table: Table,
        url: str,
        classes: int | None,
        retry: Retry = RETRY,
    ) -> None:
        self._open, self._table, self._url, self._classes, self._retry = open_shard, table, url, classes, retry
        self._readings: dict[str, list[_Reading]] = {}  # of a shard more than one where epochs meet

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readings": {}}  # streams are those of a process

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Position]:
        for piece in slices:
            self._readings.setdefault(piece.name, []).append(_Reading.of(piece.start, piece.stop))
            for number in range(piece.start, piece.stop):
                yield Position(piece.name, number)

    def load(self, item: Position) -> Loaded:
        # A sample that has stood in for a bad one was given already: it is read alone.
        reading = self._that_wants(item) or _Reading.of(item.number, item.number + 1)
        found = reading.held.pop(item.number, None)
        if found is None:
            try:
                found = self._read(item, reading)
            except DataError as error:
                reading.broken = error
                found = at_position(error, item)
        self._done(item, reading)
        return found

    def announce(self, item: Position) -> None:
        pass

    def pass_over(self, item: Position) -> None:
        reading = self._that_wants(item)
        if reading is not None:
            reading.held.pop(item.number, None)
            self._done(item, reading)

    def _that_wants(self, item: Position) -> _Reading | None:
        return next((one for one in self._readings.get(item.shard, ()) if one.wants(item.number)), None)

    def _done(self, item: Position, reading: _Reading) -> None:
        reading.done[item.number - reading.start] = 1
        if 0 not in reading.done:
            reading.close()
            self._readings[item.shard] = [one for one in self._readings.get(item.shard, ()) if one is not reading]

    def _read(self, item: Position, reading: _Reading) -> Sample | DataError:
        """Read up to a sample, over as many breaks as there may be, and hold what is wanted before it.

        Raises:
            DataError: the shard cannot be read further.
        """
        tries, came_to = Tries(self._retry), reading.next
        while reading.broken is None:
            number = reading.start + reading.done.find(0, reading.next - reading.start)
            try:
                found = self._next(Position(item.shard, number), reading)
            except PassingError as error:
                reading.close()
                if reading.next > came_to:
                    tries, came_to = Tries(self._retry), reading.next
                tries.again(error)
                continue
            reading.next = number + 1
            if number == item.number:
                return found
            reading.held[number] = found
        raise reading.broken

    def _next(self, item: Position, reading: _Reading) -> Sample | DataError:
        place = span_of(self._table.row(*item))[0]
        if reading.stream is None or not 0 <= place - reading.stream.at < FAR:
            reading.close()
            reading.stream = self._open(item.shard, place)
        return self._from(reading.stream, item)

    def _from(self, stream: ShardStream, item: Position) -> Sample | DataError:
        """A sample of a stream that is not behind it."""
        row, path = self._table.row(*item), f"{self._url}/{item.shard}"
        start, stop = span_of(row)
        stream.skip(start - stream.at)
        data = stream.read_whole(stop - start)
        try:
            key, image = image_of(path, item.number, row, data)
        except DataError as error:
            return at_position(error, item)
        return sample_of(path, key, image, row, self._classes)
