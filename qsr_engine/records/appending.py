"""A file that grows by whole pieces, on a disk that may be full for a while.

A piece that cannot be written waits in memory, and no part of it is left in the file. Once the file is open, nothing
here raises because of the disk: training is worth more than its records.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from contextlib import suppress
from pathlib import Path

MOST_WAITING = 2**24  # bytes of pieces that wait; beyond them the oldest are given up


class AppendedFile:
    """Writes pieces to the end of a file, each at once and whole, or later.

    Args:
        path: of the file.
        new: it must not be there yet; otherwise it may be.
    Raises:
        OSError: it cannot be opened; FileExistsError where `new` and it is there.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        self._path = path
        self._file = path.open("xb" if new else "ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)  # of what is whole
        self._torn = False  # there may be a part of a piece after it
        self._waiting: deque[bytes] = deque()
        self._given_up = 0
        self._failing = False

    def write(self, piece: bytes) -> None:
        """Raises ValueError after close()."""
        if self._file.closed:
            raise ValueError(f"{self._path}: the file is closed")
        self._waiting.append(piece)
        while len(self._waiting) > 1 and sum(map(len, self._waiting)) > MOST_WAITING:
            self._waiting.popleft()
            self._given_up += 1
        self._try()

    def close(self) -> None:
        """Try once more to write what waits, and say what is lost; again is harmless."""
        if self._file.closed:
            return
        self._try()
        self._given_up += len(self._waiting)
        self._waiting.clear()
        if self._given_up:
            warnings.warn(f"{self._path}: {self._given_up} records are lost, since they had no room", stacklevel=2)
        with suppress(OSError):
            self._file.close()

    def _try(self) -> None:
        try:
            self._write_waiting()
        except OSError as error:
            with suppress(OSError):
                self._cut()
            if not self._failing:
                warnings.warn(
                    f"{self._path}: cannot be written ({error.strerror or error}); training goes on, and the records "
                    "wait in memory until they can be",
                    stacklevel=4,
                )
            self._failing = True
            return
        if self._failing:
            warnings.warn(f"{self._path}: is written again", stacklevel=4)
        self._failing = False

    def _write_waiting(self) -> None:
        if self._torn:
            self._cut()
        while self._waiting:
            self._torn = True
            rest = memoryview(self._waiting[0])
            while rest:  # a disk that becomes full takes a part first
                rest = rest[self._file.write(rest) or 0 :]
            self._end += len(self._waiting.popleft())
            self._torn = False

    def _cut(self) -> None:
        self._file.truncate(self._end)
        self._file.seek(self._end)  # else the next piece would leave a hole before it
        self._torn = False
