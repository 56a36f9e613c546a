"""A local tar shard whose samples are read in any order, each by one read at the place that the index says.

Where an older index says no places, one walk over the headers finds them when the first sample is asked for.

A sample is the members of one key, next to one another, as for the webdataset library; reading them so gives four times
as many a second. Members are read with pread() and not mapped: of a mapped file that another process truncates, the
next access kills this one.
"""

from __future__ import annotations

import os
import tarfile
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import TOKENS
from qsr_engine.data.rows import Row
from qsr_engine.data.samples import IMAGE_SUFFIXES, RawSample
from qsr_engine.data.tar import (
    TwiceError,
    check_not_compressed,
    check_size,
    ends_early,
    key_and_suffix,
    name_and_size,
    octal,
    open_tar,
    plain_files,
    read_at,
    unreadable,
)

_BLOCK = 512  # bytes of a header, and what members are padded to
_PLAIN = (ord("0"), 0)  # type flags of a regular file
_CHECKSUM = slice(148, 156)


class _Extent(NamedTuple):
    """Where the bytes of a member lie in its file."""

    offset: int
    size: int


class TarShard:
    """An open shard. What is wrong with it is found when a sample behind it is asked for: those before it are good.

    Args:
        path: of the tar file.
    Raises:
        DataError: the file cannot be opened; a PassingError where that may pass, here and in read().
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, 0, error) from error
        self._keys: set[str] = set()
        self._damage: Exception | None = None

    @cached_property
    def samples(self) -> list[tuple[str, dict[str, _Extent]]]:
        """Key, and members by suffix, of every sample that a walk over the headers finds."""
        self._found: list[tuple[str, dict[str, _Extent]]] = []
        headers: list[tuple[int, bytes]] = []  # each with the number of its sample
        try:
            self._walk(headers)
        except Exception as error:  # a shard comes from elsewhere, and a damaged header can say anything
            self._damage = error
        wrong = _first_wrong(headers)
        if wrong is not None:
            self._damage = tarfile.HeaderError("bad checksum")
            del self._found[wrong:]
        self._keys.clear()
        return self._found

    @property
    def deleted(self) -> bool:
        """Whether the file has no name any more, and takes disk space only because it is open here."""
        return os.fstat(self._file).st_nlink == 0

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def read(self, number: int) -> RawSample:
        """Sample `number`, counted from 0.

        Raises:
            DataError: there is no such sample, or it cannot be read.
        """
        if number >= len(self.samples):
            if self._damage is not None:
                raise unreadable(self.path, len(self.samples), self._damage) from self._damage
            raise ends_early(self.path, len(self.samples))
        key, members = self.samples[number]
        sample = RawSample(key, {})
        for suffix, (offset, size) in members.items():
            try:
                data = read_at(self._file, size, offset)
            except OSError as error:
                raise unreadable(self.path, number, error) from error
            if len(data) != size:
                raise unreadable(self.path, number, EOFError())
            sample.members[suffix] = data
        return sample

    def read_row(self, number: int, row: Row) -> tuple[str, bytes]:
        """The key and the image of sample `number`, which lies where its row says.

        Raises:
            DataError: it does not lie there, or cannot be read.
        """
        before = row.header * _BLOCK
        try:
            data = read_at(self._file, before + row.length, max(0, row.offset - before))
        except OSError as error:
            raise unreadable(self.path, number, error) from error
        if len(data) != before + row.length:
            raise unreadable(self.path, number, EOFError())
        try:
            name, size = name_and_size(data[:before])
            names = key_and_suffix(name)
        except Exception:  # a damaged header can say anything
            names, size = None, -1
        if names is None or names[1] not in (*IMAGE_SUFFIXES, TOKENS) or size != row.length:
            raise DataError(
                f"{self.path}: this shard has no image at byte {row.offset}, where its index has that of sample "
                f"{number}: it is damaged or was replaced; copy it again, or `qsr shards index DIR --again`"
            )
        return names[0], data[before:]

    def _walk(self, headers: list[tuple[int, bytes]]) -> None:
        size = os.fstat(self._file).st_size
        check_not_compressed(read_at(self._file, _BLOCK, 0))
        offset = 0
        while len(header := read_at(self._file, _BLOCK, offset)) == _BLOCK and header[0]:
            if header[156] not in _PLAIN or header[345]:
                headers.clear()
                return self._walk_by_tarfile(size)  # long names, links, folders
            length = octal(header[124:136])
            name = header[:100].partition(b"\0")[0].decode(errors="surrogateescape")
            self._add(name, _Extent(offset + _BLOCK, length), size)
            headers.append((max(0, len(self._found) - 1), header))
            offset += _BLOCK + -(-length // _BLOCK) * _BLOCK
        if header.count(0) != len(header) or offset == 0:  # the archive ends with blocks of zeros, or with the file
            raise EOFError
        return None

    def _walk_by_tarfile(self, size: int) -> None:
        self._found.clear()
        self._keys.clear()
        with os.fdopen(os.dup(self._file), "rb") as stream:
            for header in plain_files(open_tar(stream, "r:")):
                self._add(header.name, _Extent(header.offset_data, header.size), size)

    def _add(self, name: str, member: _Extent, file_size: int) -> None:
        names = key_and_suffix(name)
        if names is None:
            return
        key, suffix = names
        if not self._found or self._found[-1][0] != key:
            if key in self._keys:
                raise TwiceError(key)
            self._keys.add(key)
            self._found.append((key, {}))
        members = self._found[-1][1]
        try:
            if member.offset + member.size > file_size:
                raise EOFError
            check_size(name, member.size)  # a file may have holes, and be smaller on its disk than it says
            if suffix in members:
                raise TwiceError(key)
        except (EOFError, ValueError):
            self._found.pop()
            raise
        members[suffix] = member


def _first_wrong(headers: list[tuple[int, bytes]]) -> int | None:
    """The sample of the first header with a wrong checksum: the sum of its bytes, those of the checksum as spaces."""
    if not headers:
        return None
    blocks = np.frombuffer(b"".join(header for _, header in headers), np.uint8).reshape(-1, _BLOCK)
    found = blocks.sum(1, dtype=np.int64) - blocks[:, _CHECKSUM].sum(1, dtype=np.int64) + 8 * ord(" ")
    for (sample, header), total in zip(headers, found.tolist(), strict=True):
        try:
            right = octal(header[_CHECKSUM]) == total
        except ValueError:
            right = False
        if not right:
            return sample
    return None
