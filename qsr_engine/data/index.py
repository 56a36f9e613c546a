"""`index.json`: which shards a folder holds, how many samples, how many bytes, and what their checksums are.

Nothing here opens a tar file or imports torch.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from qsr_engine.config.digest import digest
from qsr_engine.config.strict import ConfigError, Count, Positive, PositiveInt, StrictModel, validate
from qsr_engine.data.errors import DataError
from qsr_engine.data.places import Places, check_place, expand_places, is_url
from qsr_engine.data.retrying import RETRY, Retry

INDEX_NAME = "index.json"
TABLE_NAME = "samples.npy"
TOKENS = "npy"  # the rule of samples that are blocks of tokens, and the suffix of their member
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
        if (
            any(part in ("", ".", "..") for part in name.split("/"))
            or any(sign in name for sign in ("\\", ":", ".."))
            or not name.isprintable()
        ):
            raise ValueError(f"found {name!r}; write the name of a file in this folder, without \\ : or ..")
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


class SampleTable(StrictModel):
    """The file of all samples beside an index (`table.py`)."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TextData(StrictModel):
    """What the samples of a text are: blocks of tokens (`blocks.py`)."""

    context: PositiveInt  # tokens that a block has to predict; it holds one more, the first, which it does not
    vocabulary: Annotated[int, Field(ge=2, le=2**31)]  # tokens are from 0 to below this
    end: Count  # the token behind every document
    tokenizer: Annotated[str, Field(pattern=r"^(bytes|[0-9a-f]{64})$")] = "bytes"  # or SHA-256 of tokenizer.json
    bytes_per_token: dict[str, Positive]  # of each split: bytes of its text in UTF-8 over its tokens

    @model_validator(mode="after")
    def _consistent(self) -> TextData:
        if self.end >= self.vocabulary:
            raise ValueError(f"end is {self.end}, and the vocabulary has {self.vocabulary} tokens, from 0 on")
        return self


class Index(StrictModel):
    """The content of index.json. `classes` are the class names by label, or None where they are not known."""

    format: Literal[1] = 1
    classes: list[str] | None
    splits: dict[str, Split]
    place: str | None = None  # of the shards, a folder or a URL; None: beside the index
    label: Annotated[str, Field(pattern=r"^(cls|txt|json:.+)$")] = "cls"  # where it is in a sample
    table: SampleTable | None = None  # None: an older index, and shards are walked when they are opened
    text: TextData | None = None  # None: the samples are pictures

    @model_validator(mode="after")
    def _of_one_kind(self) -> Index:
        if self.text is None:
            return self
        if self.classes is not None or self.label != "cls":
            raise ValueError("text is given, whose samples have no labels; leave classes (null) and label out")
        lacking = sorted(self.splits.keys() - self.text.bytes_per_token.keys())
        if lacking:
            raise ValueError(f"text.bytes_per_token has no split {lacking[0]!r}; write it for every split")
        return self

    @model_validator(mode="after")
    def _named_once(self) -> Index:
        names = [shard.name for split in self.splits.values() for shard in split.shards]
        if self.table is not None and len(set(names)) < len(names):
            raise ValueError("a shard is listed in two splits; name it in one of them")
        return self

    @property
    def class_count(self) -> int | None:
        """Number of classes, or None where it is not known."""
        return None if self.classes is None else len(self.classes)

    @property
    def rule(self) -> str:
        """Where the label of a sample is; TOKENS where a sample is a block of tokens, and has none."""
        return self.label if self.text is None else TOKENS

    def where_is(self, name: str, folder: Places) -> tuple[str | Path, str]:
        """The place of a shard of an index that lies in a folder, and its name there."""
        assert isinstance(folder, str | Path)
        return self.place or folder, name

    def digest(self) -> int:
        """A 63-bit number, the same on every rank that reads the same data, wherever that lies."""
        absent = {name for name, default in (("label", "cls"), ("text", None)) if getattr(self, name) == default}
        return digest(self.model_dump(exclude={"place", "table", *absent}))

    def dump(self) -> dict[str, object]:
        """As it is written, without what is as in an older index."""
        defaults = {"place": None, "label": "cls", "table": None, "text": None}
        return {name: value for name, value in self.model_dump().items() if defaults.get(name, ...) != value}

    def split(self, name: str) -> Split:
        """The split of this name. Raises DataError where there is none, or it is empty."""
        if name not in self.splits:
            near = difflib.get_close_matches(name, self.splits, n=1)
            hint = f"did you mean {near[0]!r}? The" if near else "the"
            raise DataError(f"there is no split {name!r}; {hint} splits here are {', '.join(self.splits) or 'none'}")
        if self.splits[name].samples == 0:
            raise DataError(f"the split {name!r} has no samples; write shards with samples, or name another split")
        return self.splits[name]


class JoinedIndex(Index):
    """Several indexes as one: shard NAME of part N is called N/NAME."""

    _parts: list[tuple[str, Index]] = PrivateAttr(default_factory=list)

    @property
    def parts(self) -> list[tuple[str, Index]]:
        """Place and index of each part; those have all shards, also where only some of them are in the whole."""
        return self._parts

    def where_is(self, name: str, folder: Places) -> tuple[str | Path, str]:
        number, _, rest = name.partition("/")
        place, index = self._parts[int(number)]
        return index.where_is(rest, place)


def read_index(places: Places, retry: Retry = RETRY) -> Index:
    """Read the index of a folder or a URL; of several (see expand_places) one that joins theirs.

    Args:
        retry: of reads from a URL.
    Raises:
        DataError: one is missing, is not JSON, or is not an index of a format that is known here; or they do not fit
            together.
    """
    found = expand_places(places) if not isinstance(places, Path) else [(str(places), None)]
    if len(found) == 1 and found[0][1] is None:
        return _read_one(found[0][0], retry)
    parts: list[tuple[str, Index]] = []
    splits: dict[str, list[Shard]] = {}
    for number, (place, names) in enumerate(found):
        index = _read_one(place, retry)
        parts.append((str(place), index))
        wanted = None if names is None else set(names)
        for split, content in index.splits.items():
            for shard in content.shards:
                if wanted is None or shard.name in wanted:
                    splits.setdefault(split, []).append(shard.model_copy(update={"name": f"{number}/{shard.name}"}))
                    (wanted or set()).discard(shard.name)
        if wanted:
            raise DataError(
                f"{place}: its index has no shard {min(wanted)!r}; write names that it has, or index it again"
            )
    joined = {name: Split(samples=sum(s.samples for s in shards), shards=shards) for name, shards in splits.items()}
    text = _joined_text(parts, joined)
    classes = [index.classes for _, index in parts]
    if any(one != classes[0] for one in classes):
        raise DataError(
            f"{parts[0][0]}: its classes are others than those of another part; labels would not mean the same"
        )
    whole = JoinedIndex(classes=classes[0], splits=joined, text=text)
    whole._parts = parts
    return whole


def _joined_text(parts: list[tuple[str, Index]], splits: Mapping[str, Split]) -> TextData | None:
    """That of the parts, with the mean of their bytes per token. Raises DataError where theirs do not fit together."""
    first = parts[0][1].text
    for place, index in parts:
        if (index.text is None) != (first is None):
            raise DataError(f"{place}: its samples are no text, or alone are one; name shards of one kind together")
        if index.text and first and index.text.model_copy(update={"bytes_per_token": first.bytes_per_token}) != first:
            raise DataError(
                f"{place}: its blocks have another context or tokenizer than those of {parts[0][0]}; write the shards "
                "again with the same"
            )
    if first is None:
        return None
    rates = {}
    for name, split in splits.items():
        samples = [(shard.samples, parts[int(shard.name.partition("/")[0])][1].text) for shard in split.shards]
        rates[name] = sum(count * text.bytes_per_token[name] for count, text in samples if text) / split.samples
    return first.model_copy(update={"bytes_per_token": rates})


def _read_one(folder: str | Path, retry: Retry) -> Index:
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
        index = validate(Index, raw, where=str(path))
    except ConfigError as error:
        raise DataError(str(error)) from None
    if index.place is not None:
        check_place(index.place)
        if is_url(folder) and not is_url(index.place):
            raise DataError(
                f"{path}: it says that its shards are in {index.place!r}, and it lies behind a URL; index again"
            )
    return index


def _read(path: str | Path, retry: Retry) -> bytes:
    """The bytes of an index; of one that is larger than MAX_INDEX, more than so many and not all."""
    if isinstance(path, str):
        from qsr_engine.data.remote import read_bytes  # fsspec takes a while to import

        return read_bytes(path, MAX_INDEX + 1, retry)
    with open(path, "rb") as stream:
        return stream.read(1 + min(MAX_INDEX, os.fstat(stream.fileno()).st_size))
