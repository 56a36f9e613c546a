"""What is compared: ways to load training pictures.

All give batches of 64 crops of 224 pixels, uint8: a random crop of 8 to 100 % of the area and an aspect ratio of 3/4 to
4/3, resized bilinearly, and flipped for half of the pictures. Each way is written as its own documentation has it, with
its fastest settings here. A way imports its library when it is called: one that is not installed fails alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.loader.data import Batches, Data, make_written
from benchmarks.loader.local import floor, ours, timm_loader, torchvision_folder
from benchmarks.loader.peers import (
    dali,
    ffcv,
    litdata,
    prepare_ffcv,
    prepare_litdata,
    prepare_streaming,
    streaming,
    webdataset,
)


@dataclass(frozen=True)
class Way:
    name: str
    needs: str  # the module that must be there
    batches: Callable[[Data, int], Batches]  # without end; 0 means in this process, where the way can
    picture: str  # who decodes and resizes: a key of PICTURES
    prepare: Callable[[Data], None] | None = None  # makes its format
    versions: tuple[str, ...] = ()  # distributions to name, beside torch
    cores: tuple[int, ...] = (1, 2)  # it is measured on


OURS, BASELINE, FLOOR = "qsr_engine", "torchvision ImageFolder, Pillow", "floor: decoding the crop"
FFCV_JPEG = "ffcv, JPEG"
AUGMENTED = "qsr_engine, RandAugment (the paper's)"
EIGHT = ("qsr_engine, 8 processes", "qsr_engine, 8 threads")
WRITTEN = "qsr_engine, shards of webdataset's ShardWriter"
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
    *(
        Way(
            f"webdataset, {decoder}",
            "webdataset",
            partial(webdataset, version=version),
            picture,
            versions=("webdataset", "torchvision", "pillow"),
        )
        for version, decoder, picture in ((1, "Pillow", "pillow"), (2, "decode_jpeg", "torchvision tensors"))
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
    Way(AUGMENTED, "qsr_engine", partial(ours, randaugment=True), "augmented"),
    Way(
        "torchvision ImageFolder, Pillow, RandAugment",
        "torchvision",
        partial(torchvision_folder, version=1, randaugment=True),
        "augmented",
        cores=(1,),
    ),
    Way(
        "torchvision ImageFolder, decode_jpeg, RandAugment",
        "torchvision",
        partial(torchvision_folder, version=2, randaugment=True),
        "augmented",
        cores=(1,),
    ),
    Way(
        "timm, folder, RandAugment",
        "timm",
        partial(timm_loader, scheme="", augment="rand-m10-n2"),
        "augmented",
        cores=(1,),
    ),
    Way(WRITTEN, "qsr_engine", partial(ours, others=True), "ours", make_written, cores=(1,)),
    Way(EIGHT[0], "qsr_engine", partial(ours, most=8), "ours", cores=(2,)),
    Way(EIGHT[1], "qsr_engine", partial(ours, most=1, threads=8), "ours", cores=(2,)),
]
