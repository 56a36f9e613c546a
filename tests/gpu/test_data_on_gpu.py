"""What only a GPU can show of the data: copies on a stream of their own, nvJPEG, normalisation there."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from qsr_engine.data.batches import ImageBatch, decode_batch
from qsr_engine.data.decoding import Decoder
from qsr_engine.data.device import Normalise, on_device
from qsr_engine.data.errors import DataError
from qsr_engine.data.gpu_decoding import GPUDecoder
from qsr_engine.data.samples import Sample
from qsr_engine.data.views import TrainView

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def jpeg(name: str, **options: object) -> Sample:
    stream = io.BytesIO()
    Image.fromarray(load_sample_image(name)).save(stream, format="JPEG", **options)
    return Sample("train-000000.tar", name, stream.getvalue(), 1)


def test_batches_arrive_whole_and_in_order_while_the_gpu_is_busy() -> None:
    """The memory of a batch on the CPU is overwritten as soon as the next one is asked for."""
    room = torch.empty(8, 3, 64, 64, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)

    def batches() -> Iterator[ImageBatch]:
        for number in range(30):
            room.fill_(number)
            yield ImageBatch(room, torch.full((8,), number))

    work = torch.randn(2000, 2000, device=CUDA)
    seen = []
    for batch in on_device(batches(), CUDA):
        work = work @ work / 2000  # so that copies are asked for long before they are needed
        seen.append((batch.images.float().mean(), batch.images.float().var(), batch.labels.float().mean()))
    values = torch.stack([torch.stack(row) for row in seen]).cpu()
    assert torch.equal(values[:, 0], torch.arange(30.0))
    assert not values[:, 1].any()
    assert torch.equal(values[:, 2], torch.arange(30.0))


def test_nvjpeg_shows_the_crops_of_the_cpu() -> None:
    samples: list[Sample | DataError] = [
        *(jpeg(name, quality=90) for name in ("china.jpg", "flower.jpg") for _ in range(4)),
        jpeg("china.jpg", progressive=True),
    ]
    decoder = Decoder(224, TrainView(224, "crop_flip"))
    ours = np.empty((len(samples), 224, 224, 3), np.uint8)
    decode_batch(samples, decoder, 5, ours, skip=False, replace=True)
    theirs = GPUDecoder(decoder, CUDA).batch(samples, 5, skip=False)
    assert theirs.images.device.type == "cuda"
    found = theirs.images.permute(0, 2, 3, 1).cpu().numpy()
    for one, other in zip(ours, found, strict=True):
        # nvJPEG upsamples colour and rounds its DCT otherwise.
        assert np.abs(one.astype(int) - other.astype(int)).mean() < 3


def test_a_broken_jpeg_is_named() -> None:
    good = jpeg("china.jpg")
    broken = good._replace(image=good.image[:3000] + b"\xff\xd9", key="broken")
    with pytest.raises(DataError, match="sample 'broken'"):
        GPUDecoder(Decoder(64, TrainView(64, "crop")), CUDA).batch([good, broken], random.randrange(9), skip=False)


def test_normalisation_is_that_of_the_cpu() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    here, there = (Normalise(device, torch.float32)(images.to(device)) for device in (torch.device("cpu"), CUDA))
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)
