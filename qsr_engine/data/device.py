"""Batches on the device that trains: copied ahead of time, normalised and mixed there.

Pictures travel as uint8, a quarter of the bytes of float32, in channels-last memory. To a GPU they go by a stream of
their own while the step before is computed, from where the loader processes have put them: that memory is pinned
(ring.py), and is theirs again when the event behind its copy has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torchvision.transforms import v2

from qsr_engine.data.batches import ImageBatch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, in RGB from 0 to 1


class Event(Protocol):
    """Comes when a copy is done."""

    def query(self) -> bool:
        """Whether it has come."""

    def synchronize(self) -> None:
        """Wait for it."""


class Copies(Protocol):
    """Copies batches to a device, none of which the host waits for."""

    def start(self, batch: ImageBatch) -> tuple[ImageBatch, Event]:
        """The batch as it will be on the device, and the event behind its copy."""

    def hand_over(self, batch: ImageBatch, event: Event) -> None:
        """Let the stream that trains wait for the event, and hold the batch until that stream is done with it."""


def on_device(batches: Iterable[ImageBatch], device: torch.device) -> Iterator[ImageBatch]:
    """The batches with images and labels on the device; on a GPU the next one is copied while one is used."""
    if device.type == "cuda":
        yield from copied_ahead(batches, _CudaCopies(device))
        return
    for batch in batches:
        yield ImageBatch(batch.images.to(device), batch.labels.to(device), batch.skipped)


def copied_ahead(batches: Iterable[ImageBatch], copies: Copies) -> Iterator[ImageBatch]:
    """The batches on the device, one copy ahead. A batch of the host is held until the event behind its copy."""
    held: deque[tuple[Event, ImageBatch]] = deque()
    ahead: tuple[ImageBatch, Event] | None = None
    try:
        for batch in batches:
            while held and held[0][0].query():
                held.popleft()
            started = copies.start(batch)
            held.append((started[1], batch))
            del batch  # or its memory would be held until the next one is there
            if ahead is not None:
                copies.hand_over(*ahead)
                yield ahead[0]
            ahead = started
        if ahead is not None:
            copies.hand_over(*ahead)
            yield ahead[0]
    finally:
        for event, _ in held:
            event.synchronize()


class _CudaCopies:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, batch: ImageBatch) -> tuple[ImageBatch, Event]:
        with torch.cuda.stream(self._stream):
            images, labels = self._copy(batch.images), self._copy(batch.labels)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return ImageBatch(images, labels, batch.skipped), event

    def _copy(self, tensor: Tensor) -> Tensor:
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()  # a copy: labels, and what no ring has made
        return pinned.to(self._stream.device, non_blocking=True)

    def hand_over(self, batch: ImageBatch, event: Event) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(event)  # type: ignore[arg-type]  # it is start()'s own
        batch.images.record_stream(current)
        batch.labels.record_stream(current)


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
