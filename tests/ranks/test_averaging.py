"""Averaging over real process groups, and what the ranks say to one another before it."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from qsr_engine.averaging import Averager, CollectiveError, allreduce, average_tensors, flat_buckets
from qsr_engine.averaging.allreduce import AllReduce
from qsr_engine.averaging.buckets import packed_pieces
from qsr_engine.config.averaging import AveragingConfig
from qsr_engine.local_steps.header import Header, Met, are_alike, exchange_headers
from qsr_engine.membership.facts import check_agreement
from tests.support import training
from tests.support.absent_ranks import give_up, soon_given_up, stay_away
from tests.support.pool import JobError, Processes

CPU = torch.device("cpu")


def tensors_of(rank: int) -> list[torch.Tensor]:
    """Odd sizes, an empty one, one larger than a bucket, mixed types, channels-last, shared, frozen."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3,), (0,), (), (701,), (5, 7), (2, 3, 4, 4)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[5] = made[5].to(memory_format=torch.channels_last)
    made += [torch.randn(9, generator=generator).float(), torch.nn.Parameter(made[0].clone(), requires_grad=False)]
    large = torch.randn(301, 300, generator=generator, dtype=torch.float64).t()  # more than a chunk, not contiguous
    return [*made, large, made[4], made[4].t()]


WAYS: dict[str, dict[str, Any]] = {
    "gloo": {"shared_memory": False},
    "shared_memory": {"shared_memory": True},
    "bf16": {"wire_dtype": "bf16"},
    "fp16": {"wire_dtype": "fp16"},
    "int8": {"wire_dtype": "int8"},
}


def average_job(way: str) -> list[torch.Tensor]:
    dist.init_process_group("gloo")
    tensors = tensors_of(dist.get_rank())
    if way == "packed":
        average_tensors(tensors[:-2], None, bucket_bytes=256)  # packing copies, so shared memory would count twice
    else:
        buckets = flat_buckets(tensors, bucket_bytes=256)
        averager = Averager(buckets, None, AveragingConfig(bucket_mb=256e-6, **WAYS[way]))
        assert averager.way == ("SharedMemory" if way == "shared_memory" and dist.get_world_size() > 1 else "AllReduce")
        averager.average()
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.fast_cells(5, of=5)
@pytest.mark.parametrize("way", ["gloo", "packed", "shared_memory"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_tensor_is_averaged_exactly_once(processes: Processes, way: str, ranks: int) -> None:
    results = processes.run(average_job, ranks=ranks, way=way)
    inputs = [tensors_of(rank) for rank in range(ranks)]
    for index in range(len(inputs[0])):
        mean = torch.stack([worker[index].detach() for worker in inputs]).sum(0) / ranks
        # With three ranks the order of the sum may differ: one rounding in fp64, or in fp32 for the one such tensor.
        # In shared memory it is the order of the ranks, as here.
        tolerance = 0 if ranks < 3 or way == "shared_memory" else 4 * torch.finfo(mean.dtype).eps
        for result in results:
            torch.testing.assert_close(result[index], mean, rtol=tolerance, atol=tolerance)
            assert torch.equal(result[index], results[0][index]), "the ranks must agree bit for bit"


def gloo_job() -> list[list[torch.Tensor]]:
    """In place, and packed, as between more ranks than exchange parts by hand."""
    with mock.patch.object(allreduce, "MOST_RANKS", 1):
        return [average_job("gloo"), average_packed()]


def average_packed() -> list[torch.Tensor]:
    tensors = tensors_of(dist.get_rank())[:-2]
    for _ in (mean := AllReduce(packed_pieces(tensors, 256), None)).run(range(len(mean.pieces))):
        pass
    return [tensor.detach().clone() for tensor in tensors]


def test_between_many_ranks_gloo_adds_up(processes: Processes) -> None:
    results = processes.run(gloo_job, ranks=3)
    inputs = [tensors_of(rank) for rank in range(3)]
    for way in (0, 1):
        for index, mean in enumerate(results[0][way]):
            exact = torch.stack([worker[index].detach() for worker in inputs]).sum(0) / 3
            tolerance = 4 * torch.finfo(mean.dtype).eps
            torch.testing.assert_close(mean.detach(), exact, rtol=tolerance, atol=tolerance)
            assert all(torch.equal(result[way][index], mean) for result in results)


# What an averaging may be off by, where fewer bits travel: of differences of up to about 5, a half step of the type.
OFF = {"gloo": 1e-6, "shared_memory": 1e-6, "bf16": 0.05, "fp16": 0.008, "int8": 0.1}


def random_job(seed: int, way: str) -> None:
    """Random lists of tensors, averaged twice with changes between; each must be the mean of the ranks' each time."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    same = random.Random(seed)  # the same on every rank
    sizes = [same.choice([1, 0, 63, 500, 4097, 300_000]) for _ in range(same.randint(1, 12))] + [5]
    types = [same.choice([torch.float32, torch.float64]) for _ in sizes]
    capacity = same.choice([700, 30_000, 1_000_000])
    if capacity == 700:
        sizes = [size % 1000 for size in sizes]

    def values(of_rank: int, round_: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + 10 * of_rank + round_)
        made = zip(sizes, types, strict=True)
        return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size, dtype in made]

    tensors = values(0, 0)  # alike at first, as differences need it
    averager = Averager(flat_buckets(tensors, capacity), None, AveragingConfig(bucket_mb=capacity / 1e6, **WAYS[way]))
    for round_ in (1, 2):
        for tensor, value in zip(tensors, values(rank, round_), strict=True):
            tensor.copy_(value)
        averager.average()
        for index, tensor in enumerate(tensors):
            mean = torch.stack([values(r, round_)[index] for r in range(ranks)]).sum(0) / ranks
            torch.testing.assert_close(tensor, mean, rtol=1e-6, atol=OFF[way])
            others = [torch.empty_like(tensor) for _ in range(ranks)]
            dist.all_gather(others, tensor)
            assert all(torch.equal(other, tensor) for other in others)


@pytest.mark.parametrize("way", WAYS)
def test_random_lists_of_tensors(processes: Processes, way: str) -> None:
    """Sizes from nothing to many buckets, types mixed, two averagings in a row."""
    for seed in range(4):
        processes.run(random_job, ranks=2 + seed % 2, seed=seed, way=way)


def wire_job(wire: str, scale: float) -> dict[str, float]:
    """Parameters of 0.05 whose differences from the last average are `scale` of them; 20 averagings in a row."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    start = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.05
    flat, exact = start.clone(), start.double()
    averager = Averager([flat], None, AveragingConfig(wire_dtype=wire))  # type: ignore[arg-type]
    errors = []
    for round_ in range(20):
        moves = [
            torch.randn(200_000, generator=torch.Generator().manual_seed(100 * round_ + r + 1)) * 0.05 * scale
            for r in range(ranks)
        ]
        flat += moves[rank]
        exact += torch.stack(moves).double().mean(0)
        averager.average()
        errors.append((flat.double() - exact).square().mean().sqrt().item())
    return {"first": errors[0], "last": errors[-1], "mb": averager.bytes_per_averaging / 1e6}


@pytest.mark.parametrize(
    ("wire", "first", "mb"),
    # Root mean square errors relative to the differences: two roundings of 2^-9 relative (bf16) and 2^-12 (fp16),
    # uniform, or a step of the largest of 512 / 127 (int8). Bytes of 200,000 values, and scales of 4 bytes each 512.
    [("bf16", 0.002, 0.4), ("fp16", 0.0003, 0.4), ("int8", 0.01, 0.2)],
)
@pytest.mark.parametrize("scale", [1e-2, 1e-5])
def test_the_error_of_the_wire_is_relative_to_the_difference(
    processes: Processes, wire: str, first: float, mb: float, scale: float
) -> None:
    for result in processes.run(wire_job, wire=wire, scale=scale):
        # An fp32 parameter of 0.05 rounds by up to 2^-25 of itself, here when it moves and when it is averaged.
        floor = 2 * 0.05 * 2**-25
        assert result["first"] < 0.05 * scale * first + floor
        # Rounding errors of 20 averagings add up like a random walk; with error feedback int8's do not add up at all.
        growth = 1.5 if wire == "int8" else 2 * math.sqrt(20)
        assert result["last"] < growth * result["first"] + math.sqrt(20) * floor
        assert result["mb"] == pytest.approx(mb, rel=0.02)


def absent_job(shared: bool) -> str:
    """Rank 1 does not come; the process group waits for two seconds."""
    dist.init_process_group("gloo")
    group = cast(dist.ProcessGroup, dist.new_group([0, 1]))
    averager = Averager([torch.ones(40)], group, AveragingConfig(shared_memory=shared))
    soon_given_up(group)
    if dist.get_rank() == 1:
        stay_away(0)
        return ""
    try:
        averager.average()
    except CollectiveError as error:
        return str(error)
    finally:
        give_up(0)
    return "nothing was raised"


@pytest.mark.parametrize("shared", [False, True])
def test_a_rank_that_does_not_come_is_an_error_that_names_the_bucket(processes: Processes, shared: bool) -> None:
    message, _ = processes.run(absent_job, seconds=60, shared=shared)
    what = "meeting before the averaging" if shared else "averaging bucket 1 of 1 (0.0 MB)"
    assert message.startswith(f"after step 0: {what} over the ranks [0, 1] failed on rank 0: ")
    assert "imed out" in message


def crowded_job() -> tuple[str, list[str]]:
    from qsr_engine.averaging import choose

    dist.init_process_group("gloo")
    free, choose._free = choose._free, lambda: 1000
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            averager = Averager([torch.ones(400)], None, AveragingConfig())
    finally:
        choose._free = free
    averager.average()
    return averager.way, [str(warning.message) for warning in caught]


def test_too_little_shared_memory_is_said_and_gloo_is_taken(processes: Processes) -> None:
    (way, said), (way_too, said_too) = processes.run(crowded_job)
    assert (way, way_too) == ("AllReduce", "AllReduce")
    assert "/dev/shm has 0 MB free and the parameters of this host's ranks need 0 MB" in said[0]
    assert "--shm-size" in said[0]
    assert said_too == []


def group_job() -> torch.Tensor:
    """Four ranks, averaged over {0, 2} and {1, 3}."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    value = torch.tensor([float(10**rank)])
    Averager([value], cast(dist.ProcessGroup, groups[rank % 2])).average()
    return value


def test_only_the_group_is_averaged(processes: Processes) -> None:
    assert [v.item() for v in processes.run(group_job, ranks=4)] == [50.5, 505.0, 50.5, 505.0]


def memory_job(way: str) -> tuple[int, int]:
    """Bytes that torch kept after an averaging of 40 MB, and the most that it had at a time."""
    dist.init_process_group("gloo")
    tensors = [torch.randn(1_000_000) for _ in range(10)]
    if way == "packed":
        mean = AllReduce(packed_pieces(tensors, 4_000_000), None)

        def average() -> None:
            for _ in mean.run(range(len(mean.pieces))):
                pass
    else:
        averager = Averager(flat_buckets(tensors, 4_000_000), None, AveragingConfig(bucket_mb=4, **WAYS[way]))

        def average() -> None:
            averager.average()
            averager.sum_of_squares()

    return training.memory_of(average)


@pytest.mark.parametrize("way", ["gloo", "shared_memory", "packed"])
def test_averaging_makes_no_copy_of_the_model(processes: Processes, way: str) -> None:
    staging = 2 * 4_000_000 if way == "packed" else 0
    received = 0 if way == "shared_memory" else 4_000_000  # of two pieces the half that this rank adds up
    allowed = staging + received
    for kept, most in processes.run(memory_job, ranks=2, way=way):
        assert kept <= staging + 10_000
        assert most > 0, "the sums of squares were meant to be seen"
        # A sum of squares converts 65,536 elements at a time to fp64: 512 kB, whatever the size of the model.
        assert most <= allowed + 2 * 65536 * 8


def header(**changes: Any) -> Header:
    return Header(**{"step": 12, "period": 4, "lr": 0.1, "digest": 2**62 + 1, "sum_of_squares": 3.5, **changes})


def header_job(per_rank: list[dict[str, Any]]) -> Met:
    dist.init_process_group("gloo")
    return exchange_headers(header(**per_rank[dist.get_rank()]), CPU)


def test_headers_that_agree(processes: Processes) -> None:
    """Also where rates differ in their last bit: rank 0's holds."""
    close = math.nextafter(0.1, 1.0)
    sent: list[dict[str, Any]] = [{"sum_of_squares": 1.0, "skipped": 3}, {"sum_of_squares": 2.0, "stop": 1}]
    met = Met(lr=0.1, squares=3.0, ranks=2, skipped=3, stop=True, left_out=[])
    assert processes.run(header_job, per_rank=sent) == [met, met]
    sent[1]["lr"] = close
    assert processes.run(header_job, per_rank=sent) == [met, met]


@pytest.mark.parametrize(
    "change",
    [
        {"step": 13},
        {"period": 5},
        {"lr": math.nextafter(0.1, 1.0)},
        {"digest": 2**62},
        {"purpose": 1},
        {"buffers": 1},
    ],
    ids=str,
)
def test_a_bit_that_differs_is_seen_in_the_sums(change: dict[str, Any]) -> None:
    one, other = header().alike(), header(**change).alike()
    for ranks in (2, 3, 10_000):
        for number in (1, ranks // 2):  # of ranks with the other
            x = one * (ranks - number) + other * number
            squares = one.square() * (ranks - number) + other.square() * number
            assert not are_alike([*x.tolist(), *squares.tolist()], ranks)
        assert are_alike([*(one * ranks).tolist(), *(one.square() * ranks).tolist()], ranks)
    assert all(0 <= number < 2**16 for number in [*one, *other])


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"step": 13}, "step: 12 on ranks 0, 2; 13 on rank 1"),
        ({"period": 5}, "period H: 4 on ranks 0, 2; 5 on rank 1"),
        ({"lr": 0.1000000001}, "learning rate: 0.1 on ranks 0, 2; 0.1000000001 on rank 1"),
        ({"lr": math.nan}, "learning rate: 0.1 on ranks 0, 2; nan on rank 1"),
        ({"digest": 5}, "digest of the configuration: 4611686018427387905 on ranks 0, 2; 5 on rank 1"),
        ({"sum_of_squares": math.nan}, "after step 12 the parameters are not finite (NaN or infinity) on rank 1"),
        ({"sum_of_squares": math.inf}, "not finite (NaN or infinity) on rank 1"),
    ],
)
def test_headers_that_disagree_are_an_error_on_every_rank(
    processes: Processes, odd: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError) as caught:
        processes.run(header_job, ranks=3, seconds=30, per_rank=[{}, odd, {}])
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "BoundaryError"
        assert words in error[1]


def agreement_job(per_rank: list[dict[str, Any]]) -> None:
    dist.init_process_group("gloo")
    check_agreement(per_rank[dist.get_rank()], CPU)


def test_facts_that_differ_are_named_on_every_rank(processes: Processes) -> None:
    facts = {"config": {"lr": 0.1, "batch": 8}, "model": {"weight": "float32 [3]"}}
    processes.run(agreement_job, per_rank=[facts, facts])
    other = {"config": {"lr": 0.2, "batch": 8}, "model": {"weight": "float32 [3]", "bias": "float32 [1]"}}
    with pytest.raises(JobError) as caught:
        processes.run(agreement_job, ranks=3, per_rank=[facts, other, facts])
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "AgreementError"
        assert "config.lr: 0.1 on ranks 0, 2; 0.2 on rank 1" in error[1]
        assert "model.bias: 'nothing' on ranks 0, 2; 'float32 [1]' on rank 1" in error[1]
        assert "batch" not in error[1]
