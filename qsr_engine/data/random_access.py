"""Random access to the samples of a local tar shard: one walk over its headers, then one read for each member.

The webdataset library reads a shard from beginning to end; this reads samples in any order, and four times as
many a second.
Both take the same members for a sample: those of one key, next to one another. Members are read with pread() and not
mapped: of a mapped file that another process truncates, the next access kills this one.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext

from qsr_engine.data.tar_members import (
    MAX_MEMBER,
    Member,
    RefusedError,
    TwiceError,
    check_member,
    check_not_compressed,
    ends_early,
    is_remark,
    open_tar,
    unreadable,
)

_BLOCK = 512  # bytes of a header, and what members are padded to
_PLAIN = (ord("0"), 0)  # type flags of a regular file
_CHECKSUM = slice(148, 156)


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
        self.samples: list[tuple[str, dict[str, Member]]] = []  # key, and members by suffix
        self._keys: set[str] = set()
        self._damage: Exception | None = None
        headers: list[tuple[int, bytes]] = []  # each with the number of its sample
        try:
            self._walk(headers)
        except Exception as error:  # a shard comes from elsewhere, and a damaged header can say anything
            self._damage = error
        wrong = _first_wrong(headers)
        if wrong is not None:
            self._damage = tarfile.HeaderError("bad checksum")
            del self.samples[wrong:]
        self._keys.clear()

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

    def read(self, number: int) -> dict[str, str | bytes]:
        """`__key__`, and the bytes of every member by suffix, of sample `number`, counted from 0.

        Raises:
            DataError: there is no such sample, or it cannot be read.
        """
        if number >= len(self.samples):
            if self._damage is not None:
                raise unreadable(self.path, len(self.samples), self._damage) from self._damage
            raise ends_early(self.path, len(self.samples))
        key, members = self.samples[number]
        raw: dict[str, str | bytes] = {"__key__": key}
        for suffix, member in members.items():
            try:
                data = os.pread(self._file, member.size, member.offset)
            except OSError as error:
                raise unreadable(self.path, number, error) from error
            if len(data) != member.size:
                raise unreadable(self.path, number, EOFError())
            raw[suffix] = data
        return raw

    def _walk(self, headers: list[tuple[int, bytes]]) -> None:
        size = os.fstat(self._file).st_size
        check_not_compressed(os.pread(self._file, _BLOCK, 0))
        offset = 0
        while len(header := os.pread(self._file, _BLOCK, offset)) == _BLOCK and header[0]:
            if header[156] not in _PLAIN or header[345]:
                headers.clear()
                return self._walk_by_tarfile(size)  # long names, links, folders
            length = _octal(header[124:136])
            name = header[:100].partition(b"\0")[0].decode(errors="surrogateescape")
            self._add(name, Member(offset + _BLOCK, length), size)
            headers.append((max(0, len(self.samples) - 1), header))
            offset += _BLOCK + -(-length // _BLOCK) * _BLOCK
        if header.count(0) != len(header) or offset == 0:  # the archive ends with blocks of zeros, or with the file
            raise EOFError
        return None

    def _walk_by_tarfile(self, size: int) -> None:
        self.samples.clear()
        self._keys.clear()
        with os.fdopen(os.dup(self._file), "rb") as stream:
            archive = open_tar(stream, "r:")
            for info in archive:
                check_member(info)
                if info.isreg():
                    self._add(info.name, Member(info.offset_data, info.size), size)
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them otherwise

    def _add(self, name: str, member: Member, size: int) -> None:
        if "/" in name or name[:1] in "._":
            key, suffix = base_plus_ext(name)
            if key is None or is_remark(name):
                return
        else:
            key, dot, suffix = name.partition(".")  # the same for a plain name, in a tenth of the time
            if not dot:
                return
        if not self.samples or self.samples[-1][0] != key:
            if key in self._keys:
                raise TwiceError(key)
            self._keys.add(key)
            self.samples.append((key, {}))
        if member.offset + member.size > size:
            self.samples.pop()
            raise EOFError
        if member.size > MAX_MEMBER:  # a file may have holes, and be smaller on its disk than it says
            self.samples.pop()
            raise RefusedError(f"a member of {key!r} has {member.size} bytes; the limit is {MAX_MEMBER}")
        members = self.samples[-1][1]
        if suffix.lower() in members:
            raise TwiceError(key)
        members[suffix.lower()] = member


def _first_wrong(headers: list[tuple[int, bytes]]) -> int | None:
    """The sample of the first header with a wrong checksum: the sum of its bytes, those of the checksum as spaces."""
    if not headers:
        return None
    blocks = np.frombuffer(b"".join(header for _, header in headers), np.uint8).reshape(-1, _BLOCK)
    found = blocks.sum(1, dtype=np.int64) - blocks[:, _CHECKSUM].sum(1, dtype=np.int64) + 8 * ord(" ")
    for (sample, header), total in zip(headers, found.tolist(), strict=True):
        try:
            right = _octal(header[_CHECKSUM]) == total
        except ValueError:
            right = False
        if not right:
            return sample
    return None


def _octal(field: bytes) -> int:
    """A number in a header; int() alone would take a sign, and a walk would go backwards."""
    digits = field.strip(b"\0 ")
    if not digits.isdigit():
        raise ValueError(f"{digits!r} is not a number")
    return int(digits, 8)
