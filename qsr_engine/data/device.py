"""Batches on the device that trains: copied ahead of time, normalised and mixed there.

Pictures travel as uint8, a quarter of the bytes of float32, in channels-last memory. On a GPU they are pinned and
copied by a stream of their own while the step before is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torchvision.transforms import v2

from qsr_engine.data.batches import ImageBatch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, in RGB from 0 to 1


def on_device(batches: Iterable[ImageBatch], device: torch.device) -> Iterator[ImageBatch]:
    """The batches with images and labels on the device; on a GPU the next one is copied while one is used."""
    if device.type != "cuda":
        for batch in batches:
            yield ImageBatch(batch.images.to(device), batch.labels.to(device), batch.skipped)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: ImageBatch | None = None
    for batch in batches:
        copied = _copy(batch, device, stream)
        if ahead is not None:
            yield _ready(ahead, stream)
        ahead = copied
    if ahead is not None:
        yield _ready(ahead, stream)


def _copy(batch: ImageBatch, device: torch.device, stream: torch.cuda.Stream) -> ImageBatch:
    with torch.cuda.stream(stream):
        images = batch.images.pin_memory().to(device, non_blocking=True)
        return ImageBatch(images, batch.labels.pin_memory().to(device, non_blocking=True), batch.skipped)


def _ready(batch: ImageBatch, stream: torch.cuda.Stream) -> ImageBatch:
    """Let the current stream wait for the copy, and keep its memory from being used anew before that stream is done."""
    current = torch.cuda.current_stream(stream.device)
    current.wait_stream(stream)
    batch.images.record_stream(current)
    batch.labels.record_stream(current)
    return batch


class Normalise:
    """From uint8 pictures to what a model reads: (x / 255 - mean) / std by channel, in channels-last memory.

    Args:
        device: of the pictures.
        dtype: of the result; computed in fp32.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._scale = (1 / (255 * torch.tensor(STD, device=device))).view(1, 3, 1, 1)
        self._shift = (torch.tensor(MEAN, device=device) / torch.tensor(STD, device=device)).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to [B, 3, S, S]."""
        return images.float().mul_(self._scale).sub_(self._shift).to(self._dtype)


class MixUp:
    """Mixes each picture with the one before it in the batch, and their labels (Zhang et al., arXiv 1710.09412).

    Args:
        alpha: the share of a picture is drawn from Beta(alpha, alpha), once for a batch, by torch's global generator.
        classes: number of classes.
    """

    def __init__(self, alpha: float, classes: int) -> None:
        self._transform = v2.MixUp(alpha=alpha, num_classes=classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Floating-point images [B, 3, S, S] and int64 labels [B] to images and shares of classes [B, classes]."""
        mixed: tuple[Tensor, Tensor] = self._transform(images, labels)
        return mixed
