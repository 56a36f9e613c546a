"""What only a GPU can show of the data: copies on a stream of their own, normalisation there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.device import Normalise, on_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


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


def test_normalisation_is_that_of_the_cpu() -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    here, there = (Normalise(device, torch.float32)(images.to(device)) for device in (torch.device("cpu"), CUDA))
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)
