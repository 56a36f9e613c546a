"""What is read of a tar file, and what is refused: shards come from elsewhere, and their headers can say anything.

Only plain files are members of samples: links, devices and folders are passed over. Names are keys, and never paths of
this machine. Sparse files, compressed archives and headers that would take memory without end are refused.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.index import TOKENS
from qsr_engine.data.retrying import may_pass
from qsr_engine.data.rows import Row
from qsr_engine.data.samples import IMAGE_SUFFIXES

MAX_MEMBER = 1 << 30  # bytes; an image of MAX_PIXELS has 0.6 GB without any compression, at 16 bits
# Bytes of an extended header (a long name, pax records). tarfile's time for it grows with the square of its length:
# some 0.1 s for this one.
MAX_HEADER = 16 << 10
_EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # type flags: pax, of one member or of all that follow; Solaris; GNU
_SPARSE = b"S"
_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, xz, zstd
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_REMARK = re.compile(r"__[^/]*__($|/)")  # names that belong to no sample, as __meta__/note.txt
_KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")


class Member(NamedTuple):
    """A file that belongs to a sample, named KEY.SUFFIX."""

    key: str
    suffix: str
    data: bytes
    offset: int  # of the data in the shard, in bytes
    header: int  # blocks of 512 bytes before the data that are its headers


class RefusedError(ValueError):
    """A shard holds what is not read here; the message says what, and what to do."""


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """The sample that a member of this name belongs to, and what it is there; None where it belongs to none.

    The key ends at the first dot behind the last slash, as for the webdataset library; suffixes are in lower case.
    """
    if "/" in name or name[:1] in "._":
        match = None if _REMARK.match(name) else _KEY_AND_SUFFIX.fullmatch(name)
        return (match[1], match[2].lower()) if match else None
    key, dot, suffix = name.partition(".")  # the same for a plain name, in a tenth of the time
    return (key, suffix.lower()) if dot else None


def check_size(name: str, size: int, *, what: str = "a member", limit: int = MAX_MEMBER) -> None:
    """Raises RefusedError where a header announces more bytes than are read here, or fewer than none."""
    if not 0 <= size <= limit:
        raise RefusedError(
            f"{what}, {name[:100]!r}, says that it has {size} bytes; the limit is {limit}; write this shard again"
        )


class CheckedHeader(tarfile.TarInfo):
    """A header whose numbers are checked before anything is read that they announce."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> CheckedHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.type == _SPARSE:
            raise _refused_sparse(header)
        if header.type in _EXTENDED:
            check_size(header.name, header.size, what="an extended header", limit=MAX_HEADER)
        else:
            check_size(header.name, header.size)
        return header


class Readable(Protocol):
    """What a tar file is read from."""

    def read(self, size: int, /) -> bytes: ...


def open_tar(stream: Readable, mode: str) -> tarfile.TarFile:
    """A tar file, not compressed, whose headers are checked: mode "r:" for a file, "r|" for a stream."""
    options: dict[str, Any] = {"fileobj": stream, "mode": mode, "tarinfo": CheckedHeader}
    # Names need not be UTF-8.
    opened: tarfile.TarFile = tarfile.open(**options, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    return opened


PassedOver = Callable[[str, str], None]
"""Told of each member that is no part of a sample: what it is, and its name."""


def _say_nothing(what: str, name: str) -> None:
    pass


def plain_files(tar: tarfile.TarFile, passed_over: PassedOver = _say_nothing) -> Iterator[tarfile.TarInfo]:
    """The headers of plain files. Raises RefusedError for a member that is sparse or has too many bytes."""
    for header in tar:
        if header.issparse():
            raise _refused_sparse(header)
        check_size(header.name, header.size)  # again: pax records come after the header that was checked
        if header.isreg():
            yield header
        elif not header.isdir():
            passed_over("a link, a device or of another kind that is no file", header.name)
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them otherwise


def read_members(tar: tarfile.TarFile, passed_over: PassedOver = _say_nothing) -> Iterator[Member]:
    """The files that belong to samples, in their order."""
    for header in plain_files(tar, passed_over):
        names = key_and_suffix(header.name)
        if names is None:
            passed_over("of a name that belongs to no sample", header.name)
            continue
        content = tar.extractfile(header)
        assert content is not None
        headers = (header.offset_data - header.offset) // tarfile.BLOCKSIZE
        yield Member(*names, content.read(), header.offset_data, headers)


def read_at(file: int, size: int, offset: int) -> bytes:
    """So many bytes of an open file from a place on; fewer only where it ends.

    A network file system may give fewer at once, and so does Linux of more than 2 GB.
    """
    data = os.pread(file, size, offset)
    while 0 < len(data) < size:
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def span_of(row: Row) -> tuple[int, int]:
    """Where the headers of a row's image begin in its shard, and where the image ends, in bytes."""
    return max(0, row.offset - row.header * tarfile.BLOCKSIZE), row.offset + row.length


def image_of(path: object, number: int, row: Row, data: bytes) -> tuple[str, bytes]:
    """The key and the image of sample `number` from the bytes that span_of() names.

    Raises:
        DataError: they are not those of a member that is an image of so many bytes.
    """
    before = len(data) - row.length
    try:
        name, size = _name_and_size(data[:before])
        names = key_and_suffix(name)
    except Exception:  # a damaged header can say anything
        names, size = None, -1
    if names is None or names[1] not in (*IMAGE_SUFFIXES, TOKENS) or size != row.length:
        raise DataError(
            f"{path}: this shard has no image at byte {row.offset}, where its index has that of sample {number}: it is "
            "damaged or was replaced; copy it again, or `qsr shards index DIR --again`"
        )
    return names[0], data[before:]


def _name_and_size(headers: bytes) -> tuple[str, int]:
    """The name of a member, and its bytes, from the blocks of its headers. Raises an exception where they are none."""
    last = headers[-tarfile.BLOCKSIZE :]
    name, end, _ = last[:100].partition(b"\0")
    if not end or last[345] or (len(headers) > tarfile.BLOCKSIZE and (b"path=" in headers or b"size=" in headers)):
        with open_tar(io.BytesIO(headers), "r:") as tar:  # long names
            header = tar.next()
            assert header is not None
            return header.name, header.size
    return name.decode(errors="surrogateescape"), _octal(last[124:136])


def _octal(field: bytes) -> int:
    """A number in a header; int() alone would take a sign."""
    digits = field.strip(b"\0 ")
    if not digits.isdigit():
        raise ValueError(f"{digits!r} is not a number")
    return int(digits, 8)


class Uncompressed:
    """The bytes of a stream. Raises RefusedError where they are compressed ones."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self._looked = stream, False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not self._looked:
            check_not_compressed(data)
            self._looked = True
        return data


def check_not_compressed(start: bytes) -> None:
    """Raises RefusedError for the first bytes of a compressed archive: it could be as large as it likes."""
    if start.startswith(_COMPRESSED) or _BZIP2.match(start):
        raise RefusedError("it is compressed; decompress it (images do not get smaller), and index it again")


def unreadable(path: object, samples: int, error: Exception) -> DataError:
    """The error of a shard that cannot be read behind so many samples; a PassingError where it may be readable soon."""
    reason = str(error) if isinstance(error, RefusedError) else getattr(error, "strerror", None)
    reason = reason or "it is truncated or not a tar file; copy or write it again"
    kind = PassingError if may_pass(error) else DataError
    return kind(f"{path}: this shard cannot be read past sample {samples}: {reason}")


def _refused_sparse(header: tarfile.TarInfo) -> RefusedError:
    return RefusedError(f"the member {header.name[:100]!r} is a sparse file; write this shard again, with plain ones")
