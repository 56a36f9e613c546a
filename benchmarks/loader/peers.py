"""Loaders of sharded formats of others, each with what makes its format."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np

from benchmarks.loader.data import BATCH, RATIO, SCALE, SHUFFLE, SIZE, Batches, Data, make_once
from benchmarks.loader.local import decode_tensor, endless, pillow_rgb, transforms_of


def chain(functions: list[Callable[[Any], Any]], value: Any) -> Any:
    for function in functions:
        value = function(value)
    return value


def webdataset(data: Data, processes: int, version: int) -> Batches:
    import webdataset as wds

    decode = [pillow_rgb if version == 1 else decode_tensor, transforms_of(version)]
    dataset = (
        wds.WebDataset(data.tars(data.shards), shardshuffle=100, empty_check=False)
        .shuffle(SHUFFLE)
        .to_tuple("jpg", "cls")
        .map_tuple(partial(chain, decode), int)
        .batched(BATCH, partial=False)
    )
    return endless(wds.WebLoader(dataset, batch_size=None, num_workers=processes))


def litdata_sample(item: tuple[str, int]) -> dict[str, Any]:
    from PIL import Image

    return {"image": Image.open(item[0]), "label": item[1]}  # stored as the file's bytes


def prepare_litdata(data: Data) -> None:
    from litdata import optimize

    def make(folder: Path) -> None:
        files = sorted((data.folder / "train").glob("*/*.jpg"))
        random.Random(0).shuffle(files)
        inputs = [(str(file), int(file.parent.name)) for file in files]
        optimize(fn=litdata_sample, inputs=inputs, output_dir=str(folder), chunk_bytes="64MB", num_workers=1)

    make_once(data.root / f"litdata-{data.copies}", make)


def litdata(data: Data, processes: int) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    transform = transforms_of(2)

    class Pictures(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return transform(sample["image"]), sample["label"]  # decoded with torchvision.io

    dataset = Pictures(str(data.root / f"litdata-{data.copies}"), shuffle=True, drop_last=True)
    return endless(StreamingDataLoader(dataset, batch_size=BATCH, num_workers=processes))


def prepare_streaming(data: Data) -> None:
    from streaming import MDSWriter

    def make(folder: Path) -> None:
        samples = list(data.samples())
        with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
            for _, jpeg, label in samples * data.copies:
                writer.write({"image": jpeg, "label": label})

    make_once(data.root / f"mds-{data.copies}", make)


def streaming(data: Data, processes: int) -> Batches:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    transform = transforms_of(2)

    class Pictures(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return transform(decode_tensor(sample["image"])), sample["label"]

    clean_stale_shared_memory()
    dataset = Pictures(local=str(data.root / f"mds-{data.copies}"), shuffle=True, batch_size=BATCH)
    return endless(DataLoader(dataset, BATCH, num_workers=processes, drop_last=True))


def store_as_is(field: Any, destination: Any, jpeg: bytes, malloc: Any) -> None:
    """In place of ffcv's field, which encodes every picture anew: the same bytes as for all others."""
    from PIL import Image

    destination["mode"] = 0  # JPEG
    destination["width"], destination["height"] = Image.open(io.BytesIO(jpeg)).size
    destination["data_ptr"], storage = malloc(len(jpeg))
    storage[:] = np.frombuffer(jpeg, np.uint8)


class Listed:
    """All pictures once, in the form that ffcv's writer wants."""

    def __init__(self, data: Data, mode: str) -> None:
        self.samples, self.mode = list(data.samples()), mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        _, jpeg, label = self.samples[index]
        return (jpeg if self.mode == "jpg" else np.asarray(pillow_rgb(jpeg))), label


def prepare_ffcv(data: Data, mode: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    def make(path: Path) -> None:
        field = RGBImageField(write_mode=mode)
        if mode == "jpg":
            field.encode = MethodType(store_as_is, field)
        writer = DatasetWriter(str(path), {"image": field, "label": IntField()}, page_size=1 << 27, num_workers=1)
        writer.from_indexed_dataset(Listed(data, mode))

    make_once(data.root / f"ffcv-{mode}.beton", make)


def ffcv(data: Data, processes: int, mode: str) -> Batches:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    path = str(data.root / f"ffcv-{mode}.beton")
    loader = Loader(
        path,
        batch_size=BATCH,
        num_workers=max(1, processes),
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(Reader(path).num_samples, dtype=np.uint64), 10 * data.copies),  # costs nothing
        drop_last=True,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=SCALE, ratio=RATIO),
                RandomHorizontalFlip(),
                ToTensor(),
                ToTorchImage(),
            ],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    return endless(loader)


def dali(data: Data, processes: int) -> Batches:
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    pipeline = Pipeline(batch_size=BATCH, num_threads=max(1, processes), device_id=None, seed=0)
    with pipeline:
        jpegs, labels = fn.readers.webdataset(
            paths=data.tars(),
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=SHUFFLE,
            missing_component_behavior="error",
        )
        images = fn.decoders.image_random_crop(jpegs, random_area=list(SCALE), random_aspect_ratio=list(RATIO))
        images = fn.resize(images, resize_x=SIZE, resize_y=SIZE, antialias=True)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        pipeline.set_outputs(images, fn.pad(labels, axes=[0], shape=[4]))
    for batches in DALIGenericIterator([pipeline], ["images", "labels"], size=-1):
        yield batches[0]["images"]
