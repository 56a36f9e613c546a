"""Shards behind a URL: any that fsspec opens (http, https, s3, gs, ...), kept in a cache of bounded size.

A shard is fetched whole, once for all processes of a host that share the cache, compared with its sha256 in the index,
and then read like a local one. The cache forgets the shards that were not used for longest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from qsr_engine.data.index import DataError, Shard, measure_shard

_ATTEMPTS = 3
_LOCKS = 64  # lock files; two shards may share one


class _PermanentError(DataError):
    """Trying again would not help."""


def read_text(url: str) -> str:
    """A small file behind a URL. Raises DataError where it cannot be read."""
    with _as_data_error(url):
        file_system, path = fsspec.core.url_to_fs(url)
        content: bytes = file_system.cat_file(path)
        return content.decode()


def open_url(url: str) -> IO[bytes]:
    """A stream of the bytes behind a URL. Raises DataError where it cannot be opened."""
    with _as_data_error(url):
        file_system, path = fsspec.core.url_to_fs(url)
        stream: IO[bytes] = file_system.open(path, "rb")
        return stream


class ShardCache:
    """Local copies of shards.

    Args:
        url: of the folder of the shards.
        folder: of the copies; several data sets, ranks and loader processes may share it.
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
                f"{4 * largest / 1e9:.2g}, room for four, or 0 to keep nothing"
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
            self._fetcher = _Fetcher(self.path)
        self._fetcher.add(name)

    def path(self, name: str) -> Path:
        """The local copy of a shard, fetched now if it is not there.

        Raises:
            DataError: it cannot be fetched, differs from the index, or there is no space for it.
        """
        shard = self.shards[name]
        copy = self.folder / f"{shard.sha256[:16]}-{name}"
        with self._lock(f"{int(shard.sha256[:8], 16) % _LOCKS:02d}"):
            if not (copy.exists() and copy.stat().st_size == shard.bytes):
                self._fetch(shard, copy)
            os.utime(copy)
        return copy

    def _fetch(self, shard: Shard, copy: Path) -> None:
        url = f"{self.url}/{shard.name}"
        part = copy.with_name(f".{copy.name}.part")
        try:
            for attempt in range(_ATTEMPTS):
                try:
                    self._make_room(shard.bytes)
                    with _as_data_error(url, self.folder):
                        file_system, path = fsspec.core.url_to_fs(url)
                        file_system.get_file(path, str(part))
                    self._compare(part, shard, url)
                    part.replace(copy)
                    return
                except _PermanentError:
                    raise
                except DataError:
                    if attempt + 1 == _ATTEMPTS:
                        raise
                    time.sleep(2**attempt)
        finally:
            part.unlink(missing_ok=True)

    def _compare(self, part: Path, shard: Shard, url: str) -> None:
        found = measure_shard(part, shard.samples)
        if (found.bytes, found.sha256) != (shard.bytes, shard.sha256):
            raise DataError(
                f"{url}: this shard is not that of the index: it has {found.bytes} bytes and the sha256 "
                f"{found.sha256[:12]}..., and the index says {shard.bytes} and {shard.sha256[:12]}...; upload it again"
            )

    def _make_room(self, wanted: int) -> None:
        """Forget copies until so many more bytes fit. Who has one open can read it to its end."""
        with self._lock("room"):
            copies = sorted((f for f in self.folder.glob("*.tar*")), key=_last_used)
            held = sum(_size(file) for file in (*copies, *self.folder.glob(".*.part")))
            for file in copies:
                if held + wanted <= self.limit:
                    break
                held -= _size(file)
                file.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one process or thread of this host at a time, and let go when it ends, however it ends."""
        with open(self.folder / f".{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _Fetcher:
    """A thread that fetches announced shards; what goes wrong there is found again when the shard is asked for."""

    def __init__(self, fetch: Callable[[str], Path]) -> None:
        self._fetch = fetch
        self._names: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, name: str) -> None:
        self._names.put(name)

    def _run(self) -> None:
        while True:
            try:
                self._fetch(self._names.get())
            except (DataError, OSError):
                continue


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
        raise DataError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error
