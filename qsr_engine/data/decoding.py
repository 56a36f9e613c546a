"""From the bytes of an image to a batch of tensors: decode, augment, normalise.

Images stay uint8 [3, H, W] until the batch is whole, then become float32 [B, 3, S, S].
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from qsr_engine.data.index import DataError
from qsr_engine.data.shards import Sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, in RGB from 0 to 1
MAX_PIXELS = 100_000_000  # 300 MB decoded; a larger image is a mistake or an attack
MAX_ASPECT = 100  # long side to short side; resizing the short side makes a bomb of a 1 x 100,000 image
SMALL = 64  # pixels of the short side; images up to here are shown whole, as is usual for CIFAR and digits

Batch = tuple[Tensor, Tensor]
Transform = Callable[[Tensor], Tensor]


class TrainTransform:
    """uint8 [3, H, W] to uint8 [3, S, S], augmented with torch's global generator.

    "none" resizes the short side to S and crops the centre. "crop" takes a random crop of random area and aspect
    ratio, resized to S; an image whose short side has at most 64 pixels is resized as for "none", padded with black
    by S / 8 pixels on each side and cropped to S at random. "crop_flip" is "crop" and, for half of
    the images, a horizontal flip.
    """

    def __init__(self, size: int, augment: str) -> None:
        whole = [v2.Resize(size), v2.CenterCrop(size)]
        crop = augment != "none"
        flip = [v2.RandomHorizontalFlip()] if augment == "crop_flip" else []
        self.small = v2.Compose([*whole, *([v2.RandomCrop(size, padding=size // 8)] if crop else []), *flip])
        self.large = v2.Compose([*([v2.RandomResizedCrop(size)] if crop else whole), *flip])

    def __call__(self, image: Tensor) -> Tensor:
        transformed: Tensor = (self.small if min(image.shape[1:]) <= SMALL else self.large)(image)
        return transformed


class EvalTransform:
    """uint8 [3, H, W] to uint8 [3, S, S], always the same.

    The short side is resized to S * 256 / 224, the usual margin at evaluation on ImageNet, and the centre is cropped;
    an image whose short side has at most 64 pixels is resized to S without a margin.
    """

    def __init__(self, size: int) -> None:
        self.small = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
        self.large = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])

    def __call__(self, image: Tensor) -> Tensor:
        transformed: Tensor = (self.small if min(image.shape[1:]) <= SMALL else self.large)(image)
        return transformed


def decode_image(sample: Sample) -> Tensor:
    """RGB, uint8 [3, H, W]. Raises DataError where the bytes are not a whole JPEG or PNG within the limits above."""
    where = f"{sample.shard}: sample {sample.key!r}"
    try:
        with Image.open(io.BytesIO(sample.image), formats=("JPEG", "PNG")) as image:
            size = f"{image.width} x {image.height} pixels"
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{where} has {size}; the limit is {MAX_PIXELS:,}")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise DataError(f"{where} has {size}; the limit is a side {MAX_ASPECT} times as long as the other")
            decoded: Tensor = functional.pil_to_tensor(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # what Pillow raises for broken bytes depends on the format and on where they break
        raise DataError(f"{where} does not decode as JPEG or PNG: {error}") from error
    return decoded


def decode_batch(samples: Sequence[Sample], transform: Transform, seed: int) -> Batch:
    """Decode and transform samples.

    The transform's random numbers depend on the seed alone; the generators of this process are as before.

    Returns:
        images, float32 [B, 3, S, S], (x / 255 - mean) / std by channel; labels, int64 [B].
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it seeds the generators of all GPUs too, and with it the model's dropout.
        torch.default_generator.manual_seed(seed)
        images = torch.stack([transform(decode_image(sample)) for sample in samples])
    normalised: Tensor = functional.normalize(functional.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    return normalised, torch.tensor([sample.label for sample in samples], dtype=torch.int64)
