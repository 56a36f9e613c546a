"""What an averaging with fewer bits on the wire costs in operators, bytes and memory, whatever K is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from qsr_engine.averaging import Averager
from qsr_engine.averaging.compressed import WireType
from qsr_engine.config.averaging import AveragingConfig

WIRES: list[WireType] = ["bf16", "fp16", "int8"]


@pytest.fixture
def workers(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many as there are asked for; the others are not there, and what they would send is not looked at."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that are called, and the bytes of those that make memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.found[str(func)] += 1
        if "empty" in str(func):
            self.made += result.nbytes
        return result


def averager_of(sizes: list[int], wire: WireType) -> Averager:
    return Averager([torch.ones(size) for size in sizes], None, AveragingConfig(wire_dtype=wire))


def calls_of(averager: Averager) -> Calls:
    averager.average()  # makes the staging buffers
    calls = Calls()
    with calls:
        averager.average()
    return calls


OPERATORS: dict[tuple[WireType, int], int] = {}


@pytest.mark.parametrize("workers", [2, 16], indirect=True)
@pytest.mark.parametrize("wire", WIRES)
def test_a_piece_takes_as_many_operators_whatever_k_is(workers: int, wire: WireType) -> None:
    """A loop over the ranks took 8 times as many with 16 workers as with 2. Sizes that 16 does not divide."""
    for size in (1000, 100_003, 1_000_003):
        found = sum(calls_of(averager_of([size], wire)).found.values())
        of_two = OPERATORS.setdefault((wire, size), found)
        assert found <= 1.3 * of_two + 12, (workers, size)  # + a tile that is cut elsewhere, and the padding of one


@pytest.mark.parametrize("workers", [16], indirect=True)
@pytest.mark.parametrize("wire", WIRES)
def test_staging_is_made_once(workers: int, wire: WireType) -> None:
    """As bytes of the second averaging show. What is made is a tile's, and no bytes that travel."""
    assert calls_of(averager_of([1_000_003, 1000, 2000], wire)).made == 0


@pytest.mark.parametrize("workers", [1000], indirect=True)
@pytest.mark.parametrize("wire", WIRES)
def test_small_shards_travel_together_and_without_padding(workers: int, wire: WireType) -> None:
    """A shard of 768 elements sent 2.0 MB in bf16 to 1,000 workers: a block of 512 to each. In fp32 it is 6 kB."""
    nbytes = {"bf16": 2, "fp16": 2, "int8": 1}[wire]
    assert averager_of([768], wire).bytes_per_averaging <= 16_000
    many = averager_of([768] * 300, wire)
    assert len(many.pieces) == 1
    assert many.bytes_per_averaging <= 1.05 * 2 * 300 * 768 * (nbytes + (0 if wire == "bf16" else 4 / 230))
