"""The averaging's process groups are its own: collectives of a user's loop cannot meet it out of order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support import training
from tests.support.fsdp_engine import fingerprint, start, start_deepspeed
from tests.support.pool import Processes
from tests.support.training import QSR


def model() -> nn.Module:
    """With buffers, which are averaged too."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(training.FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, training.OUTPUTS))


def reachable(engine: Any) -> set[dist.ProcessGroup]:
    """Groups that a loop around the engine can get hold of."""
    mesh = getattr(engine, "mesh", None)
    found = [dist.group.WORLD, getattr(engine, "data_parallel_group", None)]
    found += [mesh.get_group(name) for name in mesh.mesh_dim_names] if mesh is not None else []
    return {group for group in found if group is not None}


def collectives_job(kind: str, worker_size: int, overlap: str, stage: int) -> tuple[float, list[float]]:
    """At every boundary a user's all-reduce, which rank 0 begins before the step, and the others after it."""
    qsr = {**QSR, "worker_size": worker_size, "averaging": {"overlap": overlap, "state": ["exp_avg"]}}
    engine = start(qsr, model()) if kind == "fsdp" else start_deepspeed(qsr, model(), "adamw", stage)
    own = engine._driver.place.own
    assert not reachable(engine) & {own.across, own.inside, own.everybody, engine.local_steps.averager.group}
    rank, sums = dist.get_rank(), []
    while not engine.local_steps.finished:
        inputs, targets = training.batch(rank, engine.local_steps.step, dtype=torch.float32)
        engine.backward(training.loss(engine(inputs), targets))
        theirs = torch.full((1000,), float(rank + 1))
        work = dist.all_reduce(theirs, async_op=True) if rank == 0 else None
        engine.step()
        work = work or dist.all_reduce(theirs, async_op=True)
        work.wait()
        sums.append(float(theirs.mean()))
    return fingerprint(engine), sums


@pytest.mark.parametrize(
    ("kind", "worker_size", "overlap", "stage"),
    [("fsdp", 1, "next_forward", 0), ("fsdp", 2, "none", 0), ("deepspeed", 1, "next_forward", 1)],
)
def test_a_users_collectives_do_not_meet_those_of_a_boundary(
    processes: Processes, kind: str, worker_size: int, overlap: str, stage: int
) -> None:
    """Headers and buffers used to travel in the group of all ranks, and so did parameters where a mesh gave it."""
    job: dict[str, Any] = {"kind": kind, "worker_size": worker_size, "overlap": overlap, "stage": stage}
    ranks = 2 * worker_size
    results = processes.run(collectives_job, ranks=ranks, seconds=60, **job)
    for rank, (found, sums) in enumerate(results):
        assert found == results[rank % worker_size][0]
        assert sums == [ranks * (ranks + 1) / 2] * QSR["total_steps"]
