"""This package's loader, the floor, and the two libraries that every user of pictures has: torchvision and timm."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from typing import Any

from benchmarks.loader.data import BATCH, SIZE, Batches, Data, random_box


def ours(
    data: Data, processes: int, randaugment: bool = False, threads: int = 1, most: int = 0, others: bool = False
) -> Batches:
    """`most`: loader processes, whatever the number of cores; `others`: shards that webdataset's writer has made."""
    from qsr_engine.config.recipe import DataConfig, RandAugmentConfig
    from qsr_engine.data import read_index
    from qsr_engine.data.loader import TrainLoader

    folder = data.written if others else data.shards
    config = DataConfig(
        shards=str(folder),
        train="train",
        image_size=SIZE,
        augment="crop_flip",
        randaugment=RandAugmentConfig(kind="composer") if randaugment else None,
        loader_processes=most or processes,
        loader_threads=threads,
    )
    loader = TrainLoader(folder, read_index(folder), config, rank=0, ranks=1, batch_size=BATCH, seed=0)
    for batch in loader.batches():
        yield batch.images


class Floor:
    """Decodes crops with libjpeg-turbo and keeps nothing: no resize, no batches, no files."""

    def __init__(self, data: Data) -> None:
        from qsr_engine.data import _jpeg

        draw = random.Random(0)
        self.work = []
        for _, jpeg, _ in data.samples():
            width, height, plain = _jpeg.size(jpeg)
            if plain:
                self.work.append((jpeg, random_box(width, height, draw)))
        draw.shuffle(self.work)

    def __iter__(self) -> Iterator[int]:
        from qsr_engine.data import _jpeg

        work = itertools.cycle(self.work)
        while True:
            for jpeg, box in itertools.islice(work, BATCH):
                _jpeg.decode(jpeg, *box, 8)  # in eighths of the size: whole
            yield BATCH


def floor(data: Data, processes: int) -> Batches:
    from torch.utils.data import DataLoader, IterableDataset

    class Endless(IterableDataset[int]):
        def __init__(self) -> None:
            self.floor = Floor(data)

        def __iter__(self) -> Iterator[int]:
            return iter(self.floor)

    # DataLoader's processes only send the number 64, as often as they are done with so many.
    return iter(DataLoader(Endless(), batch_size=None, num_workers=processes))


def endless(loader: Any) -> Batches:
    while True:
        for images, _ in loader:
            yield images


def transforms_of(version: int, randaugment: bool = False) -> Any:
    """v1: from a Pillow picture to a tensor. v2: from tensor to tensor."""
    from torchvision.transforms import v2

    augment = [v2.RandAugment(2, 10)] if randaugment else []
    if version == 1:
        from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

        return Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), *augment, PILToTensor()])
    return v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), *augment])


def decode_tensor(jpeg: Any) -> Any:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = torch.frombuffer(jpeg, dtype=torch.uint8) if isinstance(jpeg, bytes) else jpeg
    return decode_jpeg(encoded, mode=ImageReadMode.RGB)


def read_and_decode(path: str) -> Any:
    from torchvision.io import read_file

    return decode_tensor(read_file(path))


def torchvision_folder(data: Data, processes: int, version: int, randaugment: bool = False) -> Batches:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    options = {"loader": read_and_decode} if version == 2 else {}
    dataset = ImageFolder(str(data.folder / "train"), transforms_of(version, randaugment), **options)
    return endless(DataLoader(dataset, BATCH, shuffle=True, num_workers=processes, drop_last=True))


def timm_loader(data: Data, processes: int, scheme: str, augment: str | None = None) -> Batches:
    import torch
    from timm.data import create_dataset, create_loader

    root = data.shards if scheme else data.folder
    dataset = create_dataset(scheme, root=str(root), split="train", is_training=True, batch_size=BATCH)
    loader = create_loader(
        dataset,
        SIZE,
        BATCH,
        is_training=True,
        color_jitter=0.0,
        auto_augment=augment,
        interpolation="bilinear",
        num_workers=processes,
        device=torch.device("cpu"),
    )
    return endless(loader.loader)  # without the layer that makes float of it


def pillow_rgb(jpeg: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).convert("RGB")
