"""Where the samples of a split come from: local shards, copies of remote ones, or streams of those."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.cache import ShardCache
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import TABLE_NAME, Index, JoinedIndex, Split
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.places import Places, is_url
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.remote import ShardStream, read_bytes
from qsr_engine.data.retrying import Retry
from qsr_engine.data.samples import Item, Position, Sample
from qsr_engine.data.streaming import Streamed
from qsr_engine.data.table import open_table
from qsr_engine.data.tar_shard import TarShard

MAX_TABLE = 1 << 36  # bytes


class Source(Protocol):
    """Where samples come from. Items are shuffled, and only those that this process decodes are loaded."""

    any_order: bool  # whether any sample is at hand as soon as any other
    most_spares: int  # items that may be held beside a batch, to stand in for bad ones

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        """One item for every sample of the slices, in order."""

    def load(self, item: Item) -> Sample | DataError:
        """The sample of an item, or what is wrong with it."""

    def announce(self, item: Item) -> None:
        """Say that an item will be loaded soon."""


class Joined:
    """Samples of the parts of a JoinedIndex, each by its own source."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources  # by the number of the part
        self.most_spares = min(source.most_spares for source in sources.values())
        self.any_order = all(source.any_order for source in sources.values())

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        for piece in slices:
            number, _, name = piece.name.partition("/")
            for item in self._sources[number].items([piece._replace(name=name)]):
                yield item._replace(shard=piece.name) if isinstance(item, Position) else item

    def load(self, item: Item) -> Sample | DataError:
        if not isinstance(item, Position):
            return item
        number, _, name = item.shard.partition("/")
        return self._sources[number].load(item._replace(shard=name))

    def announce(self, item: Item) -> None:
        if isinstance(item, Position):
            number, _, name = item.shard.partition("/")
            self._sources[number].announce(item._replace(shard=name))


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
    classes, retry = index.class_count, Retry(config.retries, config.retry_seconds)
    places = index.place or folder
    if not is_url(places):
        table = None if index.table is None else open_table(local_table(folder, index, config), index)
        open_local = partial(_open_local, Path(places))
        return RandomAccess(open_local, classes, retry=retry, rule=index.rule, table=table)
    url = str(places).rstrip("/")
    shards = {shard.name: shard for shard in index.split(split).shards}
    if config.cache_gb == 0:
        sizes = {name: shard.bytes for name, shard in shards.items()}
        name_of, open_stream = partial(_name_of, url), partial(_open_stream, url, sizes)
        return Streamed(name_of, open_stream, classes, retry, index.rule)
    cache = ShardCache(url, _cache_of(config), round(config.cache_gb * 1e9), shards, retry)
    _check_room(config, index.split(split))
    table = None if index.table is None else open_table(local_table(folder, index, config), index)
    return RandomAccess(cache.open, classes, cache.announce, retry, index.rule, table)


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
        part.write_bytes(content)
        part.replace(copy)
    except OSError as error:
        raise DataError(
            f"{copy}: this copy cannot be written: {error.strerror}; write another data.cache_dir"
        ) from error
    finally:
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


def _name_of(url: str, name: str) -> str:
    return f"{url}/{name}"


def _open_stream(url: str, sizes: dict[str, int], name: str) -> IO[bytes]:
    return ShardStream(f"{url}/{name}", sizes[name])  # type: ignore[return-value]
