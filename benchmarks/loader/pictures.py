"""One crop, decoded and resized as each way does it: which ways give the same pictures?"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.loader.data import SIZE, Box, Pixels
from benchmarks.loader.local import decode_tensor, pillow_rgb


def picture_ours(jpeg: bytes, box: Box) -> Pixels:
    from qsr_engine.data.decoding import Decoder
    from qsr_engine.data.samples import Sample
    from qsr_engine.data.views import View

    picture = np.empty((SIZE, SIZE, 3), np.uint8)
    decoder = Decoder(SIZE, lambda width, height, draw: View(*box))
    bad = decoder.decode([Sample("", "", jpeg, 0)], random.Random(0), picture[None])
    assert not bad, bad
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
