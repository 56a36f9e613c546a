"""The files of shards beside what the index says of them: whether they are there, their sizes, their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import INDEX_NAME, Index, Shard
from qsr_engine.data.places import Places, is_url


def check_shards(folder: Places, index: Index, split: str) -> None:
    """Check that every shard of a split is there with the size that the index recorded. Reads no shard.

    Shards behind a URL are compared when they are fetched, and not here.

    Raises:
        DataError: a shard is missing, empty, truncated or too long; the split is unknown or has no samples.
    """
    for shard in index.split(split).shards:
        place, name = index.where_is(shard.name, folder)
        if not is_url(place):
            path = Path(place) / name
            try:
                wrong = wrong_size(path, path.stat().st_size, shard)
            except OSError as error:
                raise DataError(no_shard(path, error)) from error
            if wrong is not None:
                raise DataError(wrong)


def wrong_size(path: Path, size: int, shard: Shard) -> str | None:
    """What is wrong with a shard of so many bytes; None where the index says as many."""
    if size == shard.bytes:
        return None
    what = "empty" if size == 0 else "truncated" if size < shard.bytes else "too long"
    return (
        f"{path}: this shard is {what}: it has {size} bytes, and {INDEX_NAME} says {shard.bytes}; copy or write it "
        "again"
    )


def no_shard(path: Path, error: OSError) -> str:
    """What is wrong where a shard cannot be opened or looked at."""
    reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
    return f"{path}: this shard {reason}; copy or write it again"


def measure_shard(path: Path, samples: int) -> Shard:
    """The index entry of a shard whose number of samples is known; reads the whole file."""
    with open(path, "rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    return Shard(name=path.name, samples=samples, bytes=path.stat().st_size, sha256=checksum)
