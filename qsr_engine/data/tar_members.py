"""What is read of a tar file, and what is refused: shards come from elsewhere, and their headers can say anything.

Only plain files are members of samples: links, devices and folders are passed over. Names are keys, and never paths of
this machine. Sparse files, compressed archives and headers that would take memory without end are refused.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, Protocol

from qsr_engine.data.index import DataError
from qsr_engine.data.retrying import PassingError, may_pass

MAX_MEMBER = 1 << 30  # bytes; an image of MAX_PIXELS has 0.6 GB without any compression, at 16 bits
# Bytes of an extended header (a long name, pax records). tarfile's time for it grows with the square of its length:
# some 0.1 s for this one.
MAX_HEADER = 16 << 10
_EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # type flags: pax, of one member or of all that follow; Solaris; GNU
_SPARSE = b"S"
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset passes over
_COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, xz, zstd
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")


class Member(NamedTuple):
    """One file in a shard: where its bytes lie."""

    offset: int
    size: int


class RefusedError(ValueError):
    """A shard holds what is not read here; the message says what, and what to do."""


class TwiceError(RefusedError):
    """Two samples of a shard have the same key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} is there twice; write this shard again")


class Header(tarfile.TarInfo):
    """A header whose numbers are checked before anything is read that they announce."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        limit, what = (MAX_HEADER, "an extended header") if header.type in _EXTENDED else (MAX_MEMBER, "a member")
        if header.type == _SPARSE:
            raise _refused_sparse(header)
        if not 0 <= header.size <= limit:
            raise RefusedError(
                f"{what}, {header.name[:100]!r}, says that it has {header.size} bytes; the limit is {limit}; "
                "write this shard again"
            )
        return header


def check_member(info: tarfile.TarInfo) -> None:
    """Raises RefusedError for a sparse member, and for one with too many bytes: pax records come after the header."""
    if info.issparse():
        raise _refused_sparse(info)
    if not 0 <= info.size <= MAX_MEMBER:
        raise RefusedError(
            f"a member, {info.name[:100]!r}, says that it has {info.size} bytes; the limit is {MAX_MEMBER}; "
            "write this shard again"
        )


def check_not_compressed(start: bytes) -> None:
    """Raises RefusedError for the first bytes of a compressed archive: it could be as large as it likes."""
    if start.startswith(_COMPRESSED) or _BZIP2.match(start):
        raise RefusedError("it is compressed; decompress it (images do not get smaller), and index it again")


class Readable(Protocol):
    """What a tar file is read from."""

    def read(self, size: int, /) -> bytes: ...


def open_tar(stream: Readable, mode: str) -> tarfile.TarFile:
    """A tar file, not compressed, whose headers are checked: mode "r:" for a file, "r|" for a stream."""
    options: dict[str, Any] = {"fileobj": stream, "mode": mode, "tarinfo": Header}
    opened: tarfile.TarFile = tarfile.open(**options, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    return opened


def stream_members(name: str, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The plain files of a shard one after another, as webdataset's grouping takes them; {} at the end.

    It stands in for webdataset's own reader, which takes compressed and sparse files, however large they become.
    """
    with open_tar(_Uncompressed(stream), "r|") as archive:
        for info in archive:
            check_member(info)
            if info.isreg() and not _META.match(info.name):
                content = archive.extractfile(info)
                assert content is not None
                yield {"fname": info.name, "data": content.read(), "__url__": name}
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them otherwise
    yield {}


class _Uncompressed:
    """The bytes of a stream, if they are not compressed ones."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._looked = stream, False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not self._looked:
            check_not_compressed(data)
            self._looked = True
        return data


def is_remark(name: str) -> bool:
    """Whether webdataset passes over a member of this name."""
    return _META.match(name) is not None


def unreadable(path: object, samples: int, error: Exception) -> DataError:
    """The error of a shard that cannot be read behind so many samples; a PassingError where it may be readable soon."""
    reason = str(error) if isinstance(error, RefusedError) else getattr(error, "strerror", None)
    reason = reason or "it is truncated or not a tar file; copy or write it again"
    kind = PassingError if may_pass(error) else DataError
    return kind(f"{path}: this shard cannot be read past sample {samples}: {reason}")


def ends_early(path: object, samples: int) -> DataError:
    """The error of a shard that has fewer samples than its index says."""
    return DataError(
        f"{path}: this shard ends after {samples} samples, and its index says that there are more; "
        "copy or write it again"
    )


def _refused_sparse(info: tarfile.TarInfo) -> RefusedError:
    return RefusedError(f"the member {info.name[:100]!r} is a sparse file; write this shard again, with plain ones")
