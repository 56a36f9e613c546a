"""The local shuffle: samples of a stream in a buffer, from which the next one is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import webdataset as wds

Item = TypeVar("Item")


def shuffled(items: Callable[[], Iterable[Item]], buffer: int, seed: int) -> Iterator[Item]:
    """The items in another order, which is the same for the same seed, buffer and number of items."""
    generator = random.Random(seed)
    return iter(wds.DataPipeline(items, wds.shuffle(buffer, initial=buffer, rng=generator)))
