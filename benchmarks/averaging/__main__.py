"""How long does one averaging take, and how much memory, beside a raw all-reduce and the ways of others?

    python -m benchmarks.averaging                                  # ViT-B/16, ResNet-152, 1,000 tiny tensors
    python -m benchmarks.averaging --processes 4 --models vit
    python -m benchmarks.averaging --bucket-sizes                   # 1 to 256 MB
    sudo .venv/bin/python -m benchmarks.averaging --link 1gbit --models vit   # two hosts, wire types, overlap

Every process holds the parameters of the model. In each repetition every way averages them once, one way after another;
a way's time in a repetition is that of the slowest process. The table gives the median over the repetitions, and its
ratio to the median of the floor: one all-reduce of one flat fp32 tensor, made beforehand, not divided. Extra memory is
what a way needs beside the parameters, at its peak: anonymous memory, sampled during runs that are not timed. Every
model has processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ranks
from benchmarks.averaging.hidden import SETTINGS, overlap
from benchmarks.averaging.ways import FLOOR, Way, shapes_of, ways
from benchmarks.memory import anonymous, peak_memory, release
from benchmarks.report import Report, parser, table
from benchmarks.slow_network import address, bytes_sent, slow_network
from benchmarks.timing import timed

MODELS = {"vit": "ViT-B/16", "small": "ViT-S/16", "resnet": "ResNet-152", "tiny": "1,000 tensors of 1,000 elements"}


PARAMETERS = ("qsr: in place", "qsr: bf16", "qsr: fp16", "qsr: int8", "buckets of")


def prepare(name: str, make: Callable[[], Way | None], payload: float) -> tuple[Way | None, float]:
    """The way, after two runs, and its extra memory in MB: the tensors that are averaged do not count."""
    release()
    before, peak = anonymous(), [0.0]
    way = make()
    if way is None:
        return None, 0.0
    release()
    made = anonymous() - before
    # What a way makes for itself are its parameters first; what is beyond them, an anchor say, is extra.
    own = payload if name.startswith(PARAMETERS) or name == FLOOR else 0.0
    kept = max(0.0, made - own) if own else 0.0
    base = anonymous()
    for _ in range(2):
        with peak_memory(peak):
            way()
        dist.barrier()
    largest = torch.tensor([kept + max(0.0, max(peak) - base)])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return way, largest.item()


def measure(model: str, repeats: int, only: str, leave_out: str) -> list[dict[str, Any]]:
    """One row a way."""
    dist.init_process_group("gloo")
    shapes = shapes_of(model)
    payload = sum(shape.numel() for shape in shapes) * 4 / 1e6
    prepared: dict[str, Way] = {}
    memory: dict[str, float] = {}
    for name, make in ways(shapes, only).items():
        if leave_out and leave_out in name:
            continue
        way, memory[name] = prepare(name, make, payload)
        if way is not None:
            prepared[name] = way
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    wire: dict[str, int] = {}
    for _ in range(repeats):
        for name, way in prepared.items():
            before = bytes_sent() if only == "link" else None
            seconds[name].append(timed(way))
            if before is not None:
                wire[name] = (bytes_sent() or 0) - before
    floor = statistics.median(seconds[FLOOR])
    return [
        {
            "model": model,
            "processes": dist.get_world_size(),
            "way": name,
            "milliseconds": 1e3 * statistics.median(times),
            "ratio": statistics.median(times) / floor,
            "spread": [min(times) / floor, max(times) / floor],
            "extra_mb": memory[name],
            "sent_mb": wire[name] / 1e6 if name in wire else None,
        }
        for name, times in seconds.items()
    ]


def shown(rows: list[dict[str, Any]]) -> str:
    mb = sum(shape.numel() for shape in shapes_of(rows[0]["model"])) * 4 / 1e6
    columns = ("way", "ms", "ratio", "lowest", "highest", "extra MB", "sent MB")
    lines = [
        [
            row["way"],
            f"{row['milliseconds']:.1f}",
            *(f"{ratio:.2f}" for ratio in (row["ratio"], *row["spread"])),
            f"{row['extra_mb']:.0f}",
            "" if row["sent_mb"] is None else f"{row['sent_mb']:.1f}",
        ]
        for row in rows
    ]
    heading = f"{MODELS[rows[0]['model']]}, {mb:.0f} MB in fp32, {rows[0]['processes']} processes"
    return f"{heading}\n\n{table(columns, lines)}"


def shown_overlap(rows: list[dict[str, Any]]) -> str:
    columns = [name for name in rows[0] if name != "raw"]
    cells = [[row[name] for name in columns] for row in rows]
    return table(
        columns, [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line] for line in cells]
    )


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=["vit", "resnet", "tiny"])
    made.add_argument("--repeats", type=int, default=11)
    made.add_argument("--leave-out", default="", help="ways whose names contain this, where memory is short: wire")
    made.add_argument("--bucket-sizes", action="store_true", help="compare sizes of buckets instead")
    made.add_argument("--link", help="each process on a host of its own, joined by links of this rate, as 1gbit")
    made.add_argument("--batch", type=int, default=0, help="also: hide an averaging behind a step of so many images")
    made.add_argument("--overlap-only", action="store_true", help="with --batch: leave the table out")
    return made.parse_args()


def main() -> None:
    arguments = parse()
    report = Report("averaging", arguments, ("torch", "accelerate", "torchft", "timm", "torchvision"), backend="gloo")
    only = "bucket sizes" if arguments.bucket_sizes else "link" if arguments.link else ""
    only = "nothing" if arguments.overlap_only else only
    results: list[dict[str, Any]] = []
    hidden: list[dict[str, Any]] = []
    with contextlib.ExitStack() as open_network:
        where: dict[str, Any] = {"on_each": arguments.processes}
        if arguments.link:
            hosts = open_network.enter_context(slow_network(arguments.processes, arguments.link))
            where = {"hosts": hosts, "master": address(0)}
        for model in arguments.models:
            repeats = arguments.repeats * (10 if model == "tiny" else 1)
            rows = ranks.run(measure, model, repeats, only, arguments.leave_out, **where)
            results += rows
            report.add(shown(rows))
            report.save(results=results, overlap=hidden)
        for model in arguments.models if arguments.batch else []:
            for setting in SETTINGS:
                hidden.append(ranks.run(overlap, model, arguments.repeats, arguments.batch, setting, **where))
                report.save(results=results, overlap=hidden)
            report.add(shown_overlap(hidden[-len(SETTINGS) :]))
    report.save(results=results, overlap=hidden)


if __name__ == "__main__":
    main()
