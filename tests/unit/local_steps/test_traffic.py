"""The formulas of what leaves a worker, against a slow simulation that walks every chunk over every link of a ring."""

from __future__ import annotations

import pytest

from qsr_engine.averaging import compressed
from qsr_engine.local_steps import traffic
from qsr_engine.local_steps.traffic import (
    averaging_bytes,
    bytes_percent,
    deepspeed_parallel_bytes,
    exchange_bytes,
    fsdp_parallel_bytes,
)

SIZES = [(2, 1), (2, 2), (2, 4), (2, 8), (3, 2), (4, 1), (4, 4), (1, 4), (1, 1)]  # workers, worker_size


def ring(ranks: list[int], nbytes: int, passes: int, worker_size: int) -> dict[int, int]:
    """Bytes that leave each worker when `nbytes`, which the ranks divide, go round a ring: chunk after chunk, link
    after link. A reduce-scatter and an all-gather both send in each of n - 1 turns one chunk over every link."""
    n, left = len(ranks), dict.fromkeys({rank // worker_size for rank in ranks}, 0)
    chunks = [nbytes // n] * n
    assert sum(chunks) == nbytes
    for _ in range(passes):
        for turn in range(n - 1):
            for place, rank in enumerate(ranks):
                chunk, neighbour = chunks[(place - turn) % n], ranks[(place + 1) % n]
                if rank // worker_size != neighbour // worker_size:
                    left[rank // worker_size] += chunk
    return left


def simulated(groups: list[list[int]], nbytes: int, passes: int, worker_size: int) -> int:
    """The same over several rings at once, each of `nbytes`; every worker must send as much."""
    total: dict[int, int] = {}
    for ranks in groups:
        for worker, sent in ring(ranks, nbytes, passes, worker_size).items():
            total[worker] = total.get(worker, 0) + sent
    (same,) = set(total.values())
    return same


def places(workers: int, worker_size: int) -> list[list[int]]:
    """The ranks that average with one another."""
    return [list(range(place, workers * worker_size, worker_size)) for place in range(worker_size)]


@pytest.mark.parametrize(("workers", "size"), SIZES)
@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2), ("fp64", 8)])
def test_an_averaging(workers: int, size: int, dtype: str, width: int) -> None:
    count = 96 * workers * size
    whole, part = count * width, count * width // size
    shares = simulated(places(workers, size), part, 2, size)
    copies = simulated(places(workers, size), whole, 2, size)
    assert averaging_bytes({dtype: count}, workers, size) == shares
    assert averaging_bytes({dtype: count}, workers, size, sharded=False) == copies == size * shares
    buffers = simulated([list(range(workers * size))], 8 * count, 2, size)
    more = averaging_bytes({dtype: count}, workers, size, states=2, buffers=count)
    assert more == 3 * shares + buffers


@pytest.mark.parametrize(("workers", "size"), SIZES)
@pytest.mark.parametrize(("wire", "block"), [("int8", 512 + 4), ("fp16", 1024 + 4), ("bf16", 1024)])
@pytest.mark.parametrize("sharded", [True, False])
def test_an_averaging_in_fewer_bits(workers: int, size: int, wire: traffic.Wire, block: int, sharded: bool) -> None:
    """Rank by rank: each sends its difference's parts to those that own them, and then its part of the mean to all."""
    blocks = 3  # of each part
    count = blocks * 512 * workers * (size if sharded else 1)
    sent = 0
    for _ in range(size):  # ranks of a worker
        sent += sum(blocks * block for owner in range(workers) if owner != 0)
        sent += sum(blocks * block for receiver in range(workers) if receiver != 0)
    assert averaging_bytes({"fp32": count}, workers, size, sharded=sharded, wire=wire) == sent
    assert averaging_bytes({"fp32": count - 511 * workers}, workers, size, sharded=sharded, wire=wire) <= sent
    assert traffic.BLOCK == compressed.BLOCK


@pytest.mark.parametrize("wire", ["bf16", "fp16", "int8"])
def test_parts_are_equal_blocks_as_they_travel(wire: compressed.WireType) -> None:
    for elements in (1, 768, 3 * 2 * 512 - 7, 3 * 2 * 512 + 1, 4_000_000):
        for workers in (2, 3, 1000):
            shape = compressed.Format(wire, workers, elements)
            assert exchange_bytes(elements, workers, wire) == shape.sent
            most = max(compressed.PADDING, workers * 4 * shape.blocks)
            assert 0 <= workers * shape.part - elements < most, "little is padding"
    assert exchange_bytes(0, 3, wire) == 0


@pytest.mark.parametrize(("workers", "size"), SIZES)
def test_a_step_of_parallel(workers: int, size: int) -> None:
    """DeepSpeed goes round all ranks; of FSDP's gradients each place has a part, which goes round the workers."""
    n = workers * size
    count, everybody = 64 * n, [list(range(n))]
    gradients, copies = {"bf16": count}, {"bf16": count}
    one, two = (simulated(everybody, 2 * count, passes, size) for passes in (1, 2))
    found = [
        deepspeed_parallel_bytes(gradients, workers, size, zero_stage=stage, gathered=copies, accumulation=3)
        for stage in (0, 1, 2, 3)
    ]
    assert found == [two, two + one, 3 * two + one, 3 * one + 3 * one]
    again = deepspeed_parallel_bytes(
        gradients, workers, size, zero_stage=3, gathered=copies, kept={"bf16": n}, accumulation=3, reuse_distance=count
    )
    kept = simulated(everybody, 2 * n, 1, size)
    assert again == 3 * one + 3 * (one + one // 2) + kept, "the last half is still there when backward comes"
    assert deepspeed_parallel_bytes({"fp32": count}, workers, size, gradient_passes=1) == 2 * one
    assert fsdp_parallel_bytes({"fp32": count}, workers) == simulated(places(workers, size), 4 * count // size, 2, size)
    with pytest.raises(ValueError, match="gathered is missing, and stage 1 gathers"):
        deepspeed_parallel_bytes(gradients, workers, size, zero_stage=1)


def test_two_levels_send_as_much() -> None:
    """Between N hosts of L workers: reduce-scatter inside, all-reduce between, all-gather inside."""
    for hosts, here in ((2, 2), (2, 4), (3, 2)):
        workers = hosts * here
        nbytes = 4 * workers * here
        inside = simulated([list(range(here))], nbytes, 2, 1)  # a reduce-scatter and an all-gather
        between = simulated([list(range(hosts))], nbytes // here, 2, 1)
        assert inside + between == averaging_bytes({"fp32": nbytes // 4}, workers)


def test_the_same_schedule_with_both_engines() -> None:
    """Two workers of 8 ranks, H = 4, ZeRO-1 or FSDP in fp32. An averaging leaves a worker once, as does FSDP's
    all-reduce; DeepSpeed's gradients and parameters go round all 16 ranks, 3 passes of 15/16."""
    masters = {"fp32": 1_600_000}
    averaging = averaging_bytes(masters, 2, 8)
    fsdp = fsdp_parallel_bytes(masters, 2)
    deepspeed = deepspeed_parallel_bytes(masters, 2, 8, zero_stage=1, gathered=masters)
    assert bytes_percent(averaging, 4 * fsdp) == 25
    assert bytes_percent(averaging, 4 * deepspeed) == pytest.approx(25 / (3 * 15 / 16))
    assert bytes_percent(0, fsdp_parallel_bytes(masters, 1)) == 0
