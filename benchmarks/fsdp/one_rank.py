"""Part B: what a step of a worker of one rank costs, without a network."""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.fsdp.variants import LONG, Row, figures, loop_of, make_data, make_engine, ratio_of, shard_by_hand
from benchmarks.report import table
from benchmarks.steps import PHASES, Step, adamw, engine_step, loss_of, small_model, timed_step
from benchmarks.timing import no_collection

PLAIN, PLAIN_BF16 = "plain loop", "plain loop, bf16"


def bf16_step(model: nn.Module, data: tuple[Tensor, Tensor], arguments: argparse.Namespace) -> Step:
    """The plain loop in bf16 with fp32 masters."""
    low = copy.deepcopy(model).bfloat16()
    masters: list[Tensor] = list(model.parameters())
    copies: list[Tensor] = list(low.parameters())
    optimizer, images = adamw(masters, arguments.fused), data[0].bfloat16()

    def backward(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for master, lower in zip(masters, copies, strict=True):
            assert lower.grad is not None
            master.grad, lower.grad = lower.grad.float(), None

    def update() -> None:
        if arguments.clip:
            nn.utils.clip_grad_norm_(masters, arguments.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(copies, masters)

    return timed_step(lambda: loss_of(low, images, data[1]), backward, update)


def single_variants(arguments: argparse.Namespace) -> dict[str, Step]:
    dist.init_process_group("gloo")
    data = make_data(arguments.batch)
    mesh = init_device_mesh("cpu", (1,))
    silent = {"strategy": "constant", "h_base": LONG}
    bf16 = {"enabled": True}

    def model() -> nn.Module:
        return small_model(arguments.model)

    made: dict[str, Callable[[], Step]] = {
        PLAIN: lambda: loop_of(model(), data, arguments),
        f"{PLAIN}, again": lambda: loop_of(model(), data, arguments),
        "engine": lambda: engine_step(make_engine(model(), arguments, silent), *data),
        "fully_shard": lambda: loop_of(shard_by_hand(model(), mesh), data, arguments),
        PLAIN_BF16: lambda: bf16_step(model(), data, arguments),
        f"{PLAIN_BF16}, again": lambda: bf16_step(model(), data, arguments),
        "engine, bf16": lambda: engine_step(make_engine(model(), arguments, silent, bf16=bf16), *data),
        "fully_shard, bf16": lambda: loop_of(shard_by_hand(model(), mesh, bf16=True), data, arguments),
    }
    names = list(made)
    random.Random(arguments.seed).shuffle(names)  # so that no variant is always the first one to get memory
    steps = {name: made[name]() for name in names}
    return {name: steps[name] for name in made}


def measure(arguments: argparse.Namespace, job: Row) -> list[Row]:
    """One row a variant."""
    steps = single_variants(arguments)
    order, draw = list(steps), random.Random(arguments.seed)
    phases = torch.zeros(len(steps), arguments.repeats_b, len(PHASES), dtype=torch.float64)
    for repetition in range(-5, arguments.repeats_b):
        draw.shuffle(order)
        with no_collection():
            for name in order:
                taken = steps[name]()
                if repetition >= 0:
                    phases[list(steps).index(name), repetition] = torch.tensor(taken)
    milliseconds = dict(zip(steps, phases.sum(2) * 1000, strict=True))
    rows = []
    for (name, times), parts in zip(milliseconds.items(), phases, strict=True):
        baseline = PLAIN_BF16 if "bf16" in name else PLAIN
        found = figures(times, milliseconds[baseline])
        medians = (parts.median(0).values * 1000).tolist()
        rows.append({**job, "variant": name, "baseline": baseline, "phases": medians, **found})
    return rows


def shown(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        times = (row["milliseconds"], row["lowest"], *row["phases"])
        lines.append([row["variant"], *(f"{ms:.1f}" for ms in times), ratio_of(row, row["baseline"]), row["baseline"]])
    columns = ("variant", "ms a step", "lowest", *PHASES, "ratio", "beside")
    return f"### A worker of one rank\n\n{table(columns, lines)}"
