"""Loaders of small shards with one split, "all", and what their batches hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.index import Index
from qsr_engine.data.loader import TrainLoader


def data_config(**changes: Any) -> DataConfig:
    """Of images of 8 x 8 pixels in the split "all"."""
    values = {"shards": "unused", "train": "all", "eval": "all", "image_size": 8, "augment": "crop_flip"}
    return DataConfig(**{**values, "shuffle_buffer": 16, "retry_seconds": 1e-3, **changes})


def train_loader(data: tuple[Path, Index], **changes: Any) -> TrainLoader:
    options = {"rank": 0, "ranks": 2, "batch_size": 6, "seed": 0}
    own = {key: changes.pop(key) for key in list(changes) if key in options}
    return TrainLoader(*data, data_config(**changes), **{**options, **own})


def take(batches: Iterator[ImageBatch], number: int) -> list[ImageBatch]:
    return list(islice(batches, number))


def labels(batches: list[ImageBatch]) -> list[int]:
    return [int(label) for batch in batches for label in batch.labels]


def equal(left: list[ImageBatch], right: list[ImageBatch]) -> bool:
    """Bit for bit."""
    return len(left) == len(right) and all(
        torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels) and one.skipped == two.skipped
        for one, two in zip(left, right, strict=True)
    )


def load(data: tuple[Path | str, Index], rank: int = 0, ranks: int = 1, **changes: Any) -> TrainLoader:
    """Batches of four, for shards of which some are read again and again."""
    values = {"shards": str(data[0]), "train": "all", "image_size": 8, "shuffle_buffer": 8, "retry_seconds": 0.01}
    return TrainLoader(*data, DataConfig(**{**values, **changes}), rank=rank, ranks=ranks, batch_size=4, seed=0)
