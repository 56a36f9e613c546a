"""The way of averaging follows the hosts that the ranks are on."""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from qsr_engine.averaging import Averager
from qsr_engine.config.averaging import AveragingConfig
from tests.support.deepspeed_engine import start
from tests.support.pool import JobError, Processes
from tests.support.pretended_hosts import APART, TWO_OF_TWO, on_hosts, pretended
from tests.support.training import QSR


def hosts_job() -> tuple[list[list[int]], list[list[int]]]:
    from qsr_engine.averaging.choose import hosts_of, tell

    dist.init_process_group("gloo")
    device = torch.device("cpu")
    true = hosts_of(None, tell(device, 0))
    with pretended(TWO_OF_TWO):
        return true, hosts_of(None, tell(device, 0))


def test_the_hosts_are_pretended(processes: Processes) -> None:
    assert processes.run(hosts_job, ranks=4) == [([[0, 1, 2, 3]], [[0, 1], [2, 3]])] * 4


def way_job(**options: Any) -> str:
    dist.init_process_group("gloo")
    averager = Averager([torch.ones(400)], None, AveragingConfig(**options))
    averager.average()
    return averager.way


@pytest.mark.fast_cells(3)
@pytest.mark.parametrize(
    ("hosts", "options", "way"),
    [
        (TWO_OF_TWO, {}, "TwoLevelSharedMemory"),
        (APART, {}, "TwoLevelSharedMemory"),
        (TWO_OF_TWO, {"two_level": True}, "TwoLevelSharedMemory"),
        (TWO_OF_TWO, {"two_level": True, "shared_memory": False}, "TwoLevelCollectives"),
        (TWO_OF_TWO, {"shared_memory": False}, "AllReduce"),
        (TWO_OF_TWO, {"two_level": False}, "AllReduce"),
        (TWO_OF_TWO, {"wire_dtype": "bf16"}, "Compressed"),
        ([0, 0, 0, 1], {}, "AllReduce"),
        ([0, 1, 2, 3], {}, "AllReduce"),
        ([0, 0, 0, 0], {}, "SharedMemory"),
    ],
)
def test_the_way_follows_the_topology(
    processes: Processes, hosts: list[int], options: dict[str, Any], way: str
) -> None:
    assert processes.run(on_hosts, ranks=4, hosts=hosts, what=way_job, **options) == [way] * 4


@pytest.mark.parametrize(
    ("hosts", "places"),
    [
        ([0, 0, 0, 1], "3 on one host (ranks 0, 1, 2); 1 on one host (ranks 3)"),
        ([0, 1], "1 on one host (ranks 0); 1 on one host (ranks 1)"),
        ([0, 0], "2 on one host (ranks 0, 1)"),
    ],
)
def test_where_it_cannot_be_done_true_names_the_topology(processes: Processes, hosts: list[int], places: str) -> None:
    with pytest.raises(JobError) as caught:
        processes.run(on_hosts, ranks=len(hosts), seconds=30, hosts=hosts, what=way_job, two_level=True)
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "ConfigError"
        assert f"and they are placed so: {places}; start as many workers on every host" in error[1]


def crowded_job(**options: Any) -> tuple[str, list[str]]:
    from qsr_engine.averaging import choose

    free, choose._free = choose._free, lambda: 1000
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return way_job(**options), [str(w.message) for w in caught if "/dev/shm" in str(w.message)]
    finally:
        choose._free = free


@pytest.mark.parametrize(("two_level", "way"), [("auto", "AllReduce"), (True, "TwoLevelCollectives")])
def test_too_little_shared_memory_is_said_once_a_host(processes: Processes, two_level: Any, way: str) -> None:
    results = processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=crowded_job, two_level=two_level)
    assert [found for found, _ in results] == [way] * 4
    assert [len(said) for _, said in results] == [1, 0, 1, 0]


def groups_job(members: list[list[int]], empty: int | None) -> tuple[str, list[float]]:
    """Ranks that average in groups, one of which may have nothing; then two ranks make a group by themselves."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in members]
    mine = next(number for number, ranks in enumerate(members) if rank in ranks)
    value = torch.full((1000,), float(10**rank), dtype=torch.float64)
    averager = Averager([] if mine == empty else [value], cast(dist.ProcessGroup, groups[mine]), AveragingConfig())
    averager.average()
    pair = [2, dist.get_world_size() - 1]
    if rank in pair:
        dist.barrier(group=cast(dist.ProcessGroup, dist.new_group(pair, use_local_synchronization=True)))
    return averager.way, sorted(set(value.tolist()))


@pytest.mark.parametrize(
    ("hosts", "members", "empty", "expected"),
    [
        # Groups of different shapes: the two levels are for all or for nobody.
        (
            [0, 0, 1, 1, 2, 2],
            [[0, 1, 2, 3], [4, 5]],
            None,
            [("AllReduce", [277.75])] * 4 + [("SharedMemory", [55000.0])] * 2,
        ),
        (TWO_OF_TWO, [[0, 1, 2, 3]], 0, [("TwoLevelSharedMemory", [10.0**rank]) for rank in range(4)]),
    ],
    ids=["of different shapes", "with nothing"],
)
def test_groups_of_the_run(
    processes: Processes, hosts: list[int], members: list[list[int]], empty: int | None, expected: list[Any]
) -> None:
    job: dict[str, Any] = {"what": groups_job, "members": members, "empty": empty}
    assert processes.run(on_hosts, ranks=len(hosts), seconds=60, hosts=hosts, **job) == expected


def workers_of_two_job() -> str:
    engine = start({**QSR, "worker_size": 2})
    return str(engine.local_steps.averager.way)


def test_workers_that_fill_a_host_stay_flat(processes: Processes) -> None:
    """Each rank averages with one rank of the other host."""
    assert processes.run(on_hosts, ranks=4, hosts=TWO_OF_TWO, what=workers_of_two_job) == ["AllReduce"] * 4
