"""How many training pictures a second come to the device, decoded by this rank itself and by loader processes."""

from __future__ import annotations

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.rows import Found, Row, checked
from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.index import Index, Split
from qsr_engine.data.loader import TrainLoader
from qsr_engine.data.writing.folder import write_index
from qsr_engine.data.writing.shard import write_shard
from tests.support.shard_files import picture

PART = "loader"
PROCESSES = (0, 2)
CHECKS = [f"pictures a second, loader_processes: {processes}" for processes in PROCESSES]
BATCH, SIDE, SIZE = 32, (500, 375), 224  # pixels of ImageNet's usual picture, and of a crop


def measure(device: str, batches: int) -> list[Row]:
    """In this process."""
    return [
        checked(PART, check, partial(_look, torch.device(device), processes, batches))
        for processes, check in zip(PROCESSES, CHECKS, strict=True)
    ]


def _look(device: torch.device, processes: int, batches: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        pictures = [picture(*SIDE, seed=seed) for seed in range(8)]
        samples = [(f"{n:06d}", "jpg", pictures[n % len(pictures)], n % 10) for n in range(4 * BATCH)]
        written = write_shard(Path(folder, "train-000000.tar"), samples)
        split = Split(samples=len(samples), shards=[written.shard])
        index = write_index(Path(folder), Index(classes=None, splits={"train": split}), [written.rows])
        config = DataConfig(
            shards=folder, image_size=SIZE, augment="crop_flip", shuffle_buffer=64, loader_processes=processes
        )
        loader = TrainLoader(folder, index, config, rank=0, ranks=1, batch_size=BATCH, seed=0)
        stream = loader.batches(device=device)
        first = next(stream)
        there = first.images.device.type == device.type
        started = time.perf_counter()
        mean = torch.stack([batch.images.float().mean() for batch in itertools.islice(stream, batches)]).mean()
        value = mean.item()  # waits for the device
        seconds = time.perf_counter() - started
    rate = batches * BATCH / seconds
    good = there and 20 < value < 235
    return good, f"{rate:.0f} pictures/s", {"per_second": rate, "batches": batches, "mean_pixel": value}
