"""`samples.npy`: the rows of all samples of an index, mapped and shared by all processes of a host that read them.

`numpy.load(PATH, mmap_mode="r")` reads it too: an array of the fields of `rows.FIELDS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import TABLE_NAME, Index, SampleTable
from qsr_engine.data.rows import FIELDS, PACKED, Row

DTYPE = np.dtype(FIELDS)
assert DTYPE.itemsize == PACKED.size
AGAIN = "`qsr shards index DIR --again` makes it again"


class Table:
    """The rows of an index. A process that gets it pickled maps the file itself.

    Args:
        path: of the file.
        starts: the number of the first row of every shard, by its name.
    Raises:
        DataError: the file is missing, is no table, or has another number of rows.
    """

    def __init__(self, path: Path, starts: dict[str, int], rows: int) -> None:
        self.path, self._starts, self._count = path, starts, rows
        self.rows: NDArray[Any] = self._map()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows = self._map()

    def row(self, shard: str, number: int) -> Row:
        """The row of sample `number` of a shard."""
        return Row(*self.rows[self._starts[shard] + number].item())

    def part(self, shard: str, samples: int) -> NDArray[Any]:
        """The rows of a shard."""
        return self.rows[self._starts[shard] : self._starts[shard] + samples]

    def _map(self) -> NDArray[Any]:
        try:
            rows: NDArray[Any] = np.load(self.path, mmap_mode="r" if self._count else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.path}: this table of samples cannot be read: {reason}; {AGAIN}") from error
        if rows.dtype != DTYPE or rows.shape != (self._count,):
            raise DataError(
                f"{self.path}: this table has {rows.shape} rows of {rows.dtype.itemsize} bytes, and index.json says "
                f"({self._count},) of {DTYPE.itemsize}; {AGAIN}"
            )
        return rows


def open_table(path: Path, index: Index) -> Table:
    """The table of an index, compared with its checksum once in a process.

    Raises:
        DataError: it is missing, or is not that of the index.
    """
    assert index.table is not None
    starts, rows = {}, 0
    for shard in (shard for split in index.splits.values() for shard in split.shards):
        starts[shard.name] = rows
        rows += shard.samples
    try:
        found = _checksum(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: this table of samples cannot be read: {error.strerror or error}; {AGAIN}") from error
    if found != index.table.sha256:
        raise DataError(f"{path}: this table of samples is not that of index.json, its sha256 differs; {AGAIN}")
    return Table(path, starts, rows)


@lru_cache(maxsize=8)
def _checksum(path: Path, changed: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_table(stream: IO[bytes], parts: Iterable[bytes]) -> SampleTable:
    """Write the rows of all shards, in the order of index.json, to a file that is open. Returns its entry there."""
    rows = np.frombuffer(b"".join(parts), DTYPE)
    sha256 = hashlib.sha256()

    class Hashed:
        def write(self, data: bytes) -> int:
            sha256.update(data)
            return stream.write(data)

    np.lib.format.write_array(Hashed(), rows, version=(1, 0), allow_pickle=False)
    return SampleTable(sha256=sha256.hexdigest())


__all__ = ["DTYPE", "TABLE_NAME", "Table", "open_table", "write_table"]
