"""Shards behind a URL: any that fsspec opens (http, https, s3, gs, ...), kept in a cache of bounded size.

A shard is fetched whole, once for all processes of a host that share the cache, compared with its sha256 in the index,
and then read like a local one. The cache forgets the shards that were not used for longest; who has one open can read
it to its end.

    .NAME.lock     held while NAME is fetched or opened, so that it is not forgotten in between
    .room.lock     held while room is made
    .NAME.N.part   being fetched; it will have N bytes, which count already
"""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from qsr_engine.data.index import DataError, Shard, measure_shard
from qsr_engine.data.random_access import TarShard

Result = TypeVar("Result")

_ATTEMPTS = 3
_CONNECT, _READ = 30, 60  # seconds that a server may take to answer, and between two parts of its answer
_COPY = re.compile(r"[0-9a-f]{16}-.+")
_PART = re.compile(r"\.([0-9a-f]{16}-.+)\.(\d+)\.part")


class _PermanentError(DataError):
    """Trying again would not help."""


def read_text(url: str) -> str:
    """A small file behind a URL. Raises DataError where it cannot be read."""

    def read() -> str:
        with _as_data_error(url):
            file_system, path = _file_system(url)
            content: bytes = file_system.cat_file(path)
            return content.decode()

    return _retried(read)


def open_url(url: str) -> IO[bytes]:
    """A stream of the bytes behind a URL. Raises DataError where it cannot be opened."""

    def open_it() -> IO[bytes]:
        with _as_data_error(url):
            file_system, path = _file_system(url)
            stream: IO[bytes] = file_system.open(path, "rb")
            return stream

    return _retried(open_it)


class ShardCache:
    """Local copies of shards.

    Args:
        url: of the folder of the shards.
        folder: of the copies, and of nothing else; several data sets, ranks and loader processes may share it.
        limit: bytes that all copies together may take.
        shards: those of the index, by name.
    Raises:
        DataError: the limit is smaller than four of the shards, or the folder cannot be made.
    """

    def __init__(self, url: str, folder: Path, limit: int, shards: dict[str, Shard]) -> None:
        self.url, self.folder, self.limit, self.shards = url.rstrip("/"), folder, limit, shards
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
        try:
            with self._lock(copy.name):
                if not (copy.exists() and copy.stat().st_size == shard.bytes):
                    self._fetch(shard, copy)
                os.utime(copy)
                yield copy
        except OSError as error:
            raise DataError(
                f"{self.folder}: this cache cannot be used: {error.strerror or error}; write another data.cache_dir"
            ) from error

    def _fetch(self, shard: Shard, copy: Path) -> None:
        url = f"{self.url}/{shard.name}"
        part = copy.with_name(f".{copy.name}.{shard.bytes}.part")

        def once() -> None:
            self._make_room(part, shard.bytes)
            with _as_data_error(url, self.folder):
                file_system, path = _file_system(url)
                file_system.get_file(path, str(part))
            found = measure_shard(part, shard.samples)
            if (found.bytes, found.sha256) != (shard.bytes, shard.sha256):
                raise DataError(
                    f"{url}: this shard is not that of the index: it has {found.bytes} bytes and the sha256 "
                    f"{found.sha256[:12]}..., and the index says {shard.bytes} and {shard.sha256[:12]}...; upload it "
                    "again"
                )

        try:
            _retried(once)
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


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # fsspec's own limit is five minutes for a whole file, however steadily it arrives.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_READ)
        options["client_kwargs"] = {"timeout": timeout}
    file_system, path = fsspec.core.url_to_fs(url, **options)
    return file_system, path


def _retried(action: Callable[[], Result]) -> Result:
    """What the action returns, at the third attempt if need be."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return action()
        except _PermanentError:
            raise
        except DataError:
            time.sleep(2**attempt)
    return action()


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
def _as_data_error(url: str, cache: Path | None = None) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except ImportError as error:  # fsspec says which package opens such a URL
        raise _PermanentError(f"{url}: cannot be opened here: {error}") from error
    except FileNotFoundError as error:
        raise _PermanentError(f"{url}: there is no such file") from error
    except Exception as error:  # each of fsspec's file systems has exceptions of its own
        if cache is not None and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _PermanentError(
                f"{cache}: there is no space for {url}; write a smaller data.cache_gb, another data.cache_dir, or 0 to "
                "keep nothing"
            ) from error
        what = ": ".join(part for part in (type(error).__name__, str(error)) if part)
        raise DataError(f"{url}: cannot be read: {what}") from error
