"""Local copies of shards behind a URL, of bounded size together.

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
import fcntl
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsr_engine.data.checking import measure_shard
from qsr_engine.data.errors import DataError, DifferentError
from qsr_engine.data.index import Shard
from qsr_engine.data.remote import fetch_file
from qsr_engine.data.retrying import RETRY, Retry, retried
from qsr_engine.data.tar_shard import TarShard

_COPY = re.compile(r"[0-9a-f]{16}-.+")
_PART = re.compile(r"\.([0-9a-f]{16}-.+)\.(\d+)\.part")


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
        copy = self.folder / f"{shard.sha256[:16]}-{name.replace('/', '-')}"
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
            fetch_file(url, part, shard.bytes)
            found = measure_shard(part, shard.samples)
            if (found.bytes, found.sha256) != (shard.bytes, shard.sha256):
                raise DifferentError(
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
                _, size = _status(file)
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
                held += _status(file)[1]
        return sorted(copies, key=lambda file: _status(file)[0]), held

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


def _status(file: Path) -> tuple[float, int]:
    """When a file was last used, and its bytes; zeros where somebody has deleted it meanwhile."""
    try:
        found = file.stat()
    except OSError:
        return 0.0, 0
    return found.st_mtime, found.st_size
