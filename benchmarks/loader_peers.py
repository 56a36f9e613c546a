"""What benchmarks/loader.py compares: ways to load training pictures, and the formats that they read.

All give batches of 64 crops of 224 pixels, uint8: a random crop of 8 to 100 % of the area and an aspect ratio of 3/4 to
4/3, resized bilinearly, and flipped for half of the pictures. Each way is written as its own documentation has it, with
its fastest settings here. A way imports its library when it is called: one that is not installed fails alone.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np

SIZE, BATCH = 224, 64
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SHUFFLE = 1000  # samples in a shuffle buffer, where a way has one
Box = tuple[int, int, int, int]  # left, top, width, height
Batches = Iterator[Any]  # pictures, or the number of pictures in the batch
Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Data:
    """One data set in all formats. `shards` and `folder` hold every picture `copies` times, as links."""

    root: Path
    copies: int

    @property
    def single(self) -> Path:
        """Shards of every picture once."""
        return self.root / "single"

    @property
    def shards(self) -> Path:
        return self.root / f"shards-{self.copies}"

    @property
    def folder(self) -> Path:
        """train/CLASS/KEY.jpg."""
        return self.root / f"folder-{self.copies}"

    def tars(self, folder: Path | None = None) -> list[str]:
        return sorted(map(str, (folder or self.single).glob("*.tar")))

    def samples(self) -> Iterator[tuple[str, bytes, int]]:
        """Key, JPEG and label of every picture once."""
        for name in self.tars():
            with tarfile.open(name) as tar:
                members = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
                for member, stream in members.items():
                    label = members.get(f"{member.removesuffix('.jpg')}.cls")
                    if stream and label:
                        yield Path(member).stem, stream.read(), int(label.read())


@dataclass(frozen=True)
class Way:
    name: str
    needs: str  # the module that must be there
    batches: Callable[[Data, int], Batches]  # without end; 0 means in this process, where the way can
    picture: str  # who decodes and resizes: a key of PICTURES
    prepare: Callable[[Data], None] | None = None  # makes its format
    versions: tuple[str, ...] = ()  # distributions to name, beside torch


def random_box(width: int, height: int, draw: random.Random) -> Box:
    for _ in range(10):
        area = width * height * draw.uniform(*SCALE)
        aspect = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    side = min(width, height)  # all but never reached
    return (width - side) // 2, (height - side) // 2, side, side


# ---------------------------------------------------------------------------------------------------- base formats


def make_once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder under another name first, so that what is there is whole."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    make(unfinished)
    unfinished.rename(path)


def make_base(source: Path, data: Data, short_side: int | None) -> None:
    """Make what every way starts from: shards and a folder of the source's pictures, or of their short side resized."""

    def single(folder: Path) -> None:
        folder.mkdir()
        for path in sorted(source.glob("*.tar")):
            if short_side is None:
                (folder / path.name).symlink_to(path.resolve())
            else:
                _reencode(path, folder / path.name, short_side)

    make_once(data.single, single)
    make_once(data.shards, partial(_copied_shards, data))
    make_once(data.root / "files", partial(_extract, data))
    make_once(data.folder, partial(_copied_folder, data))


def _reencode(source: Path, target: Path, short_side: int) -> None:
    from PIL import Image

    with tarfile.open(source) as read, tarfile.open(target, "w") as write:
        for member in read:
            stream = read.extractfile(member)
            if stream is None:
                continue
            content = stream.read()
            if member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(content)).convert("RGB")
                factor = short_side / min(image.size)
                size = round(image.width * factor), round(image.height * factor)
                encoded = io.BytesIO()
                image.resize(size, Image.Resampling.BILINEAR).save(encoded, "JPEG", quality=90)
                content = encoded.getvalue()
            info = tarfile.TarInfo(member.name)
            info.size = len(content)
            write.addfile(info, io.BytesIO(content))


def _copied_shards(data: Data, folder: Path) -> None:
    from qsr_engine.data import index_shards

    folder.mkdir()
    for number, (_, tar) in enumerate(itertools.product(range(data.copies), data.tars())):
        (folder / f"train-{number:06d}.tar").symlink_to(Path(tar).resolve())
    split = index_shards(folder).splits["train"]
    timm_split = {
        "name": "train",
        "num_samples": split.samples,
        "filenames": [shard.name for shard in split.shards],
        "shard_lengths": [shard.samples for shard in split.shards],
    }
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": timm_split}}), encoding="utf-8")


def _extract(data: Data, folder: Path) -> None:
    for key, jpeg, label in data.samples():
        path = folder / f"{label:04d}" / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)


def _copied_folder(data: Data, folder: Path) -> None:
    for path in sorted((data.root / "files").glob("*/*.jpg")):
        target = folder / "train" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        for copy in range(data.copies):
            (target / f"{path.stem}-{copy}.jpg").symlink_to(path.resolve())


# ------------------------------------------------------------------------------------------------- ours and the floor


def ours(data: Data, processes: int) -> Batches:
    from qsr_engine.config.recipe import DataConfig
    from qsr_engine.data import read_index
    from qsr_engine.data.loader import TrainLoader

    config = DataConfig(
        shards=str(data.shards),
        train="train",
        image_size=SIZE,
        augment="crop_flip",
        loader_processes=processes,
    )
    index = read_index(data.shards)
    loader = TrainLoader(data.shards, index, config, rank=0, ranks=1, batch_size=BATCH, seed=0)
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


# -------------------------------------------------------------------------------------------- torchvision and timm


def endless(loader: Any) -> Batches:
    while True:
        for images, _ in loader:
            yield images


def transforms_of(version: int) -> Any:
    """v1: from a Pillow picture to a tensor. v2: from tensor to tensor."""
    if version == 1:
        from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

        return Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), PILToTensor()])
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])


def decode_tensor(jpeg: Any) -> Any:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = torch.frombuffer(jpeg, dtype=torch.uint8) if isinstance(jpeg, bytes) else jpeg
    return decode_jpeg(encoded, mode=ImageReadMode.RGB)


def read_and_decode(path: str) -> Any:
    from torchvision.io import read_file

    return decode_tensor(read_file(path))


def torchvision_folder(data: Data, processes: int, version: int) -> Batches:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    options = {"loader": read_and_decode} if version == 2 else {}
    dataset = ImageFolder(str(data.folder / "train"), transforms_of(version), **options)
    return endless(DataLoader(dataset, BATCH, shuffle=True, num_workers=processes, drop_last=True))


def timm_loader(data: Data, processes: int, scheme: str) -> Batches:
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
        interpolation="bilinear",
        num_workers=processes,
        device=torch.device("cpu"),
    )
    return endless(loader.loader)  # without the layer that makes float of it


# ----------------------------------------------------------------------------------------------- sharded formats


def pillow_rgb(jpeg: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).convert("RGB")


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


# ------------------------------------------------------------------------------------------------- ffcv and DALI


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


# ------------------------------------------------------------------------------------------------------- same pictures


def picture_ours(jpeg: bytes, box: Box) -> Pixels:
    from qsr_engine.data.decoding import Decoder
    from qsr_engine.data.samples import Sample
    from qsr_engine.data.views import View

    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    decoder = Decoder(SIZE, lambda width, height, draw: View(*box))
    decoder.decode(Sample("", "", jpeg, 0), random.Random(0), picture)
    return picture


def picture_pillow(jpeg: bytes, box: Box) -> Pixels:
    """The reference: Pillow's own crop and antialiased bilinear resize."""
    from PIL import Image

    left, top, width, height = box
    crop = pillow_rgb(jpeg).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def picture_tensor(jpeg: bytes, box: Box) -> Pixels:
    from torchvision.transforms.v2 import functional

    left, top, width, height = box
    image = functional.resized_crop(decode_tensor(jpeg), top, left, height, width, [SIZE, SIZE], antialias=True)
    pixels: Pixels = image.permute(1, 2, 0).numpy()
    return pixels


def picture_ffcv(jpeg: bytes, box: Box, mode: str) -> Pixels:
    from ffcv.libffcv import imdecode, resize_crop

    image = np.array(pillow_rgb(jpeg))
    if mode == "jpg":
        height, width = image.shape[:2]
        encoded = np.frombuffer(jpeg, np.uint8).copy()
        imdecode(encoded, image, height, width, height, width, 0, 0, 1, 1, False, False)
    left, top, width, height = box
    resized = np.empty((SIZE, SIZE, 3), np.uint8)
    resize_crop(image, top, top + height, left, left + width, resized)
    return resized


def picture_dali(jpeg: bytes, box: Box) -> Pixels:
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        encoded = fn.external_source([np.frombuffer(jpeg, np.uint8)], batch=False, cycle=True)
        image = fn.decoders.image_slice(encoded, start=[box[1], box[0]], shape=[box[3], box[2]], axes=[0, 1])
        pipeline.set_outputs(fn.resize(image, resize_x=SIZE, resize_y=SIZE, antialias=True))
    pipeline.build()
    return np.array(pipeline.run()[0].at(0))


PICTURES: dict[str, Callable[[bytes, Box], Pixels]] = {
    "ours": picture_ours,
    "pillow": picture_pillow,
    "torchvision tensors": picture_tensor,
    "ffcv-jpg": partial(picture_ffcv, mode="jpg"),
    "ffcv-raw": partial(picture_ffcv, mode="raw"),
    "dali": picture_dali,
}


# -------------------------------------------------------------------------------------------------------------- list

OURS, BASELINE, FLOOR = "qsr_engine", "torchvision ImageFolder, Pillow", "floor: decoding the crop"
FFCV_JPEG = "ffcv, JPEG"
WAYS = [
    Way(FLOOR, "qsr_engine", floor, ""),
    Way(OURS, "qsr_engine", ours, "ours", versions=("qsr-engine",)),
    Way(BASELINE, "torchvision", partial(torchvision_folder, version=1), "pillow", versions=("torchvision", "pillow")),
    Way(
        "torchvision ImageFolder, decode_jpeg",
        "torchvision",
        partial(torchvision_folder, version=2),
        "torchvision tensors",
        versions=("torchvision",),
    ),
    Way("timm, folder", "timm", partial(timm_loader, scheme=""), "pillow", versions=("timm", "pillow")),
    Way(
        "timm, webdataset",
        "timm",
        partial(timm_loader, scheme="wds/"),
        "pillow",
        versions=("timm", "webdataset", "pillow"),
    ),
    Way(
        "webdataset, Pillow",
        "webdataset",
        partial(webdataset, version=1),
        "pillow",
        versions=("webdataset", "torchvision", "pillow"),
    ),
    Way(
        "webdataset, decode_jpeg",
        "webdataset",
        partial(webdataset, version=2),
        "torchvision tensors",
        versions=("webdataset", "torchvision"),
    ),
    *(
        Way(
            f"ffcv, {name}",
            "ffcv",
            partial(ffcv, mode=mode),
            f"ffcv-{mode}",
            partial(prepare_ffcv, mode=mode),
            versions=("ffcv", "numba", "opencv-python"),
        )
        for name, mode in (("JPEG", "jpg"), ("raw pixels", "raw"))
    ),
    Way("litdata", "litdata", litdata, "torchvision tensors", prepare_litdata, versions=("litdata", "torchvision")),
    Way(
        "mosaicml-streaming",
        "streaming",
        streaming,
        "torchvision tensors",
        prepare_streaming,
        versions=("mosaicml-streaming", "torchvision"),
    ),
    Way("DALI on the CPU", "nvidia.dali", dali, "dali", versions=("nvidia-dali-cuda130",)),
]
