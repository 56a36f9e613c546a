"""Averaging on one GPU: side stream, CUDA graph, wire formats. Skipped where there is none.

NCCL takes one rank a GPU, so its all-reduce over one rank stands for that over several: it is launched and captured all
the same, and leaves every value as it is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qsr_engine.averaging.allreduce import AllReduce
from qsr_engine.averaging.background import Background
from qsr_engine.averaging.buckets import Piece, packed_pieces
from qsr_engine.averaging.chunks import sum_of_squares
from qsr_engine.averaging.compressed import BLOCK, Format, WireType
from qsr_engine.averaging.cuda_graph import Captured
from qsr_engine.averaging.gate import Gate

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


def all_reduce_of(tensors: list[torch.Tensor], packed: bool, divides_on_the_way: bool) -> AllReduce:
    """Over one rank that counts as two. NCCL's own mean leaves it as it is; a sum that is divided halves it."""
    pieces = packed_pieces(tensors, 1_000_000) if packed else [Piece((t,), in_place=True) for t in tensors]
    mean = AllReduce(pieces, None)
    mean.ranks = 2  # so that the collective is launched although there is one rank
    if not divides_on_the_way:
        mean._divides_on_the_way = lambda flat, divisor: False  # type: ignore[method-assign]
    return mean


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("divides_on_the_way", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_captured_averaging_sees_the_present_values(packed: bool, divides_on_the_way: bool) -> None:
    tensors = [torch.randn(size, device="cuda") for size in (300_000, 7, 90_000)]
    mean = Captured(all_reduce_of(tensors, packed, divides_on_the_way), None)
    order = range(len(mean.pieces))
    for round_ in range(1, 5):  # eager, captured and replayed, replayed, replayed
        for tensor in tensors:
            tensor.fill_(round_)
        assert [index for index, _ in mean.run(order)] == list(order)
        torch.cuda.synchronize()
        mean_of_two = round_ if divides_on_the_way else round_ / 2
        assert all(bool((tensor == mean_of_two).all()) for tensor in tensors)
    mean.close()
    mean.close()


@pytest.mark.usefixtures("_nccl")
def test_a_forward_waits_on_the_device_for_what_it_reads() -> None:
    """The averaging is made slow on its stream; a forward that did not wait would read the old weight."""
    layer = nn.Linear(64, 64, bias=False, device="cuda")

    def slow() -> Iterator[int]:
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # about 0.1 s
        layer.weight.data.fill_(2.0)
        yield 0

    gate = Gate(layer, {layer.weight: (0,)})
    background = Background(slow(), 1, torch.device("cuda", 0))
    gate.guard(background.wait)
    out = layer(torch.ones(1, 64, device="cuda"))
    background.finish()
    gate.remove()
    assert bool((out == 128).all())


@pytest.mark.parametrize("wire", ["bf16", "fp16", "int8"])
def test_a_gpu_rounds_as_a_cpu_does(wire: WireType) -> None:
    """But for ties of a division, which may fall either way: one step of the type."""
    wire_format, numel = Format(wire), 64 * BLOCK
    source = torch.randn(numel) * 1e-3
    decoded = []
    for device in ("cpu", "cuda"):
        part = torch.empty(wire_format.nbytes(numel), dtype=torch.uint8, device=device)
        wire_format.encode(source.to(device, copy=True), *wire_format.views(part, numel))
        target = torch.zeros(numel, device=device)
        wire_format.add(target, *wire_format.views(part, numel))
        decoded.append(target.cpu())
    step = {"bf16": 2**-8, "fp16": 2**-10, "int8": 1 / 127}[wire] * 5e-3
    torch.testing.assert_close(decoded[1], decoded[0], rtol=0, atol=step)


def test_sums_of_squares() -> None:
    flat = torch.randn(5_000_000)
    assert sum_of_squares(flat.cuda()).item() == pytest.approx(flat.double().square().sum().item(), rel=1e-9)
    flat[77] = float("inf")
    assert not sum_of_squares(flat.cuda()).isfinite()
