"""Averaging on one GPU: NCCL's mean, side stream, CUDA graph, wire formats. Skipped where there is none.

NCCL takes one rank a GPU. A second one is pretended, of zeros, so that a mean halves every value.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qsr_engine.averaging import Averager
from qsr_engine.averaging.background import Background
from qsr_engine.averaging.chunks import sum_of_squares
from qsr_engine.averaging.compressed import BLOCK, Format, WireType
from qsr_engine.averaging.cuda_graph import Captured
from qsr_engine.averaging.gate import Gate
from qsr_engine.config.averaging import AveragingConfig
from tests.support import second_rank

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu", reason="needs a GPU"
)


@pytest.fixture
def _nccl() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("divides_on_the_way", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_the_mean_is_of_the_present_values(captured: bool, divides_on_the_way: bool) -> None:
    """Large tensors in place, small ones packed; eager, captured and replayed."""
    tensors = [torch.empty(size, device="cuda") for size in (300_000, 7, 90_000, 11)]
    averager = Averager(tensors, None, AveragingConfig(shared_memory=False, bucket_mb=1, cuda_graph=captured))
    assert isinstance(averager._reducer, Captured) == captured
    assert {piece.in_place for piece in averager.pieces} == {True, False}
    if not divides_on_the_way:
        reducer: Any = averager._reducer
        reducer = reducer._reducer if captured else reducer
        reducer._divides_on_the_way = lambda flat, divisor: False
    with second_rank.of_zeros(averager):
        for round_ in range(1, 5):  # eager, captured and replayed, replayed, replayed
            for tensor in tensors:
                tensor.fill_(round_)
            averager.average()
            torch.cuda.synchronize()
            assert all(bool((tensor == round_ / 2).all()) for tensor in tensors)
    averager.close()
    averager.close()


@pytest.mark.usefixtures("_nccl")
def test_a_forward_waits_on_the_device_for_what_it_reads() -> None:
    """The averaging is made slow on its stream; a forward that did not wait would read the old weight."""
    layer = nn.Linear(64, 64, bias=False, device="cuda")

    def slow() -> Iterator[int]:
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # about 0.1 s
        layer.weight.data.fill_(2.0)
        yield 0

    gate = Gate(layer, {layer.weight: (0,)})
    background = Background(torch.device("cuda", 0))
    background.begin(slow(), [0])
    gate.guard(background.wait)
    out = layer(torch.ones(1, 64, device="cuda"))
    background.finish()
    gate.remove()
    assert bool((out == 128).all())


@pytest.mark.parametrize("wire", ["bf16", "fp16", "int8"])
def test_a_gpu_rounds_as_a_cpu_does(wire: WireType) -> None:
    """But for ties of a division, which may fall either way: one step of the type."""
    shape = Format(wire, 1, 64 * BLOCK)
    source = torch.randn(shape.numel) * 1e-3
    decoded = []
    for device in ("cpu", "cuda"):
        row = torch.empty(1, shape.nbytes, dtype=torch.uint8, device=device)
        views = shape.views(row, slice(0, 1), slice(0, shape.blocks))
        shape.encode(source.to(device, copy=True), *views)
        target = torch.zeros(shape.numel, device=device)
        shape.add(target, *views)
        decoded.append(target.cpu())
    step = {"bf16": 2**-8, "fp16": 2**-10, "int8": 1 / 127}[wire] * 5e-3
    torch.testing.assert_close(decoded[1], decoded[0], rtol=0, atol=step)


def test_sums_of_squares() -> None:
    flat = torch.randn(5_000_000)
    assert sum_of_squares(flat.cuda()).item() == pytest.approx(flat.double().square().sum().item(), rel=1e-9)
    flat[77] = float("inf")
    assert not sum_of_squares(flat.cuda()).isfinite()
