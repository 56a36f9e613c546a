"""The mean in two levels, on hosts that are pretended: the processes of a job believe to be on the hosts it names.

Nothing here crosses a network; what the port of a host carries is counted by benchmarks/two_level.py.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import Averager, CollectiveError, flat_buckets, ring_bytes
from qsr_engine.config.averaging import AveragingConfig
from qsr_engine.local_steps.header import Header, exchange_headers
from tests.support import reference, training
from tests.support.deepspeed_engine import STAGE_1, start, step
from tests.support.odd_model import make
from tests.support.pool import Processes
from tests.support.pretended_hosts import APART, TWO_OF_TWO, WAYS, on_hosts
from tests.support.training import QSR


@contextlib.contextmanager
def slow(seconds: float) -> Iterator[None]:
    """Every piece takes so much longer, so that a read that does not wait reads the wrong value."""
    from qsr_engine.averaging.two_level import TwoLevelCollectives, TwoLevelSharedMemory

    kept: list[tuple[Any, str, Any]] = [
        (TwoLevelSharedMemory, "_finish", TwoLevelSharedMemory._finish),
        (TwoLevelCollectives, "_gather_inside", TwoLevelCollectives._gather_inside),
    ]

    def delayed(fast: Any) -> Any:
        def method(*args: Any) -> Any:
            time.sleep(seconds)
            return fast(*args)

        return method

    for way, name, fast in kept:
        setattr(way, name, delayed(fast))
    try:
        yield
    finally:
        for way, name, fast in kept:
            setattr(way, name, fast)


# ---------------------------------------------------------------------------------------------- the mean itself


def in_two_levels(values: list[Tensor], hosts: list[int]) -> Tensor:
    """What two levels give for two hosts of two ranks, bit for bit: each sum has two terms, whose order is alike."""
    sums = [sum(v for v, host in zip(values, hosts, strict=True) if host == number) for number in (0, 1)]
    total: Tensor = cast(Tensor, sums[0]) + cast(Tensor, sums[1])
    return total / 4


def assert_close_to_the_reference(found: Tensor, values: list[Tensor]) -> None:
    """Both add up and round 3 times, each by at most half an eps of the sum of magnitudes."""
    of_workers = [[value.clone().double() if value.dtype == torch.bfloat16 else value.clone()] for value in values]
    reference._average(of_workers)
    magnitude = torch.stack([value.double().abs() for value in values]).sum(0) / len(values)
    error = (found.double() - of_workers[0][0].double()).abs()
    assert (error <= 3 * torch.finfo(found.dtype).eps * magnitude).all()


def random_job(seed: int, layout: list[int], options: dict[str, Any]) -> str:
    """Random lists of tensors, averaged twice with changes between."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    same = random.Random(seed)  # the same on every rank
    sizes = [same.choice([1, 0, 2, 3, 63, 500, 4097, 300_001]) for _ in range(same.randint(1, 12))] + [5]
    types = [same.choice([torch.float32, torch.float64, torch.bfloat16]) for _ in sizes]
    capacity = same.choice([700, 30_000, 1_000_000])
    if capacity == 700:
        sizes = [size % 1000 for size in sizes]

    def values(of_rank: int, round_: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + 10 * of_rank + round_)
        made = zip(sizes, types, strict=True)
        return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size, dtype in made]

    tensors = values(0, 0)
    averager = Averager(flat_buckets(tensors, capacity), None, AveragingConfig(bucket_mb=capacity / 1e6, **options))
    assert averager.bytes_per_averaging == ring_bytes(sum(piece.nbytes for piece in averager.pieces), ranks)
    for round_ in (1, 2):
        for tensor, value in zip(tensors, values(rank, round_), strict=True):
            tensor.copy_(value)
        met = exchange_headers(Header(1, 1, 0.1, 1, averager.sum_of_squares()), torch.device("cpu"))
        averager.average()
        distance = averager.relative_distance(met.squares, met.ranks)
        everybody = [values(r, round_) for r in range(ranks)]
        for index, tensor in enumerate(tensors):
            of_workers = [worker[index] for worker in everybody]
            assert_close_to_the_reference(tensor, of_workers)
            # What is left over where a piece is cut into equal parts is added up over all ranks at once.
            if averager.way == "TwoLevelSharedMemory":
                assert torch.equal(tensor, in_two_levels(of_workers, layout))
            others = [torch.empty_like(tensor) for _ in range(ranks)]
            dist.all_gather(others, tensor)
            assert all(torch.equal(other, tensor) for other in others)
        mean = training.flat(tensors).double()
        apart = [(training.flat(mine).double() - mean).square().sum() for mine in everybody]
        # bf16 means are rounded by up to 2^-8 of themselves, which the formula takes for exact.
        assert distance is not None
        assert distance.item() == pytest.approx((torch.stack(apart).mean().sqrt() / mean.norm()).item(), rel=2**-8)
    return averager.way


@pytest.mark.fast_cells(1, of=3)
@pytest.mark.parametrize(
    "hosts",
    [pytest.param(TWO_OF_TWO, marks=pytest.mark.slow, id="host by host"), pytest.param(APART, id="by turns")],
)
@pytest.mark.parametrize("way", WAYS)
def test_random_lists_of_tensors(processes: Processes, way: str, hosts: list[int]) -> None:
    """Sizes from nothing to many buckets, types mixed, two averagings in a row: the mean, and alike on all ranks."""
    for seed in range(4):
        job: dict[str, Any] = {"what": random_job, "hosts": hosts, "layout": hosts}
        assert processes.run(on_hosts, ranks=4, **job, seed=seed, options=WAYS[way]) == [way] * 4


def three_hosts_job(way: str) -> Tensor:
    dist.init_process_group("gloo")
    tensor = torch.randn(100_003, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
    averager = Averager([tensor], None, AveragingConfig(bucket_mb=0.1, **WAYS[way]))
    assert averager.way == way
    averager.average()
    return tensor


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 1, 0]], ids=["3 of 2", "2 of 3"])
@pytest.mark.parametrize("way", WAYS)
def test_other_numbers_of_hosts_and_ranks(processes: Processes, way: str, hosts: list[int]) -> None:
    results = processes.run(on_hosts, ranks=6, hosts=hosts, what=three_hosts_job, way=way)
    inputs = [
        torch.randn(100_003, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) for rank in range(6)
    ]
    for result in results:
        # Six values of up to 5, added up in another order: 5 roundings of at most half an eps of their sum each, twice.
        torch.testing.assert_close(result, torch.stack(inputs).sum(0) / 6, rtol=0, atol=5 * 5 * 2.3e-16)
        assert torch.equal(result, results[0])


def crossing_job(way: str) -> tuple[int, int]:
    """Bytes that this rank gives to all-reduces over several hosts, and to other collectives over several hosts."""
    dist.init_process_group("gloo")
    averager = Averager([torch.ones(400_000)], None, AveragingConfig(bucket_mb=0.4, **WAYS[way]))
    plain: Callable[..., Any] = dist.all_reduce
    world: Any = dist.group.WORLD
    crossing, before = 0, world._get_sequence_number_for_group()

    def counted(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        nonlocal crossing
        if len({TWO_OF_TWO[rank] for rank in dist.get_process_group_ranks(group)}) > 1:
            crossing += tensor.nbytes
        return plain(tensor, *args, group=group, **kwargs)

    dist.all_reduce = counted
    try:
        averager.average()
    finally:
        dist.all_reduce = plain
    return crossing, world._get_sequence_number_for_group() - before


@pytest.mark.parametrize("way", WAYS)
def test_half_of_the_payload_crosses_hosts_from_each_of_two_ranks(processes: Processes, way: str) -> None:
    """And an all-reduce of n bytes over two ranks sends n bytes."""
    assert processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=crossing_job, way=way) == [(800_000, 0)] * 4


def late_job(way: str) -> Tensor:
    """Rank 1 has its values a little later than the others begin, and is slow with its parts of the mean."""
    dist.init_process_group("gloo")
    rank, tensor = dist.get_rank(), torch.zeros(1000)
    averager = Averager([tensor], None, AveragingConfig(**WAYS[way]))
    dist.barrier()
    if rank == 1:
        time.sleep(0.3)  # nobody can tell whether the others have begun to wait
    tensor.fill_(rank)
    with slow(0.3) if rank == 1 else contextlib.nullcontext():
        averager.average()
    return tensor.clone()


@pytest.mark.parametrize("way", WAYS)
def test_ranks_of_a_host_wait_for_one_another(processes: Processes, way: str) -> None:
    for result in processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=late_job, way=way):
        assert (result == 1.5).all()


def memory_job(way: str) -> tuple[int, int]:
    """Bytes that torch kept after an averaging of 40 MB, and the most that it had at a time."""
    dist.init_process_group("gloo")
    tensors = [torch.randn(1_000_000) for _ in range(10)]
    averager = Averager(flat_buckets(tensors, 4_000_000), None, AveragingConfig(bucket_mb=4, **WAYS[way]))

    def average() -> None:
        averager.average()
        averager.sum_of_squares()

    return training.memory_of(average)


@pytest.mark.parametrize("way", WAYS)
def test_no_copy_of_the_model_is_made(processes: Processes, way: str) -> None:
    # Gloo copies what it scatters and gathers, of at most two pieces each. The thread of its that has carried one out
    # frees the copy a moment after those who waited have gone on, when that of the next may be there: one more each.
    allowed = 0 if way == "TwoLevelSharedMemory" else 6 * 4_000_000
    for kept, most in processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=memory_job, way=way):
        assert kept <= allowed + 10_000, "gloo's threads may free the last copies a little later"
        assert most > 0, "the sums of squares were meant to be seen"
        # A sum of squares converts 65,536 elements at a time to fp64: 512 kB, whatever the size of the model.
        assert most <= allowed + 2 * 65536 * 8


def absent_job(way: str) -> str:
    """Rank 3 does not come; the process group waits for five seconds, and so must the groups made of it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    averager = Averager([torch.ones(40)], None, AveragingConfig(**WAYS[way]))
    store = dist.distributed_c10d._get_default_store()
    message = ""
    try:
        if dist.get_rank() != 3:
            averager.average()
            message = "nothing was raised"
    except CollectiveError as error:
        message = str(error)
    store.set(f"given up by {dist.get_rank()}", "")
    with contextlib.suppress(RuntimeError):  # the store ends with rank 0; a rank that leaves closes its connections
        store.wait([f"given up by {rank}" for rank in range(3)], timedelta(seconds=20))
    return message


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_does_not_come_is_an_error_on_every_other(processes: Processes, way: str) -> None:
    messages = processes.run(on_hosts, ranks=4, seconds=60, hosts=TWO_OF_TWO, what=absent_job, way=way)
    assert all("imed out" in message for message in messages[:3])
    bucket = "after step 0: averaging bucket 1 of 1 (0.0 MB) over the ranks"
    if way == "TwoLevelCollectives":
        assert all(message.startswith(f"{bucket} [") for message in messages[:3])
        return
    assert messages[0].startswith(f"{bucket} [0, 2] failed on rank 0: ")
    assert messages[1].startswith(f"{bucket} [1, 3] failed on rank 1: ")
    assert messages[2].startswith(
        "after step 0: meeting on this host before the averaging over the ranks [2, 3] failed on rank 2: "
    )


# ------------------------------------------------------------------------------------------------ in the engine


def trained_job(averaging: dict[str, Any]) -> dict[str, Any]:
    """12 steps in fp64 with the real DeepSpeed engine."""
    engine = start({**QSR, "averaging": {"bucket_mb": 0.0003, **averaging}}, training.make_model(torch.float64))
    while not engine.local_steps.finished:
        step(engine)
    return {
        "way": engine.local_steps.averager.way,
        "parameters": training.flat(engine.module.parameters()),
        "bytes": engine.local_steps.bytes_sent,
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_with_the_same_bits_on_all_workers_and_close_to_the_flat_one(processes: Processes, way: str) -> None:
    two = processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=trained_job, averaging=WAYS[way])
    flat = processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=trained_job, averaging={"two_level": False})
    assert two[0]["way"] == way
    assert flat[0]["way"] == "AllReduce"
    for result in two:
        assert torch.equal(result["parameters"], two[0]["parameters"])
        # Each of 5 averagings adds in another order, some eps (2e-16) apart; 11 steps enlarge that, but not 1000 times.
        torch.testing.assert_close(result["parameters"], flat[0]["parameters"], rtol=1e-12, atol=1e-12)
        assert result["bytes"] == flat[0]["bytes"], "other workers are sent as much in two levels as in one"


def masters_job(averaging: dict[str, Any]) -> tuple[str, Tensor, Tensor]:
    """fp32 masters under ZeRO-1, bf16 copies, and an outer step after each averaging."""
    outer = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
    engine = start({**QSR, "averaging": {"bucket_mb": 0.0003, **averaging}, "outer": outer}, **STAGE_1)
    while not engine.local_steps.finished:
        step(engine)
    averager = engine.local_steps.averager
    return averager.way, training.flat(averager.buckets), training.flat(engine.module.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_masters_and_outer_steps_are_alike_on_all_workers(processes: Processes, way: str) -> None:
    two = processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=masters_job, averaging=WAYS[way])
    flat = processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=masters_job, averaging={"two_level": False})
    for found, masters, copies in two:
        assert found == way
        assert torch.equal(masters, two[0][1])
        assert torch.equal(copies, two[0][2])
        # A last bit of a master can flip the rounding of its copy in bf16 (2^-8), and with it what the step adds.
        torch.testing.assert_close(masters, flat[0][1], rtol=2**-8, atol=2**-8)


def overlapped_job(averaging: dict[str, Any]) -> tuple[str, int, Tensor]:
    """A model that reads its parameters in every way there is, in many pieces."""
    with slow(0.01):
        engine = make(averaging)
        assert len(engine.local_steps.averager.pieces) > 5
        overlapped = 0
        while not engine.local_steps.finished:
            if step(engine):
                overlapped += engine.local_steps.averager.in_background
        return engine.local_steps.averager.way, overlapped, training.flat(engine.module.parameters())


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("way", WAYS)
def test_behind_the_next_forward_every_bit_is_the_same(processes: Processes, way: str) -> None:
    job: dict[str, Any] = {"hosts": TWO_OF_TWO, "what": overlapped_job}
    before = processes.run(on_hosts, ranks=4, **job, averaging=WAYS[way])
    behind = processes.run(on_hosts, ranks=4, **job, averaging={**WAYS[way], "overlap": "next_forward"})
    for one, other in zip(before, behind, strict=True):
        assert one[:2] == (way, 0)
        assert other[:2] == (way, 4), "every averaging but the last is still under way when step() returns"
        assert torch.equal(one[2], other[2])
        assert torch.equal(other[2], behind[0][2])


@pytest.mark.parametrize(
    "other", [{"wire_dtype": "bf16"}, {"cuda_graph": True}, {"overlap": "delayed", "delay_steps": 1}]
)
def test_what_two_levels_cannot_do_is_refused_by_name(other: dict[str, Any]) -> None:
    AveragingConfig(**other)  # auto is flat then
    with pytest.raises(ValueError, match=r"two_level is true, wire_dtype is '.*or two_level 'auto'"):
        AveragingConfig(two_level=True, **other)
