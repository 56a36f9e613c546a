"""Where the samples of a split come from: local shards, copies of remote ones, or streams of those."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.cache import ShardCache
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import TABLE_NAME, Index, JoinedIndex, Split
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.places import Places, is_url
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.remote import ShardStream, read_bytes
from qsr_engine.data.retrying import Retry
from qsr_engine.data.samples import Loaded, Position
from qsr_engine.data.streaming import Streamed
from qsr_engine.data.table import open_table
from qsr_engine.data.tar_shard import TarShard

MAX_TABLE = 1 << 36  # bytes


class Source(Protocol):
    """Where samples come from. Positions are shuffled, and only those that this process decodes are loaded."""

    any_order: bool  # whether any sample is at hand as soon as any other

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Position]:
        """The positions of the slices, in order."""

    def load(self, item: Position) -> Loaded:
        """The sample at a position, or what is wrong with it."""

    def announce(self, item: Position) -> None:
        """Say that a sample will be loaded soon."""

    def pass_over(self, item: Position) -> None:
        """Say that a sample will not be loaded by this process."""


class Joined:
    """Samples of the parts of a JoinedIndex, each by its own source."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources  # by the number of the part
        self.any_order = all(source.any_order for source in sources.values())

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Position]:
        for piece in slices:
            number, _, name = piece.name.partition("/")
            for item in self._sources[number].items([piece._replace(name=name)]):
                yield item._replace(shard=piece.name)

    def load(self, item: Position) -> Loaded:
        source, own = self._part(item)
        return source.load(own)

    def announce(self, item: Position) -> None:
        source, own = self._part(item)
        source.announce(own)

    def pass_over(self, item: Position) -> None:
        source, own = self._part(item)
        source.pass_over(own)

    def _part(self, item: Position) -> tuple[Source, Position]:
        number, _, name = item.shard.partition("/")
        return self._sources[number], item._replace(shard=name)


def make_source(folder: Places, index: Index, config: DataConfig, split: str) -> Source:
    """Where the samples of a split come from.

    Raises:
        DataError: the shards are behind a URL, and the cache cannot be used.
    """
    if isinstance(index, JoinedIndex):
        numbers = dict.fromkeys(shard.name.partition("/")[0] for shard in index.split(split).shards)
        parts = {number: index.parts[int(number)] for number in numbers}
        named = {"classes": index.classes}
        return Joined(
            {n: make_source(place, part.model_copy(update=named), config, split) for n, (place, part) in parts.items()}
        )
    assert isinstance(folder, str | Path)
    if index.table is None:
        raise DataError(
            f"{folder}: its index has no {TABLE_NAME}, it is an older one; "
            + (f"`qsr shards index {folder} --out DIR`" if is_url(folder) else f"`qsr shards index {folder} --again`")
            + " makes one that has it"
        )
    classes, retry = index.class_count, Retry(config.retries, config.retry_seconds)
    places = index.place or folder
    table = open_table(local_table(folder, index, config), index)
    if not is_url(places):
        return RandomAccess(partial(_open_local, Path(places)), table, classes, retry=retry)
    url = str(places).rstrip("/")
    shards = {shard.name: shard for shard in index.split(split).shards}
    if config.cache_gb == 0:
        sizes = {name: shard.bytes for name, shard in shards.items()}
        return Streamed(partial(_open_stream, url, sizes), table, url, classes, retry)
    cache = ShardCache(url, _cache_of(config), round(config.cache_gb * 1e9), shards, retry)
    _check_room(config, index.split(split))
    return RandomAccess(cache.open, table, classes, cache.announce, retry)


def local_table(folder: str | Path, index: Index, config: DataConfig) -> Path:
    """The file of the samples of an index; of one behind a URL a copy in the cache, fetched now if it is not there.

    Raises:
        DataError: it cannot be fetched.
    """
    if not is_url(folder):
        return Path(folder) / TABLE_NAME
    assert index.table is not None
    copy = _cache_of(config) / f"samples-{index.table.sha256[:16]}.npy"
    if copy.exists():
        return copy
    content = read_bytes(
        f"{str(folder).rstrip('/')}/{TABLE_NAME}", MAX_TABLE, Retry(config.retries, config.retry_seconds)
    )
    part = copy.with_name(f".{copy.name}.{os.getpid()}")  # ranks of a host may all fetch it, and the last one stays
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(copy)
    except OSError as error:
        raise DataError(f"{copy}: this cache cannot be made: {error.strerror}; write another data.cache_dir") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return copy


def _cache_of(config: DataConfig) -> Path:
    return Path(config.cache_dir or default_cache()).expanduser() / "shards"


def _check_room(config: DataConfig, split: Split) -> None:
    """Raises DataError where shards would be forgotten while the shuffle buffers still hold samples of them."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # of this host
    span = 2 + 2 * math.ceil(config.shuffle_buffer * len(split.shards) / split.samples)  # twice the buffer's shards
    needed = min(ranks * span, len(split.shards)) * max(shard.bytes for shard in split.shards)
    if round(config.cache_gb * 1e9) < needed:
        raise DataError(
            f"data.cache_gb is {config.cache_gb:g}, and the shuffle buffers of {ranks} ranks on this host ("
            f"shuffle_buffer {config.shuffle_buffer}) span shards of {1.01 * needed / 1e9:.3g} GB; write at least "
            "that, or a smaller data.shuffle_buffer"
        )


def default_cache() -> Path:
    """The folder of cached shards where the configuration names none."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qsr_engine"


def _open_local(folder: Path, name: str) -> TarShard:
    return TarShard(folder / name)


def _open_stream(url: str, sizes: dict[str, int], name: str, start: int) -> ShardStream:
    return ShardStream(f"{url}/{name}", sizes[name], start)
