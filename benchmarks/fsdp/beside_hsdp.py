"""Part A: beside HSDP, on two hosts that a network of a given rate joins."""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.fsdp.variants import LONG, Row, figures, loop_of, make_data, make_engine, ratio_of, shard_by_hand
from benchmarks.report import table
from benchmarks.slow_network import bytes_sent
from benchmarks.steps import Step, engine_step, small_model
from benchmarks.timing import no_collection
from qsr_engine.averaging import ring_bytes

HOSTS = 2
HSDP, ALONE = "HSDP by hand", "no exchange"
BYTES_A_SECOND = {"kbit": 125, "mbit": 125_000, "gbit": 125_000_000}


@dataclasses.dataclass
class Variant:
    """Something that takes steps; a block of them is whole rounds."""

    step: Step
    block: int
    computed: Callable[[], int]  # this rank's part of the bytes that should have left its worker so far


def hsdp_variant(model: nn.Module, worker_size: int, arguments: argparse.Namespace) -> Variant:
    mesh = init_device_mesh("cpu", (HOSTS, worker_size), mesh_dim_names=("replicate", "shard"))
    shard_by_hand(model, mesh)
    shards: list[Any] = list(model.parameters())
    sent = ring_bytes(sum(shard.to_local().numel() * 4 for shard in shards), HOSTS)
    take, steps = loop_of(model, make_data(arguments.batch), arguments), [0]

    def step() -> list[float]:
        steps[0] += 1
        return take()

    return Variant(step, arguments.block, lambda: sent * steps[0])


def engine_variant(model: nn.Module, worker_size: int, arguments: argparse.Namespace, block: int, qsr: Row) -> Variant:
    engine = make_engine(model, arguments, {"worker_size": worker_size, **qsr})
    step = engine_step(engine, *make_data(arguments.batch))
    return Variant(step, block, lambda: int(engine.local_steps.bytes_sent) // worker_size)


def network_variants(worker_size: int, arguments: argparse.Namespace) -> dict[str, Variant]:
    block, bf16 = arguments.block, {"wire_dtype": "bf16"}
    engines: dict[str, tuple[int, Row]] = {
        "parallel": (block, {"strategy": "parallel"}),
        "constant, H = 4": (8, {"strategy": "constant", "h_base": 4}),
        "constant, H = 16": (16, {"strategy": "constant", "h_base": 16}),
        "constant, H = 4, bf16": (8, {"strategy": "constant", "h_base": 4, "averaging": bf16}),
        ALONE: (block, {"strategy": "constant", "h_base": LONG}),
    }
    found = {HSDP: hsdp_variant(small_model(arguments.model), worker_size, arguments)}
    for name, (steps, qsr) in engines.items():
        found[name] = engine_variant(small_model(arguments.model), worker_size, arguments, steps, qsr)
    return found


def loopback_bytes() -> int:
    """Bytes that the processes of this host have sent one another."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    return 0


def counters(variant: Variant, worker_size: int) -> Tensor:
    """(bytes of the port, of the loopback, computed); the first process of a host reads the host's."""
    first = dist.get_rank() % worker_size == 0
    port, loopback = ((bytes_sent() or 0), loopback_bytes()) if first else (0, 0)
    return torch.tensor([port, loopback, variant.computed()], dtype=torch.float64)


def run_block(variant: Variant, worker_size: int) -> tuple[float, Tensor]:
    """Seconds of a step on this process, and what the counters went up by in a step."""
    before = counters(variant, worker_size)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(variant.block):
        variant.step()
    seconds = time.perf_counter() - started
    dist.barrier()
    return seconds / variant.block, (counters(variant, worker_size) - before) / variant.block


def take_turns(variants: dict[str, Variant], worker_size: int, repeats: int, seed: int) -> tuple[Tensor, Tensor]:
    """Seconds of a step, (variants, repeats), on the slowest rank; and what a host's counters went up by in a step."""
    order, draw = list(variants), random.Random(seed)
    seconds = torch.zeros(len(variants), repeats, dtype=torch.float64)
    counted = torch.zeros(len(variants), 3, dtype=torch.float64)
    for repetition in range(-1, repeats):  # the first one warms up
        draw.shuffle(order)
        for name in order:
            with no_collection():
                taken, moved = run_block(variants[name], worker_size)
            if repetition >= 0:
                place = list(variants).index(name)
                seconds[place, repetition] = taken
                counted[place] += moved / repeats
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(counted)
    return seconds, counted / HOSTS


def measure(arguments: argparse.Namespace, job: Row) -> list[Row]:
    """One row a variant, of one link and one size of workers."""
    dist.init_process_group("gloo")
    variants = network_variants(job["worker_size"], arguments)
    seconds, counted = take_turns(variants, job["worker_size"], arguments.repeats, arguments.seed)
    milliseconds = dict(zip(variants, seconds * 1000, strict=True))
    rate = bytes_a_second(job["link"])
    alone = milliseconds[ALONE].quantile(0.5).item()
    rows = []
    for (name, times), (port, loopback, computed) in zip(milliseconds.items(), counted.tolist(), strict=True):
        row = {**job, "variant": name, **figures(times, milliseconds[HSDP])}
        row |= {"port_mb": port / 1e6, "loopback_mb": loopback / 1e6, "computed_mb": computed / 1e6}
        row["limit_ms"] = alone + (computed / rate * 1000 if rate else 0.0)
        rows.append(row)
    return rows


def bytes_a_second(link: str) -> float | None:
    for unit, size in BYTES_A_SECOND.items():
        if link.endswith(unit):
            return float(link.removesuffix(unit)) * size
    return None


def shown(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        port, computed = row["port_mb"], row["computed_mb"]
        lines.append(
            [
                row["variant"],
                f"{row['milliseconds']:.0f}",
                ratio_of(row, HSDP),
                f"{port:.2f}",
                f"{computed:.2f}",
                f"{100 * (port / computed - 1):+.1f} %" if computed else "",
                f"{row['loopback_mb']:.1f}",
                f"{row['limit_ms']:.0f}",
                f"{row['milliseconds'] / row['limit_ms']:.2f}",
            ]
        )
    heads = "variant|ms a step|ratio to HSDP|MB a step, port|computed|difference|MB, loopback|limit, ms|of the limit"
    return f"### {rows[0]['link']}, worker_size {rows[0]['worker_size']}\n\n{table(heads.split('|'), lines)}"
