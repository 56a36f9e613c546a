"""Part C: memory of a boundary."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.fsdp.variants import Row, make_data, make_engine
from benchmarks.memory import most_held
from benchmarks.report import table
from benchmarks.steps import LEARNING_RATE, adamw, loss_of, small_model


def make_sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def measure(arguments: argparse.Namespace, job: Row) -> list[Row]:
    """One row for every way of averaging and optimizer; the largest figures of all ranks."""
    rows = []
    optimizers = {"AdamW": adamw, "SGD": make_sgd}
    for name, optimizer in optimizers.items():
        for shared in (True, False):
            for wire in ("fp32", "bf16"):
                averaging = {"bucket_mb": arguments.bucket_mb, "shared_memory": shared, "wire_dtype": wire}
                found = boundary_memory(arguments, job["worker_size"], averaging, optimizer)
                gathered: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, found)
                largest = {key: max(one[key] for one in gathered) for key in found if key != "way"}
                rows.append({**job, **averaging, "optimizer": name, "way": found["way"], **largest})
                gc.collect()
    return rows


def boundary_memory(arguments: argparse.Namespace, worker_size: int, averaging: Row, optimizer: Any) -> Row:
    """Bytes: of this rank's parameters, of the first boundary and of later ones, in the step and by themselves."""
    qsr = {"strategy": "constant", "h_base": 2, "total_steps": 6, "worker_size": worker_size, "averaging": averaging}
    engine = make_engine(small_model(arguments.memory_model), arguments, qsr, optimizer=optimizer)
    images, labels = make_data(1)
    inside, ends, alone = [], [], []
    advance = engine.local_steps.advance

    def marked() -> Any:
        with torch.profiler.record_function("boundary"):
            return advance()

    engine.local_steps.advance = marked
    while not engine.local_steps.finished:
        engine.backward(loss_of(engine, images, labels))
        with torch.profiler.profile(profile_memory=True) as profiler:
            boundary = engine.step()
        most, above = most_held(profiler, "boundary")
        if boundary:
            ends.append(most)
            alone.append(above)
        elif engine.local_steps.step > 1:  # in which the optimizer makes its state
            inside.append(most)
    return {
        "way": engine.local_steps.averager.way,
        "parameters": sum(master.numel() * 4 for master in engine._driver.replica.masters()),
        "inside": max(inside),
        "first": ends[0] - max(inside),
        "later": max(ends[1:]) - max(inside),
        "alone_first": alone[0],
        "alone_later": max(alone[1:]),
    }


def shown(rows: Sequence[Row]) -> str:
    worker_size, bucket_mb = rows[0]["worker_size"], rows[0]["bucket_mb"]
    size = bucket_mb * 1e6
    lines = [
        [
            row["optimizer"],
            f"{row['wire_dtype']}, shared memory {'on' if row['shared_memory'] else 'off'} ({row['way']})",
            f"{row['parameters'] / size:.1f}",
            f"{row['inside'] / size:.1f}",
            *(f"{row[key] / size:.2f}" for key in ("first", "later", "alone_first", "alone_later")),
        ]
        for row in rows
    ]
    heads = "a rank's parameters|a step inside a round|the first end of a round beside it|later ones"
    columns = f"optimizer|averaging|{heads}|by itself, the first|later ones".split("|")
    title = f"### Memory of a boundary, worker_size {worker_size}, buckets of {bucket_mb:g} MB"
    return f"{title}\n\n{table(columns, lines)}"
