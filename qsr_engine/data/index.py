"""`index.json`: which shards a folder holds, how many samples, how many bytes, and what their checksums are.

Nothing here opens a tar file or imports torch.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from qsr_engine.config.digest import digest
from qsr_engine.config.strict import ConfigError, Count, PositiveInt, StrictModel, validate
from qsr_engine.data.errors import DataError
from qsr_engine.data.places import check_place, is_url
from qsr_engine.data.retrying import RETRY, Retry

INDEX_NAME = "index.json"
MAX_INDEX = 64 << 20  # bytes; 400,000 shards


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


def read_index(folder: str | Path, retry: Retry = RETRY) -> Index:
    """Read FOLDER/index.json; the folder may be a URL.

    Args:
        retry: of reads from a URL.
    Raises:
        DataError: it is missing, is not JSON, or is not an index of a format that is known here.
    """
    if isinstance(folder, str):
        check_place(folder)
    path = f"{str(folder).rstrip('/')}/{INDEX_NAME}" if is_url(folder) else Path(folder) / INDEX_NAME
    try:
        content = _read(path, retry)
        if len(content) > MAX_INDEX:
            raise DataError(f"{path}: it has more than {MAX_INDEX} bytes, the limit of an index; is it one?")
        raw = json.loads(content.decode())
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


def _read(path: str | Path, retry: Retry) -> bytes:
    """The bytes of an index; of one that is larger than MAX_INDEX, more than so many and not all."""
    if isinstance(path, str):
        from qsr_engine.data.remote import read_bytes  # fsspec takes a while to import

        return read_bytes(path, MAX_INDEX + 1, retry)
    with open(path, "rb") as stream:
        return stream.read(1 + min(MAX_INDEX, os.fstat(stream.fileno()).st_size))
