"""What do local steps on PyTorch's own sharding (`initialize_fsdp`) save on a slow network, and what do they cost?

    sudo .venv/bin/python -m benchmarks.fsdp                              # all parts, workers of 1 and 2 ranks
    sudo .venv/bin/python -m benchmarks.fsdp --parts A --link 100mbit --worker-sizes 2
    python -m benchmarks.fsdp --parts B,C --repeats-b 300   # needs no root

Part A, beside HSDP. Two hosts (slow_network.py) are the two workers, with worker_size processes each. What the ranks
of a worker exchange stays on the loopback of their host; the host's port carries what workers exchange. Every process
holds all variants:

    HSDP by hand              torch's own `fully_shard` over (worker, shard); gradients are averaged at every step
    parallel                  the engine's strategy, which is the same
    constant, H = 4 and 16    the engine, fp32 on the wire
    constant, H = 4, bf16     the same with averaging.wire_dtype bf16
    no exchange               the engine inside a round that outlasts the measurement: compute, and what the ranks of a
                              worker exchange

In each repetition every variant takes one block of whole rounds, in an order drawn anew each time and the same on every
process; barriers, outside of the clock, precede and follow it. A block's value is the slowest process' seconds divided
by its steps. Bytes are read from the counters of the host's port around the same blocks. Computed bytes are what the
engine counts (local_steps.bytes_sent, of all ranks of a host), and for HSDP 2 (K - 1) / K times the gradients.
*limit* is the time of *no exchange* plus computed bytes / rate of the link: what a variant takes that hides nothing
behind compute.

Part B, a worker of one rank, without a network: one process holds all variants and takes one step of each in turn. The
plain loop in bf16 has fp32 masters, as the others have: bf16 parameters are made from them after every step, and their
gradients are converted for the optimizer.

Part C, memory of a boundary: the most that torch holds in an engine.step() that ends a round, minus the most in one
that does not; and by itself, the most inside the boundary above what is held at its beginning. Both in buckets
(averaging.bucket_mb). The run's first step, in which AdamW makes its state, does not count; what gloo itself takes is
not seen.

The ratio of a variant is the median over repetitions of its milliseconds / the baseline's in the same repetition, since
load from elsewhere slows both. In brackets: 95 %, by bootstrap over repetitions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from benchmarks import ranks
from benchmarks.fsdp import beside_hsdp, boundary_memory, one_rank
from benchmarks.fsdp.beside_hsdp import HOSTS
from benchmarks.fsdp.variants import Row
from benchmarks.report import Report, parser
from benchmarks.slow_network import address, slow_network
from benchmarks.steps import small_model

MEASURE: dict[str, Callable[[argparse.Namespace, Row], list[Row]]] = {
    "A": beside_hsdp.measure,
    "B": one_rank.measure,
    "C": boundary_memory.measure,
}
SHOWN: dict[str, Callable[[Sequence[Row]], str]] = {
    "A": beside_hsdp.shown,
    "B": one_rank.shown,
    "C": boundary_memory.shown,
}


def jobs_of(arguments: argparse.Namespace) -> Iterator[Row]:
    for part in arguments.parts.split(","):
        if part == "A":
            for size in arguments.worker_sizes:
                yield from ({"part": part, "link": link, "worker_size": size} for link in arguments.link)
        elif part == "B":
            yield {"part": part}
        elif part == "C":
            yield from ({"part": part, "worker_size": size} for size in arguments.worker_sizes)
        else:
            raise SystemExit(f"--parts: {part!r} is no part; write some of A,B,C")


def run_job(job: Row, arguments: argparse.Namespace) -> list[Row]:
    size, measure = job.get("worker_size", 1), MEASURE[job["part"]]
    if job["part"] != "A":
        on_each = 1 if job["part"] == "B" else HOSTS * size
        return ranks.run(measure, arguments, job, on_each=on_each, seconds=arguments.timeout, KINETO_LOG_LEVEL=99)
    with slow_network(HOSTS, None if job["link"] == "none" else job["link"]) as hosts:
        return ranks.run(
            measure, arguments, job, on_each=size, hosts=hosts, master=address(0), seconds=arguments.timeout
        )


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--parts", default="A,B,C")
    made.add_argument("--link", nargs="+", default=["100mbit", "1gbit", "none"], help="A: rates of the hosts' ports")
    made.add_argument("--worker-sizes", type=int, nargs="+", default=[2, 1], help="A: processes a host; C")
    made.add_argument("--model", default="vit_tiny_patch16_224", help="A and B: a ViT or ResNet of timm's, at 32 px")
    made.add_argument("--memory-model", default="vit_small_patch16_224", help="C")
    made.add_argument("--bucket-mb", type=float, default=4.0, help="C: averaging.bucket_mb")
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--clip", type=float, default=1.0, help="gradient clipping; 0 for none")
    made.add_argument("--fused", action="store_true", help="A and B: torch's fused AdamW")
    made.add_argument("--repeats", type=int, default=8, help="A")
    made.add_argument("--repeats-b", type=int, default=100, help="B")
    made.add_argument("--block", type=int, default=4, help="A: steps of a block where every step is a round")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--timeout", type=float, default=900, help="seconds of one table")
    return made.parse_args()


def main() -> None:
    arguments = parse()
    sizes = {
        f"parameters_of_{key}": sum(p.numel() for p in small_model(vars(arguments)[key]).parameters())
        for key in ("model", "memory_model")
    }
    report = Report("fsdp", arguments, ("torch", "timm"), backend="gloo", **sizes)
    results: list[Row] = []
    for job in jobs_of(arguments):
        rows = run_job(job, arguments)
        results += rows
        report.add(SHOWN[job["part"]](rows))
        report.save(results=results)


if __name__ == "__main__":
    main()
