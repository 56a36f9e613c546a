"""What is written into a folder of shards is there whole, or not at all; and no data set is written over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import INDEX_NAME, TABLE_NAME, Index


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the place of path when the block ends, and is deleted when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_index(folder: Path, index: Index, rows: Iterable[bytes] | None = None) -> Index:
    """Write FOLDER/index.json, whole or not at all, and before it FOLDER/samples.npy. Returns what was written.

    Args:
        rows: those of every shard, packed, in the order of the index; None writes an index without them.
    """
    if rows is not None:
        from qsr_engine.data.table import write_table  # numpy, which not every command needs

        with replacing(folder / TABLE_NAME) as stream:
            index = index.model_copy(update={"table": write_table(stream, rows)})
    with replacing(folder / INDEX_NAME) as stream:
        stream.write((json.dumps(index.dump(), indent=1, ensure_ascii=False) + "\n").encode())
    return index


def refuse_data_set(folder: Path) -> None:
    """Raises DataError where a folder has an index.json already, or cannot be looked into."""
    path = folder / INDEX_NAME
    try:
        there = path.exists()
    except OSError as error:
        raise DataError(f"{folder}: this folder cannot be read: {error.strerror or error}; name another one") from error
    if there:
        raise DataError(f"{folder} holds a data set already ({path}); choose another folder, or delete {folder}")
