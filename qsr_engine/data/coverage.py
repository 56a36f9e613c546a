"""How often samples come in an epoch whose data was divided anew on the way: counted, from who had to read what.

The data is divided into streams, as many as there are ranks (`order.py`) or micro-batches in a step, which stand at the
same micro-batch. With another number of streams they go on where the samples seen so far would end if these had been
the streams all along. So in the epoch under way some samples come twice, and some do not come; from the next epoch on
all is as it was. Which samples these are follows from seed, epoch, number of streams and position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qsr_engine.data.order import seed_for
from qsr_engine.data.shuffling import shuffled

EXACT = 1 << 18  # samples of an epoch; in larger ones the local shuffle, which takes a second for so many, is left out
_MOST_READINGS = 32  # of one epoch; older ones are forgotten, and count as not read


class _Reading(NamedTuple):
    """So many streams read batches of this size, from when so many samples had been seen."""

    streams: int
    batch: int
    began: int

    def at(self, seen: int) -> int:
        """Samples of each stream that lie before its position when so many have been seen."""
        together = self.streams * self.batch
        return (self.began // together + (seen - self.began) // together) * self.batch


class Coverage:
    """What all members have read so far of the epoch under way.

    Args:
        samples: of an epoch.
        buffer: samples of the local shuffle; 1 for none, also where all samples of a split are shuffled.
    """

    def __init__(self, samples: int, seed: int, buffer: int) -> None:
        self._samples, self._seed = samples, seed
        self._buffer = buffer if samples <= EXACT else 1
        self.exact = self._buffer == buffer  # else counts are off by the samples of a buffer at every stream's position
        self._readings: list[_Reading] = []

    def divide(self, streams: int, batch: int, seen: int) -> tuple[int, int]:
        """From now on there are so many streams, and batches are of this size.

        Args:
            seen: samples so far, of all streams.
        Returns:
            (samples that come once more than without the change, and that do not come any more) in the epochs that are
            under way, if nothing else changes in them. What an earlier change has spoilt a later one may mend: they
            may be negative.
        """
        new = _Reading(streams, batch, seen)
        if not self._readings or self._readings[-1][:2] == new[:2]:
            self._readings = self._readings or [new]
            return 0, 0
        old = self._readings[-1]
        places = [self._epochs(one.streams, one.at(seen)) for one in (old, new)]
        twice = missed = 0
        read = self._read_until(seen)
        for epoch in range(min(int(place.min()) for place in places), max(int(place.max()) for place in places) + 1):
            before, after = (self._count(epoch, [*read, (one.streams, one.at(seen), None)]) for one in (old, new))
            twice, missed = twice + after[0] - before[0], missed + after[1] - before[1]
        first = min(int(place.min()) for place in places)
        ends = [*(one.began for one in self._readings[1:]), seen]
        kept = [
            one
            for one, end in zip(self._readings, ends, strict=True)
            if self._epochs(one.streams, max(0, one.at(end) - 1)).max() >= first
        ]
        self._readings = [*kept[-_MOST_READINGS + 1 :], new]
        return twice, missed

    def _read_until(self, seen: int) -> list[tuple[int, int, int | None]]:
        """(streams, first, end) of each reading: samples of every stream."""
        ends = [*(one.began for one in self._readings[1:]), seen]
        return [(one.streams, one.at(one.began), one.at(end)) for one, end in zip(self._readings, ends, strict=True)]

    def _epochs(self, streams: int, position: int) -> NDArray[np.int64]:
        """The epoch of a position in each stream, as order.epoch_of() tells it of one."""
        of_each = np.arange(streams, dtype=np.int64)
        return -((of_each - streams * (position + 1)) // self._samples) - 1

    def _count(self, epoch: int, readings: Sequence[tuple[int, int, int | None]]) -> tuple[int, int]:
        """(Times that samples come after their first, samples that do not come) in an epoch.

        Args:
            readings: (streams, first, end), in samples of every stream; None: to the end of the epoch.
        """
        whole = self._samples
        change = np.zeros(whole + 1, np.int64) if self._buffer > 1 else None
        marks: list[NDArray[np.int64]] = []
        for streams, first, end in readings:
            of_each = np.arange(streams, dtype=np.int64)
            begins = (epoch * whole + of_each) // streams
            lengths = ((epoch + 1) * whole + of_each) // streams - begins
            starts = np.cumsum(lengths) - lengths
            low = np.clip(first - begins, 0, lengths)
            high = lengths if end is None else np.clip(end - begins, 0, lengths)
            if change is None:
                marks.append(np.stack([starts + low, starts + np.maximum(low, high)]))
                continue
            for stream in np.flatnonzero(low < high).tolist():
                at, length = int(starts[stream]), int(lengths[stream])
                self._add(change, epoch, stream, at, length, int(low[stream]), int(high[stream]))
        if change is not None:
            times = change[:whole]
            return int(np.maximum(times - 1, 0).sum()), int((times == 0).sum())
        return _overlaps(np.concatenate(marks, axis=1), whole)

    def _add(
        self, times: NDArray[np.int64], epoch: int, stream: int, start: int, length: int, low: int, high: int
    ) -> None:
        """Samples [low, high) of a stream in an epoch come once more; it draws from [start, start + length)."""
        to_the_end = high == length
        drawn = 0 if to_the_end and not low else low if to_the_end else high
        order = shuffled(lambda: iter(range(start, start + length)), self._buffer, self._seed_of(epoch, stream))
        numbers = np.fromiter(islice(order, drawn), np.int64, drawn) if drawn else np.empty(0, np.int64)
        if to_the_end:
            times[start : start + length] += 1
            times[numbers] -= 1
        else:
            times[numbers[low:]] += 1

    def _seed_of(self, epoch: int, stream: int) -> int:
        return seed_for("shuffle", self._seed, epoch, stream)

    def state_dict(self) -> dict[str, Any]:
        return {"readings": [list(one) for one in self._readings]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._readings = [_Reading(*one) for one in state["readings"]]


def _overlaps(ranges: NDArray[np.int64], whole: int) -> tuple[int, int]:
    """As _count(), of ranges [2, any number]: their starts and their ends, in an order of so many samples."""
    starts, ends = ranges
    points = np.concatenate([[0, whole], starts, ends])
    steps = np.concatenate([[0, 0], np.ones_like(starts), -np.ones_like(ends)])
    order = np.argsort(points, kind="stable")
    points, times = points[order], np.cumsum(steps[order])
    lengths = np.diff(points)
    times = times[:-1]
    return int((np.maximum(times - 1, 0) * lengths).sum()), int(lengths[times == 0].sum())
