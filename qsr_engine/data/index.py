"""`index.json`: which shards a folder holds, how many samples, how many bytes, and what their checksums are.

Nothing here opens a tar file or imports torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qsr_engine.config.digest import digest
from qsr_engine.config.strict import ConfigError, Count, PositiveInt, StrictModel, validate

if TYPE_CHECKING:
    from qsr_engine.data.retrying import Retry

INDEX_NAME = "index.json"
MAX_INDEX = 64 << 20  # bytes; 400,000 shards
# Protocols of data.shards: those that read files from elsewhere. fsspec knows others that run commands, read what a
# file of theirs points to, or reach into this machine.
PROTOCOLS = (
    "http",
    "https",
    "s3",
    "s3a",
    "gs",
    "gcs",
    "abfs",
    "abfss",
    "az",
    "oss",
    "hf",
    "sftp",
    "ftp",
    "hdfs",
    "webhdfs",
)


class DataError(RuntimeError):
    """Shards or samples that cannot be used; the message names the file and says what was found."""


class Shard(StrictModel):
    name: Annotated[str, Field(min_length=1)]
    samples: PositiveInt
    bytes: PositiveInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        # webdataset takes a name for a URL and runs a shell for pipe:..., and an index may come from elsewhere.
        if any(part in name for part in ("/", "\\", ":", "..")) or not name.isprintable():
            raise ValueError(f"found {name!r}; write the plain name of a file in this folder, without / \\ : or ..")
        return name


class Split(StrictModel):
    samples: Count
    shards: list[Shard]

    @model_validator(mode="after")
    def _consistent(self) -> Split:
        total = sum(shard.samples for shard in self.shards)
        if total != self.samples:
            raise ValueError(f"samples is {self.samples}, and the shards hold {total}")
        names = [shard.name for shard in self.shards]
        if len(set(names)) < len(names):
            raise ValueError(f"the shard {next(n for n in names if names.count(n) > 1)!r} is listed twice")
        return self


class Index(StrictModel):
    """The content of index.json. `classes` are the class names by label, or None where they are not known."""

    format: Literal[1] = 1
    classes: list[str] | None
    splits: dict[str, Split]

    @property
    def class_count(self) -> int | None:
        """Number of classes, or None where it is not known."""
        return None if self.classes is None else len(self.classes)

    def digest(self) -> int:
        """A 63-bit number, the same on every rank that reads the same data."""
        return digest(self.model_dump())

    def split(self, name: str) -> Split:
        """The split of this name. Raises DataError where there is none, or it is empty."""
        if name not in self.splits:
            near = difflib.get_close_matches(name, self.splits, n=1)
            hint = f"did you mean {near[0]!r}? The" if near else "the"
            raise DataError(f"there is no split {name!r}; {hint} splits here are {', '.join(self.splits) or 'none'}")
        if self.splits[name].samples == 0:
            raise DataError(f"the split {name!r} has no samples; write shards with samples, or name another split")
        return self.splits[name]


def check_place(place: str) -> None:
    """Refuse places that would run a command, or lead to another place than they seem to.

    Raises:
        DataError: it is `pipe:`, a URL of a protocol that is not read here, or a chain of URLs.
    """
    protocol = re.split("://|::", place, maxsplit=1)[0]
    write = "write a folder, or a URL of " + ", ".join(f"{name}://" for name in PROTOCOLS)
    if place.lower().lstrip().startswith("pipe:"):
        raise DataError(f"{place}: `pipe:` would run a command, and none is run here; {write}")
    if not is_url(place):
        return
    if "::" in place:
        raise DataError(f"{place}: this is a chain of URLs, or an address of IPv6 in place of a name; {write}")
    if protocol.lower() in ("file", "local"):
        raise DataError(f"{place}: a folder of this machine is written without {protocol}://")
    if protocol.lower() not in PROTOCOLS:
        near = difflib.get_close_matches(protocol.lower(), PROTOCOLS, n=1)
        hint = f"; did you mean {near[0]}://?" if near else ""
        raise DataError(f"{place}: shards are not read by the protocol {protocol!r}{hint}; {write}")


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL and not a folder."""
    return isinstance(place, str) and "://" in place


def read_index(folder: str | Path, retry: Retry | None = None) -> Index:
    """Read FOLDER/index.json; the folder may be a URL.

    Args:
        retry: of reads from a URL; None: as where the configuration is not known.
    Raises:
        DataError: it is missing, is not JSON, or is not an index of a format that is known here.
    """
    path: str | Path
    if isinstance(folder, str):
        check_place(folder)
    try:
        if is_url(folder):
            from qsr_engine.data.remote import read_text  # fsspec takes a while to import
            from qsr_engine.data.retrying import RETRY

            path = f"{str(folder).rstrip('/')}/{INDEX_NAME}"
            raw = json.loads(read_text(path, retry or RETRY))
        else:
            path = Path(folder) / INDEX_NAME
            if path.stat().st_size > MAX_INDEX:
                raise DataError(f"{path}: it has more than {MAX_INDEX} bytes, the limit of an index; is it one?")
            raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: this index is missing; `qsr shards index {folder}` makes it for a folder of tar shards"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: this index cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON that can be read: {error}; delete it and make it again") from error
    try:
        return validate(Index, raw, where=str(path))
    except ConfigError as error:
        raise DataError(str(error)) from None


def refuse_existing_index(folder: Path) -> None:
    """Raises DataError where the folder already has an index.json, so that no data set is overwritten."""
    path = folder / INDEX_NAME
    if path.exists():
        raise DataError(f"{folder} holds a data set already ({path}); choose another folder, or delete {folder}")


def write_index(folder: Path, index: Index) -> None:
    """Write FOLDER/index.json, whole or not at all."""
    with replacing(folder / INDEX_NAME) as stream:
        stream.write((json.dumps(index.model_dump(), indent=1, ensure_ascii=False) + "\n").encode())


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


def measure_shard(path: Path, samples: int) -> Shard:
    """The index entry of a shard whose number of samples is known; reads the whole file."""
    with open(path, "rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    return Shard(name=path.name, samples=samples, bytes=path.stat().st_size, sha256=checksum)


def check_shards(folder: str | Path, index: Index, split: str) -> None:
    """Check that every shard of a split is there with the size that the index recorded. Reads no shard.

    Shards behind a URL are compared when they are fetched, and not here.

    Raises:
        DataError: a shard is missing, empty, truncated or too long; the split is unknown or has no samples.
    """
    for shard in index.split(split).shards:
        if not is_url(folder):
            _check_size(Path(folder) / shard.name, shard)


def _check_size(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise DataError(f"{path}: this shard {reason}; copy or write it again") from error
    if size != shard.bytes:
        what = "empty" if size == 0 else "truncated" if size < shard.bytes else "too long"
        raise DataError(
            f"{path}: this shard is {what}: it has {size} bytes, and {INDEX_NAME} says {shard.bytes}; "
            "copy or write it again"
        )
