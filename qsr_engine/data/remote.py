"""Files behind a URL: any that fsspec opens (http, https, s3, gs, ...), and what goes wrong with them."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from qsr_engine.data.errors import DataError, DifferentError, PassingError
from qsr_engine.data.places import check_place
from qsr_engine.data.retrying import Retry, retried

_PART = 1 << 20  # bytes read at once
_CONNECT, _READ = 30, 60  # seconds that a server may take to answer, and between two parts of its answer


def read_bytes(url: str, most: int, retry: Retry) -> bytes:
    """The bytes of a file; of one that has more than `most`, at least so many. Raises DataError as fetch_file()."""

    def read() -> bytes:
        with _as_data_error(url, missing=DataError):
            file_system, path = _file_system(url)
            with file_system.open(path, "rb", **_in_one_go(url)) as stream:
                content = b""
                while len(content) < most and (part := stream.read(1 << 20)):
                    content += part
        return content

    return retried(read, retry)


def list_files(url: str, pattern: str) -> list[str]:
    """The names, below a URL, of files that a pattern with * ? [..] names; sorted. Raises DataError as fetch_file()."""
    with _as_data_error(url, missing=DataError):
        file_system, path = _file_system(url)
        root = path.rstrip("/")
        return sorted(str(found)[len(root) + 1 :] for found in file_system.glob(f"{root}/{pattern}"))


def fetch_file(url: str, to: Path, size: int) -> None:
    """Fetch a file that should have so many bytes.

    Raises:
        DataError: it cannot be had, has more bytes, or there is no space for it; a PassingError where that may pass.
    """
    with _as_data_error(url, to.parent):
        file_system, path = _file_system(url)
        file_system.get_file(path, str(to), callback=_Bounded(url, size))


class ShardStream(io.RawIOBase):
    """The bytes of a shard behind a URL, as they come.

    Args:
        size: bytes that the index says; None where there is no index yet.
        start: the byte where it begins.
    Raises:
        DataError: it cannot be opened or read, or has other than `size` bytes; a PassingError where that may pass.
    """

    def __init__(self, url: str, size: int | None, start: int = 0) -> None:
        super().__init__()
        self._url, self._size, self.at = url, size, 0
        with _as_data_error(url):
            file_system, path = _file_system(url)
            options = _in_one_go(url, 1 if size is None else size)
            if start and options:
                options["headers"] = {"Range": f"bytes={start}-"}
            self._stream: IO[bytes] = file_system.open(path, "rb", **options)
            if start and not options:
                self._stream.seek(start)
        # A server may know no ranges, and begin at the beginning.
        self.at = start if not options or getattr(getattr(self._stream, "r", None), "status", 0) == 206 else 0
        try:
            self.skip(start - self.at)
        except BaseException:
            self.close()
            raise

    def read(self, size: int = -1) -> bytes:
        with _as_data_error(self._url):
            data = self._stream.read(size)
        self.at += len(data)
        if self._size is None:
            return data
        if not data and size and self.at < self._size:
            raise PassingError(f"{self._url}: the connection ended after {self.at} of {self._size} bytes")
        _check_size(self._url, self.at, self._size)
        return data

    def read_whole(self, size: int) -> bytes:
        """So many bytes."""
        parts = []
        while size > 0:
            parts.append(self.read(min(size, _PART)))
            size -= len(parts[-1])
            if not parts[-1]:
                raise DifferentError(f"{self._url}: this shard is not that of the index: it ends at byte {self.at}")
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Read so many bytes, and drop them."""
        while size > 0:
            size -= len(self.read_whole(min(size, _PART)))

    def close(self) -> None:
        super().close()
        if hasattr(self, "_stream"):
            with contextlib.suppress(Exception):  # of a connection that is broken already
                self._stream.close()


class _Bounded(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Told of every part of a file that is fetched; it ends what would take more of the disk than the index says."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self._url, self._bytes = url, size

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        _check_size(self._url, self.value, self._bytes)


def _check_size(url: str, found: int, size: int) -> None:
    if found > size:
        raise DifferentError(
            f"{url}: this shard is not that of the index: it has more than the {size} bytes that the index says; "
            "upload it again"
        )


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises DataError for a URL that is not read here."""
    check_place(url)
    options: dict[str, Any] = {}
    if _is_http(url):
        import aiohttp

        # fsspec's own limit is five minutes for a whole file, however steadily it arrives.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_READ)
        options["client_kwargs"] = {"timeout": timeout}
    file_system, path = fsspec.core.url_to_fs(url, **options)
    return file_system, path


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _in_one_go(url: str, size: int = 1) -> dict[str, Any]:
    """Options of open() for reading from beginning to end: of http in one request, which needs no ranges or size."""
    return {"block_size": 0, "size": size} if _is_http(url) else {}


@contextmanager
def _as_data_error(url: str, cache: Path | None = None, missing: type[DataError] = PassingError) -> Iterator[None]:
    """What goes wrong inside becomes a DataError; a PassingError where it may pass, and `missing` where it is missing.

    A shard that the index lists may be missing for a moment; an index that is missing is most often a wrong URL.
    """
    try:
        yield
    except DataError:
        raise
    except ImportError as error:  # fsspec says which package opens such a URL
        raise DataError(f"{url}: cannot be opened here: {error}") from error
    except FileNotFoundError as error:
        raise missing(f"{url}: there is no such file") from error
    except Exception as error:  # each of fsspec's file systems has exceptions of its own
        if cache is not None and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{cache}: there is no space for {url}; write a smaller data.cache_gb, another data.cache_dir, or 0 to "
                "keep nothing"
            ) from error
        what = ": ".join(part for part in (type(error).__name__, str(error)) if part)
        kind = DataError if _is_final(error) else PassingError
        raise kind(f"{url}: cannot be read: {what}") from error


def _is_final(error: Exception) -> bool:
    """Whether a server has said that it will not give this: 401, 403, ...; 408, 425 and 429 say that it might later."""
    status = getattr(error, "status", None)
    return isinstance(error, PermissionError) or (
        isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    )
