"""Shards behind a URL: any that fsspec opens (http, https, s3, gs, ...), kept in a cache of bounded size.

A shard is fetched whole, once for all processes of a host that share the cache, compared with its sha256 in the index,
and then read like a local one. The cache forgets the shards that were not used for longest; who has one open can read
it to its end.

    .NAME.lock     held while NAME is fetched or opened, so that it is not forgotten in between
    .room.lock     held while room is made
    .NAME.N.part   being fetched; it will have N bytes, which count already
    .NAME.failed   when the tries of NAME were used up, and why: who waited meanwhile need not try as often again
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from qsr_engine.data.index import MAX_INDEX, DataError, Shard, check_place, measure_shard
from qsr_engine.data.random_access import TarShard
from qsr_engine.data.retrying import RETRY, PassingError, Retry, retried

_CONNECT, _READ = 30, 60  # seconds that a server may take to answer, and between two parts of its answer
_COPY = re.compile(r"[0-9a-f]{16}-.+")
_PART = re.compile(r"\.([0-9a-f]{16}-.+)\.(\d+)\.part")


class _DifferentError(PassingError):
    """What was fetched is not what the index says: damaged on its way, which a second try shows, or at its source."""

    most_retries = 1


def read_text(url: str, retry: Retry) -> str:
    """A small file behind a URL. Raises DataError where it cannot be read, or is larger than MAX_INDEX."""

    def read() -> str:
        with _as_data_error(url, missing=DataError):
            file_system, path = _file_system(url)
            with file_system.open(path, "rb", **_in_one_go(url)) as stream:
                content = b""
                while len(content) <= MAX_INDEX and (part := stream.read(1 << 20)):
                    content += part
        if len(content) > MAX_INDEX:
            raise DataError(f"{url}: it has more than {MAX_INDEX} bytes, the limit of an index; is it one?")
        return content.decode()

    return retried(read, retry)


class ShardStream(io.RawIOBase):
    """The bytes of a shard behind a URL, as they come.

    Args:
        size: bytes that the index says.
    Raises:
        DataError: it cannot be opened or read, or has other than `size` bytes; a PassingError where that may pass.
    """

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self._url, self._size, self._read = url, size, 0
        with _as_data_error(url):
            file_system, path = _file_system(url)
            self._stream: IO[bytes] = file_system.open(path, "rb", **_in_one_go(url, size))

    def read(self, size: int = -1) -> bytes:
        with _as_data_error(self._url):
            data = self._stream.read(size)
        self._read += len(data)
        if not data and size and self._read < self._size:
            raise PassingError(f"{self._url}: the connection ended after {self._read} of {self._size} bytes")
        _check_size(self._url, self._read, self._size)
        return data

    def close(self) -> None:
        super().close()
        if hasattr(self, "_stream"):
            with contextlib.suppress(Exception):  # of a connection that is broken already
                self._stream.close()


class ShardCache:
    """Local copies of shards.

    Args:
        url: of the folder of the shards.
        folder: of the copies, and of nothing else; several data sets, ranks and loader processes may share it.
        limit: bytes that all copies together may take.
        shards: those of the index, by name.
        retry: of a fetch.
    Raises:
        DataError: the limit is smaller than four of the shards, or the folder cannot be made.
    """

    def __init__(self, url: str, folder: Path, limit: int, shards: dict[str, Shard], retry: Retry = RETRY) -> None:
        self.url, self.folder, self.limit, self.shards = url.rstrip("/"), folder, limit, shards
        self.retry = retry
        largest = max(shard.bytes for shard in shards.values())
        if limit < 4 * largest:
            raise DataError(
                f"data.cache_gb is {limit / 1e9:g}, and the largest shard has {largest / 1e9:g} GB; write at least "
                f"{4.04 * largest / 1e9:.3g}, room for four, or 0 to keep nothing"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{folder}: this cache cannot be made: {error.strerror}; write another data.cache_dir"
            ) from error
        self._fetcher: _Fetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fetcher": None}  # a thread of this process

    def announce(self, name: str) -> None:
        """Have a shard fetched in the background: it will be asked for."""
        if self._fetcher is None:
            self._fetcher = _Fetcher(self.fetch)
        self._fetcher.add(name)

    def fetch(self, name: str) -> None:
        """Have a local copy of a shard. Raises DataError as open()."""
        with self._held(name):
            pass

    def open(self, name: str) -> TarShard:
        """The local copy of a shard, fetched now if it is not there.

        Raises:
            DataError: it cannot be fetched, differs from the index, or there is no space for it.
        """
        with self._held(name) as copy:
            return TarShard(copy)

    @contextmanager
    def _held(self, name: str) -> Iterator[Path]:
        """The whole copy of a shard, which nobody forgets inside."""
        shard = self.shards[name]
        copy = self.folder / f"{shard.sha256[:16]}-{name}"
        asked = time.time()
        try:
            with self._lock(copy.name):
                if not (copy.exists() and copy.stat().st_size == shard.bytes):
                    self._fetch_unless_failed(shard, copy, asked)
                os.utime(copy)
                yield copy
        except OSError as error:
            raise DataError(
                f"{self.folder}: this cache cannot be used: {error.strerror or error}; write another data.cache_dir"
            ) from error

    def _fetch_unless_failed(self, shard: Shard, copy: Path, asked: float) -> None:
        """Fetch a shard, unless somebody else has failed to, with all tries, while this process waited for the lock.

        Else the processes of a host would wait for a dead server one after another.
        """
        failed = copy.with_name(f".{copy.name}.failed")
        with contextlib.suppress(OSError, ValueError):
            when, _, why = failed.read_text().partition("\n")
            if float(when) >= asked:
                raise DataError(why)
        try:
            self._fetch(shard, copy)
        except DataError as error:
            with contextlib.suppress(OSError):
                failed.write_text(f"{time.time()}\n{error}")
            raise
        failed.unlink(missing_ok=True)

    def _fetch(self, shard: Shard, copy: Path) -> None:
        url = f"{self.url}/{shard.name}"
        part = copy.with_name(f".{copy.name}.{shard.bytes}.part")

        def once() -> None:
            self._make_room(part, shard.bytes)
            with _as_data_error(url, self.folder):
                file_system, path = _file_system(url)
                file_system.get_file(path, str(part), callback=_Bounded(url, shard.bytes))
            found = measure_shard(part, shard.samples)
            if (found.bytes, found.sha256) != (shard.bytes, shard.sha256):
                raise _DifferentError(
                    f"{url}: this shard is not that of the index: it has {found.bytes} bytes and the sha256 "
                    f"{found.sha256[:12]}..., and the index says {shard.bytes} and {shard.sha256[:12]}...; upload it "
                    "again"
                )

        try:
            retried(once, self.retry)
            part.replace(copy)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, part: Path, wanted: int) -> None:
        """Forget copies until so many more bytes fit, and take them for a part."""
        with self._lock("room"):
            part.unlink(missing_ok=True)
            copies, held = self._look()
            for file in copies:
                if held + wanted <= self.limit:
                    break
                size = _size(file)
                if self._forget(file, file.name):
                    held -= size
            part.touch()

    def _look(self) -> tuple[list[Path], int]:
        """All copies, those not used for longest first, and the bytes that they and what is being fetched take."""
        copies, held = [], 0
        for file in self.folder.iterdir():
            if part := _PART.fullmatch(file.name):
                held += 0 if self._forget(file, part[1]) else int(part[2])
            elif _COPY.fullmatch(file.name):
                copies.append(file)
                held += _size(file)
        return sorted(copies, key=_last_used), held

    def _forget(self, file: Path, lock: str) -> bool:
        """Delete a file, unless somebody holds its lock; a part that nobody holds was left by a killed process."""
        try:
            with self._lock(lock, wait=False):
                file.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Held by one process or thread of this host at a time, and let go when it ends, however it ends."""
        with open(self.folder / f".{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield


class _Fetcher:
    """A thread that fetches announced shards; what goes wrong there is found again when the shard is asked for."""

    def __init__(self, fetch: Callable[[str], None]) -> None:
        self._fetch = fetch
        self._names: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, name: str) -> None:
        self._names.put(name)

    def _run(self) -> None:
        while True:
            try:
                self._fetch(self._names.get())
            except DataError:
                continue


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
        raise _DifferentError(
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


def _last_used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


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
