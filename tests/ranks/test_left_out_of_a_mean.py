"""The mean of the others, where a rank is left out, by every way of averaging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import Averager, LeftOut, average_tensors, flat_buckets
from qsr_engine.averaging.cuda_graph import Captured
from qsr_engine.config.averaging import AveragingConfig, OuterConfig
from qsr_engine.local_steps.header import Header, exchange_headers, not_finite
from tests.support import training
from tests.support.pool import Processes
from tests.support.pretended_hosts import TWO_OF_TWO, on_hosts

SIZES = (70_001, 3, 501, 301, 64)  # of tensors in buckets of 3 kB: alone in many pieces, and packed together


BUCKET = 3000  # bytes


WAYS: dict[str, dict[str, Any]] = {
    "AllReduce": {"shared_memory": False},
    "SharedMemory": {},
    "TwoLevelSharedMemory": {},  # on pretended hosts
    "TwoLevelCollectives": {"two_level": True, "shared_memory": False},
}


def values(rank: int, round_: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + round_)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES]


def header_of(squares: float | Tensor) -> Header:
    return Header(1, 1, 0.1, 1, squares)


def way_job(way: str, bad: int) -> float:
    """Two averagings, one without the bad rank and one of all. Returns the largest error, in units of rounding."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensors = [*values(rank, 0), *values(rank, 0, torch.float32)]
    averager = Averager(flat_buckets(tensors, BUCKET), None, AveragingConfig(bucket_mb=BUCKET / 1e6, **WAYS[way]))
    assert averager.way == way
    assert len({piece.in_place for piece in averager.pieces}) == (2 if way == "AllReduce" else 1)
    worst = 0.0
    for round_, left_out in ((1, [bad]), (2, [])):
        for tensor, value in zip(tensors, [*values(rank, round_), *values(rank, round_, torch.float32)], strict=True):
            tensor.copy_(value)
        if rank in left_out:
            tensors[0][17], tensors[-2][5] = math.nan, -math.inf
        met = exchange_headers(header_of(averager.sum_of_squares()), torch.device("cpu"), leave_out=True)
        assert met.left_out == left_out
        averager.average(averager.left_out(left_out))
        good = [other for other in range(ranks) if other not in left_out]
        for dtype, part in ((torch.float64, tensors[: len(SIZES)]), (torch.float32, tensors[len(SIZES) :])):
            workers = [training.flat(values(other, round_, dtype)) for other in good]
            mean = torch.stack(workers).sum(0) / len(workers)
            size = torch.stack([worker.abs() for worker in workers]).mean(0)
            error = (training.flat(part) - mean).abs() / (torch.finfo(dtype).eps * size)
            worst = max(worst, error.max().item())
        everybody = torch.stack([training.flat([*values(w, round_), *values(w, round_, torch.float32)]) for w in good])
        mean = everybody.mean(0)
        expected = ((everybody - mean).square().sum(1).mean().sqrt() / mean.norm()).item()
        distance = averager.relative_distance(met.squares, met.ranks, averager.left_out(left_out))
        assert distance is not None
        assert distance.item() == pytest.approx(expected, rel=1e-6)  # of fp32 values, a part of it
        alike = torch.cat([tensor.double() for tensor in tensors])
        others = [torch.empty_like(alike) for _ in range(ranks)]
        dist.all_gather(others, alike)
        assert all(torch.equal(other, alike) for other in others)
    return worst


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize(("way", "bad"), [("AllReduce", 0), ("SharedMemory", 0), ("SharedMemory", 2)])
def test_the_mean_is_that_of_the_others(processes: Processes, way: str, bad: int) -> None:
    """Two good workers add up to the same bits in any order. Three, in the second averaging, round once more."""
    assert max(processes.run(way_job, ranks=3, way=way, bad=bad)) <= 2


def shards_job() -> tuple[float, float]:
    """Workers whose three ranks hold equal shards, pretended: every rank stands for one of each. The distance of the
    workers that are not left out from their mean, as found and by its definition."""
    dist.init_process_group("gloo")
    rank, everybody = dist.get_rank(), [values(worker, 1)[0] for worker in range(3)]
    bucket = everybody[rank].clone()
    averager = Averager([bucket], None, AveragingConfig(shared_memory=False), shard_group=dist.group.WORLD)
    of_workers = [worker.square().sum().item() for worker in everybody[1:]]
    left_out = averager.left_out([0])
    averager.average(left_out)
    distance = averager.relative_distance(sum(squares for squares in of_workers for _ in range(3)), 6, left_out)
    assert distance is not None
    mean = torch.stack(everybody[1:]).mean(0)
    spread = torch.stack([(worker - mean).square().sum() for worker in everybody[1:]]).mean().sqrt()
    return distance.item(), (spread / mean.norm()).item()


def test_the_distance_of_sharded_workers(processes: Processes) -> None:
    for found, expected in processes.run(shards_job, ranks=3):
        assert found == pytest.approx(expected, rel=1e-9)  # sums of 70,001 squares in fp64


def packed_job() -> bool:
    """Tensors that are packed and large are divided on their way back."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), 100_000
    tensors = [torch.full((size,), float(rank)), torch.full((size,), math.nan if rank == 0 else 4.0)]
    average_tensors(tensors, None, 1_000_000, LeftOut((0,), 1, rank == 0))
    return all(bool((tensor == mean).all()) for tensor, mean in zip(tensors, (1.5, 4.0), strict=True))


def test_large_tensors_that_are_packed(processes: Processes) -> None:
    assert processes.run(packed_job, ranks=3) == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("way", "bad"), [("TwoLevelSharedMemory", 0), ("TwoLevelCollectives", 3)])
def test_in_two_levels(processes: Processes, way: str, bad: int) -> None:
    """Three and four terms, in another order than the oracle's: three roundings of half an eps, on either side."""
    found = processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=way_job, way=way, bad=bad)
    assert max(found) <= 3


def like_two_job(options: dict[str, Any], outer: dict[str, Any] | None) -> None:
    """Three ranks without the first must give the bits that the other two give by themselves, from the same start."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair: Any = dist.new_group([1, 2])
    plain = AveragingConfig(bucket_mb=BUCKET / 1e6, shared_memory=False, **options)
    config = OuterConfig(**outer) if outer else None
    three, two = ([value.float() for value in values(9, 0)] for _ in range(2))
    averager = Averager(flat_buckets(three, BUCKET), None, plain, outer=config)
    for_two = Averager(flat_buckets(two, BUCKET), pair, plain, outer=config) if rank else None
    for round_ in (1, 2):
        for tensors in (three, two):
            for tensor, value in zip(tensors, values(rank, round_), strict=True):
                tensor.copy_(value)
        if rank == 0:
            three[0][17] = math.nan
        averager.average(averager.left_out([0]))
        if for_two is not None:
            for_two.average()
            assert torch.equal(training.flat(three), training.flat(two))
        _assert_alike(three)


def _assert_alike(tensors: list[Tensor]) -> None:
    mine = training.flat(tensors)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(other, mine) for other in others)


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp16", "int8"])
def test_it_is_as_if_the_others_were_alone(processes: Processes, wire: str) -> None:
    """Also what is kept from one averaging to the next: int8's roundings, an outer optimizer's momentum."""
    outer = {"lr": 0.7, "momentum": 0.9, "nesterov": True} if wire in ("fp32", "int8") else None
    processes.run(like_two_job, ranks=3, options={"wire_dtype": wire}, outer=outer)


def forgotten_job() -> list[bool]:
    """Whether int8 carries something over on this rank: after an averaging of all, and once the first is left out."""
    dist.init_process_group("gloo")
    tensors = [torch.zeros(size) for size in SIZES]
    averager = Averager(flat_buckets(tensors, BUCKET), None, AveragingConfig(wire_dtype="int8"))
    for tensor, value in zip(tensors, values(dist.get_rank(), 1), strict=True):
        tensor.copy_(value)

    def carries() -> bool:
        return any(bool(own.any()) for own, _ in averager.state_dict()["residuals"])

    averager.average()
    after_all = carries()
    averager.average(averager.left_out([0]))
    return [after_all, carries()]


def test_what_int8_carries_over_is_forgotten(processes: Processes) -> None:
    """An averaging of all leaves roundings on each rank; a rank that is left out then sends nothing of them."""
    assert processes.run(forgotten_job, ranks=3) == [[True, False], [True, True], [True, True]]


def test_a_cuda_graph_is_left_aside_where_a_rank_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock of the mean and of the graph: there is one GPU at most, and a NCCL group of two ranks needs two."""
    ran: list[Any] = []

    class Plain:
        pieces = (SimpleNamespace(device=torch.device("cuda")),)
        bytes_sent, ranks = 0, 3

        def _run(self, order: Any, divisor: int) -> Iterator[tuple[int, None]]:
            ran.append(divisor)
            yield from ((index, None) for index in order)

    graph = SimpleNamespace(replay=lambda: ran.append("replayed"), reset=lambda: None)
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(Captured, "_capture", lambda self, order: graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    mean: Any = Captured(Plain(), None)  # type: ignore[arg-type]
    for left_out in (1, 0, 1, 0):
        assert list(mean.run([0], LeftOut(ranks=left_out))) == [(0, None)]
    mean.close()
    assert ran == [2, "replayed", 2, "replayed"]


@pytest.mark.parametrize(("worker_size", "expected"), [(1, [1, 2]), (2, [0, 1]), (4, [0])])
def test_a_worker_is_bad_if_one_of_its_ranks_is(worker_size: int, expected: list[int]) -> None:
    assert not_finite([header_of(x) for x in (1.0, math.nan, math.inf, 0.0)], worker_size) == expected
