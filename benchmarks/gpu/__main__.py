"""Does everything that needs a GPU work on this one, and how long does a boundary take?

    make test-gpu                                     # with the Python of PATH, whose torch sees the GPU
    make test-gpu WHEELS=folder                       # packages that it lacks, from wheels in a folder
    python -m benchmarks.gpu --out benchmarks/results
    python -m benchmarks.gpu --device cpu             # a rehearsal: what needs CUDA is listed as not run

One GPU is enough, and ten minutes. The exit code is 0 only where every check has been run and went well: 1 where one
has failed, 3 where none has and some were not run. The parts:

    boundary     one rank with NCCL, beside which a second one is pretended: the time of a whole boundary in copies of
                 the same bytes on the device, its memory, and how often the host waits in it
    loader       training pictures a second that come to the device
    workers      two processes on the one GPU over gloo (four for two levels) beside the reference, on both engines
    train        `qsr train` on both engines: saved, resumed, exported
    tests        tests/gpu: NCCL's mean, graphs, every stage and precision, resuming, batches on their way to the GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import ranks
from benchmarks.gpu import boundary, commands, loading, two_ranks
from benchmarks.gpu.rows import Row, exit_code, not_run, shown
from benchmarks.report import Report, parser

PACKAGES = ("torch", "deepspeed", "torchvision", "timm", "numpy")


def boundary_part(arguments: argparse.Namespace, left: float) -> list[Row]:
    return _in_ranks(arguments, 1, left, boundary.PART, boundary.CHECKS, boundary.measure, arguments.mb)


def loader_part(arguments: argparse.Namespace, left: float) -> list[Row]:
    return loading.measure(arguments.device, arguments.batches)


def workers_part(arguments: argparse.Namespace, left: float) -> list[Row]:
    started, rows = time.perf_counter(), []
    for engine in two_ranks.ENGINES:
        for number in (2, 4):
            seconds = min(120.0, left - (time.perf_counter() - started))
            checks = two_ranks.names(engine, number)
            rows += _in_ranks(arguments, number, seconds, two_ranks.PART, checks, two_ranks.measure, engine)
    return rows


def train_part(arguments: argparse.Namespace, left: float) -> list[Row]:
    return commands.trained(arguments.device)


def tests_part(arguments: argparse.Namespace, left: float) -> list[Row]:
    return commands.tested(arguments.device, left)


Part = Callable[[argparse.Namespace, float], list[Row]]
PARTS: dict[str, Part] = {
    "boundary": boundary_part,
    "loader": loader_part,
    "workers": workers_part,
    "train": train_part,
    "tests": tests_part,
}


def _in_ranks(
    arguments: argparse.Namespace,
    number: int,
    seconds: float,
    part: str,
    checks: Sequence[str],
    function: Callable[..., list[Row]],
    *more: object,
) -> list[Row]:
    """Run a function in so many ranks that all see device 0. Where they fail as a whole, each of its checks has."""
    if seconds < 1:
        return not_run(part, checks, "no time was left")
    accelerator = {"DS_ACCELERATOR": arguments.device}
    try:
        return ranks.run(function, arguments.device, *more, hosts=[()] * number, seconds=seconds, **accelerator)
    except RuntimeError as error:
        return [Row(part, check, "failed", f"{error}") for check in checks]


def run(arguments: argparse.Namespace) -> list[Row]:
    """The rows of all parts; those that --parts leaves out are rows too."""
    deadline = time.perf_counter() + arguments.seconds
    rows: list[Row] = []
    for name, part in PARTS.items():
        left = deadline - time.perf_counter()
        if name not in arguments.parts:
            rows += not_run(name, ["all"], "left out by --parts")
        elif left < 5:
            rows += not_run(name, ["all"], "no time was left")
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += part(arguments, left)
    return rows


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    made.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    made.add_argument("--mb", type=float, help="parameters of a boundary, in MB (default: 346, a ViT-B; on a CPU 8)")
    made.add_argument("--batches", type=int, default=20, help="of 32 pictures, for the loader")
    made.add_argument("--seconds", type=float, default=570, help="that all parts may take; the rest is not run")
    arguments = made.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        made.error("torch sees no GPU here; write --device cpu for a rehearsal of what needs none")
    if arguments.mb is None:
        arguments.mb = 346.0 if arguments.device == "cuda" else 8.0
    return arguments


def gpu(device: str) -> dict[str, Any]:
    """What there is to say of the GPU."""
    if device != "cuda":
        return {"gpu": None}
    facts = torch.cuda.get_device_properties(0)
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {"gpu": facts.name, "gpu_memory": facts.total_memory, "cuda": torch.version.cuda, "nccl": version}


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    report = Report("gpu", arguments, PACKAGES, **gpu(arguments.device))
    rows = run(arguments)
    figures = [dataclasses.asdict(row) for row in rows]
    report.save(rows=figures)
    print(json.dumps({"rows": figures}))
    report.add(shown(rows))
    report.save(rows=figures)
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
