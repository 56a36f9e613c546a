"""Where the samples of a split come from: local shards, copies of remote ones, or streams of those."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.cache import ShardCache
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index, Split
from qsr_engine.data.order import ShardSlice
from qsr_engine.data.places import is_url
from qsr_engine.data.random_access import RandomAccess
from qsr_engine.data.remote import ShardStream
from qsr_engine.data.retrying import Retry
from qsr_engine.data.samples import Item, Sample
from qsr_engine.data.streaming import Streamed
from qsr_engine.data.tar_shard import TarShard


class Source(Protocol):
    """Where samples come from. Items are shuffled, and only those that this process decodes are loaded."""

    most_spares: int  # items that may be held beside a batch, to stand in for bad ones

    def items(self, slices: Iterable[ShardSlice]) -> Iterator[Item]:
        """One item for every sample of the slices, in order."""

    def load(self, item: Item) -> Sample | DataError:
        """The sample of an item, or what is wrong with it."""

    def announce(self, item: Item) -> None:
        """Say that an item will be loaded soon."""


def make_source(folder: str | Path, index: Index, config: DataConfig, split: str) -> Source:
    """Where the samples of a split come from.

    Raises:
        DataError: the shards are behind a URL, and the cache cannot be used.
    """
    classes, retry = index.class_count, Retry(config.retries, config.retry_seconds)
    if not is_url(folder):
        return RandomAccess(partial(_open_local, Path(folder)), classes, retry=retry)
    url = str(folder).rstrip("/")
    shards = {shard.name: shard for shard in index.split(split).shards}
    if config.cache_gb == 0:
        sizes = {name: shard.bytes for name, shard in shards.items()}
        return Streamed(partial(_name_of, url), partial(_open_stream, url, sizes), classes, retry)
    place = Path(config.cache_dir or default_cache()).expanduser() / "shards"
    cache = ShardCache(url, place, round(config.cache_gb * 1e9), shards, retry)
    _check_room(config, index.split(split))
    return RandomAccess(cache.open, classes, cache.announce, retry)


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
