"""Averaging over real process groups, and what the ranks say to one another before it."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from qsr_engine.averaging import (
    Averager,
    Header,
    average_packed,
    check_agreement,
    exchange_headers,
    flat_buckets,
)
from tests.distributed.processes import JobError, Processes

CPU = torch.device("cpu")


def tensors_of(rank: int) -> list[torch.Tensor]:
    """Odd sizes, an empty one, one larger than a bucket, mixed types, channels-last, shared, frozen."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3,), (0,), (), (701,), (5, 7), (2, 3, 4, 4)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[5] = made[5].to(memory_format=torch.channels_last)
    made += [torch.randn(9, generator=generator).float(), torch.nn.Parameter(made[0].clone(), requires_grad=False)]
    return [*made, made[4], made[4].t()]


def average_job(way: str) -> list[torch.Tensor]:
    dist.init_process_group("gloo")
    tensors = tensors_of(dist.get_rank())
    if way == "buckets":
        averager = Averager(flat_buckets(tensors, bucket_bytes=256), None)
        averager.average()
    else:
        distinct = tensors[:-2]  # packing copies, so that shared memory would count twice
        average_packed(distinct, None, bucket_bytes=256)
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("way", ["buckets", "packed"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_tensor_is_averaged_exactly_once(processes: Processes, way: str, ranks: int) -> None:
    results = processes.run(average_job, ranks=ranks, way=way)
    inputs = [tensors_of(rank) for rank in range(ranks)]
    for index in range(len(inputs[0])):
        mean = torch.stack([worker[index].detach() for worker in inputs]).sum(0) / ranks
        # With three ranks the order of the sum may differ: one rounding in fp64, or in fp32 for the one such tensor.
        tolerance = 0 if ranks < 3 else 4 * torch.finfo(mean.dtype).eps
        for result in results:
            torch.testing.assert_close(result[index], mean, rtol=tolerance, atol=tolerance)
            assert torch.equal(result[index], results[0][index]), "the ranks must agree bit for bit"


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


def memory_job() -> tuple[int, int]:
    """Bytes that torch allocated during an averaging of 8 MB in place, and in the largest single piece."""
    dist.init_process_group("gloo")
    averager = Averager(flat_buckets([torch.randn(1_000_000), torch.randn(1_000_000)], 4_000_000), None)
    averager.average()
    with torch.profiler.profile(profile_memory=True) as profiler:
        averager.average()
        averager.sum_of_squares()
    sizes = [event.self_cpu_memory_usage for event in profiler.events() if event.self_cpu_memory_usage > 0]
    return sum(sizes), max(sizes, default=0)


def test_averaging_makes_no_copy_of_the_model(processes: Processes) -> None:
    for _, largest in processes.run(memory_job, ranks=2):
        # The sum of squares converts 65,536 elements at a time to fp64: 512 kB, whatever the size of the model.
        assert largest <= 65536 * 8


def header(**changes: Any) -> Header:
    return Header(**{"step": 12, "period": 4, "lr": 0.1, "digest": 2**62 + 1, "sum_of_squares": 3.5, **changes})


def header_job(per_rank: list[dict[str, Any]]) -> list[Header]:
    dist.init_process_group("gloo")
    return exchange_headers(header(**per_rank[dist.get_rank()]), CPU)


def test_headers_that_agree(processes: Processes) -> None:
    sent: list[dict[str, Any]] = [{"sum_of_squares": 1.0}, {"sum_of_squares": 2.0}]
    assert processes.run(header_job, per_rank=sent) == [[header(**one) for one in sent]] * 2


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"step": 13}, "step: 12 on ranks 0, 2; 13 on rank 1"),
        ({"period": 5}, "period H: 4 on ranks 0, 2; 5 on rank 1"),
        ({"lr": math.nextafter(0.1, 1)}, "learning rate: 0.1 on ranks 0, 2; 0.10000000000000002 on rank 1"),
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
