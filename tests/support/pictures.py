"""Photographs, and what a decoder shows of them."""

from __future__ import annotations

import io
import random
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from qsr_engine.data.decoding import Decoder, Pixels
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import EvalView, TrainView


def encode(image: Image.Image, format: str = "PNG", label: int = 3, **options: Any) -> Sample:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return Sample("train-000000.tar", "k7", stream.getvalue(), label)


@cache
def photo(name: str = "china.jpg") -> Image.Image:
    """A real photograph of 640 x 427 pixels, which comes with scikit-learn."""
    return Image.fromarray(load_sample_image(name))


def ramp(height: int, width: int) -> Image.Image:
    """Rises from left to right, so that a flip and the place of a crop can be seen."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())


def show(decoder: Decoder, image: Image.Image | Sample, seed: int = 0) -> Pixels:
    out = np.full((decoder.size, decoder.size, 3), 77, np.uint8)
    sample = image if isinstance(image, Sample) else encode(image)
    for error in decoder.decode([sample], random.Random(seed), out[None]).values():
        raise error
    return out


def train_decoder(size: int, augment: str) -> Decoder:
    return Decoder(size, TrainView(size, augment))


def evaluation_decoder(size: int) -> Decoder:
    return Decoder(size, EvalView(size))


def difference(one: Pixels, other: Pixels) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())
