"""JPEGs decoded by the GPU that trains (nvJPEG, through torchvision), as an option of the recipe.

A thread of the rank reads the bytes of the next batches; the GPU decodes the whole images, cuts out the boxes and
resizes them. The crops are those of the CPU's decoder. What nvJPEG may not decode (progressive, CMYK, PNG, ...) is
decoded on the CPU. Evaluation is always decoded there.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from qsr_engine.data.batches import ImageBatch, decode_spare, replace_bad, torch_seeded
from qsr_engine.data.decoding import Decoder, image_size
from qsr_engine.data.errors import DataError
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import View

_AHEAD = 4  # batches that are read before they are decoded
_LEAVE = 5.0  # seconds for the thread that reads, at the end of the process
Made = TypeVar("Made")


class GPUDecoder:
    """Decodes batches on a device; on a CPU too, which is slow, and serves to compare both.

    Args:
        decoder: chooses the views, augments, and decodes what the device does not.
    """

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self.decoder, self.device = decoder, device

    def batch(
        self,
        samples: Sequence[Sample | DataError],
        seed: int,
        spares: Iterable[Sample | DataError] = (),
        *,
        skip: bool,
    ) -> ImageBatch:
        """Pictures uint8 [B, 3, S, S], channels-last, and labels on the device.

        Raises:
            DataError: a sample is bad and `skip` is false, or all of them are.
        """
        random, size = Random(seed), self.decoder.size
        pictures = torch.zeros(len(samples), 3, size, size, dtype=torch.uint8, device=self.device)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        labels: list[int] = []
        bad: dict[int, str] = {}
        here: list[tuple[int, Sample, View]] = []
        with torch_seeded(seed, self.decoder.augment is not None):
            for number, sample in enumerate(samples):
                try:
                    if isinstance(sample, DataError):
                        raise sample
                    labels.append(sample.label)
                    width, height, simple = image_size(sample)
                    if simple:
                        here.append((number, sample, self.decoder.choose(width, height, random)))
                    else:
                        pixels = np.empty((size, size, 3), np.uint8)
                        self.decoder.decode(sample, random, pixels)
                        pictures[number] = torch.from_numpy(pixels).permute(2, 0, 1).to(self.device)
                except DataError as error:
                    self._note(number, error, labels, bad, skip)
            decoded = self._decode([sample for _, sample, _ in here])
            for (number, _, view), image in zip(here, decoded, strict=True):
                if isinstance(image, DataError):
                    self._note(number, image, labels, bad, skip)
                else:
                    pictures[number] = self._show(image, view)
            if len(bad) == len(samples):
                pixels = np.empty((size, size, 3), np.uint8)
                labels[:] = [decode_spare(self.decoder, spares, random, pixels, list(bad.values()))] * len(labels)
                pictures[:] = torch.from_numpy(pixels).permute(2, 0, 1).to(self.device)
            else:
                replace_bad(pictures, labels, bad)
        return ImageBatch(pictures, torch.tensor(labels, device=self.device), tuple(bad.values()))

    @staticmethod
    def _note(number: int, error: DataError, labels: list[int], bad: dict[int, str], skip: bool) -> None:
        if not skip:
            raise error
        bad[number] = str(error)
        labels[number:] = [-1, *labels[number + 1 :]]

    def _decode(self, samples: list[Sample]) -> list[Tensor | DataError]:
        """uint8 [3, H, W] of each sample; all in one call, or one by one where one of them is broken."""
        data = [torch.frombuffer(bytearray(sample.image), dtype=torch.uint8) for sample in samples]
        if not data:
            return []
        try:
            return list(decode_jpeg(data, mode=ImageReadMode.RGB, device=self.device))
        except RuntimeError as error:
            if len(samples) == 1:
                return [DataError(f"{samples[0].where} does not decode as JPEG: {error}")]
        return [image for sample in samples for image in self._decode([sample])]

    def _show(self, image: Tensor, view: View) -> Tensor:
        """uint8 [3, S, S]: the box of a view, antialiased; a box with context is rounded to whole pixels."""
        size = self.decoder.size
        left, top = round(view.left), round(view.top)
        box = image[None, :, top : top + max(1, round(view.height)), left : left + max(1, round(view.width))].float()
        shown = interpolate(box, (size, size), mode="bilinear", antialias=True)[0].round_().clamp_(0, 255).byte()
        if view.dx or view.dy:
            pad = (max(0, view.dx), max(0, -view.dx), max(0, view.dy), max(0, -view.dy))
            shown = torch.nn.functional.pad(shown, pad)[:, pad[3] :, pad[1] :][:, :size, :size]
        if view.flip:
            shown = shown.flip(2)
        return shown if self.decoder.augment is None else self.decoder.augment.transform(shown)


def in_thread(items: Iterable[Made]) -> Iterator[Made]:
    """The items, made by a thread that is a few of them ahead."""
    ahead: queue.Queue[tuple[bool, Made | Exception | None]] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(last: bool, item: Made | Exception | None) -> None:
        while not stopped.is_set():
            try:
                ahead.put((last, item), timeout=0.1)
                return
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in items:
                if stopped.is_set():
                    return
                put(False, item)
            put(True, None)
        except Exception as error:
            put(True, error)

    def end() -> None:
        stopped.set()
        thread.join(_LEAVE)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    atexit.register(end)  # a thread that comes back from torch to an interpreter that is gone aborts the process
    try:
        while True:
            last, item = ahead.get()
            if isinstance(item, Exception):
                raise item
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        atexit.unregister(end)
