"""Write one shard: a tar file whose bytes depend on its samples alone.

Python's tarfile is enough for this, and the processes that write need no webdataset, which imports torch: that takes
each of them seconds and hundreds of MB. The bytes are those of webdataset's TarWriter.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

from qsr_engine.data.index import Shard
from qsr_engine.data.rows import pack
from qsr_engine.data.writing.folder import replacing


class Written(NamedTuple):
    """A shard's entry in the index, and the packed rows of its samples."""

    shard: Shard
    rows: bytes


def write_shard(path: Path, samples: Iterable[tuple[str, str, bytes, int | None]]) -> Written:
    """Write (key, image suffix, image bytes, label) as one tar file, whole or not at all; a block has no label.

    Raises:
        OSError: it cannot be written.
    """
    rows = []
    with replacing(path) as stream:
        measured = MeasuredStream(stream)
        with tarfile.open(fileobj=measured, mode="w|") as tar:
            for key, suffix, image, label in samples:
                if label is not None:
                    _add(tar, f"{key}.cls", str(label).encode())
                _add(tar, f"{key}.{suffix}", image)
                offset = tar.offset - -(-len(image) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                rows.append(pack(offset, image, label or 0, 1))
    sha256 = measured.sha256.hexdigest()
    return Written(Shard(name=path.name, samples=len(rows), bytes=measured.bytes, sha256=sha256), b"".join(rows))


def sample_bytes(image_bytes: int) -> int:
    """Bytes that a sample takes in a shard: two headers, the image in blocks of 512 bytes, and a block of label."""
    return 3 * tarfile.BLOCKSIZE + -(-image_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of user, group and time 0
    member.size, member.mode = len(data), 0o444
    tar.addfile(member, io.BytesIO(data))


class MeasuredStream(io.RawIOBase):
    """Counts and hashes what is read or written through it, so that the shard is not read again.

    `tail` has the bytes read last: tarfile reads ahead of the end mark.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self.stream = stream
        self.bytes = 0
        self.sha256 = hashlib.sha256()
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self._measure(data)
        self.tail = (self.tail + data)[-2 * tarfile.RECORDSIZE :]
        return data

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._measure(data)
        return self.stream.write(data)

    def _measure(self, data: bytes) -> None:
        self.bytes += len(data)
        self.sha256.update(data)
