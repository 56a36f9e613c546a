"""A local tar shard whose samples are read in any order, each by one read at the place that the index says.

Images are read with pread() and not mapped: of a mapped file that another process truncates, the next access kills this
one.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from qsr_engine.data.rows import Row
from qsr_engine.data.samples import Extent
from qsr_engine.data.tar import image_of, read_at, span_of, unreadable


class TarShard:
    """An open shard, closed when nobody holds it any more: who has an extent of it holds it too.

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

    @property
    def deleted(self) -> bool:
        """Whether the file has no name any more, and takes disk space only because it is open here."""
        return os.fstat(self._file).st_nlink == 0

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def extent(self, row: Row) -> Extent:
        """Where the image of a row lies."""
        return Extent(self._file, row.offset, row.length)

    def read(self, number: int, row: Row) -> tuple[str, bytes]:
        """The key and the image of sample `number`, which lies where its row says.

        Raises:
            DataError: it does not lie there, or cannot be read.
        """
        start, stop = span_of(row)
        try:
            data = read_at(self._file, stop - start, start)
            if len(data) < stop - start:
                whole = os.fstat(self._file).st_size >= stop
                # A network file system may say for a while that a file ends where it does not.
                raise OSError(errno.EIO, "a read ended before the file does") if whole else EOFError
        except (OSError, EOFError) as error:
            raise unreadable(self.path, number, error) from error
        return image_of(self.path, number, row, data)
