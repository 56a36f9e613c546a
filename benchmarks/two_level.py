"""Is averaging in two levels, inside every host and then between hosts, faster than the flat ring over all ranks?

    sudo .venv/bin/python -m benchmarks.two_level --link 1gbit             # 2 hosts of 2 workers, 346 MB as ViT-B/16
    sudo .venv/bin/python -m benchmarks.two_level --link 100mbit --mb 20 --repeats 5

Hosts are network namespaces of this machine (launch/cluster.sh), joined by links of the rate; their cores and their
memory are one machine's. In each repetition every way averages once, the first one another time; the time is that of
the slowest rank. A ratio is that of two times of one repetition; the table has the median, the lowest and the highest.
MB at the port are counted at a host's interface, headers included, the mean over hosts; beside it what is computed:
2 (n - 1) / n of the payload, n the ranks of the flat ring, numbered host by host, or the hosts in two levels.
"""

from __future__ import annotations

import argparse
import os
import statistics
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ranks
from benchmarks.report import Report, parser, table
from benchmarks.slow_network import address, bytes_sent, slow_network
from benchmarks.timing import timed
from qsr_engine.averaging import Averager, bucket_bytes, flat_buckets, ring_bytes
from qsr_engine.config.averaging import AveragingConfig

FLAT = "flat ring over all ranks"
WAYS: dict[str, dict[str, Any]] = {
    FLAT: {"two_level": False},
    "two levels, shared memory inside": {},
    "two levels, collectives inside": {"two_level": True, "shared_memory": False},
}
EXPECTED = ("AllReduce", "TwoLevelSharedMemory", "TwoLevelCollectives")


def payload(mb: float) -> list[torch.Tensor]:
    """Tensors of 1 MB, other ones on every rank and the same at every call."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(250_000, generator=generator).mul_(0.05) for _ in range(max(1, round(mb)))]


def prepare(mb: float, with_collectives: bool) -> dict[str, Averager]:
    """An averager for each way, that has averaged once; what it gave is compared with the other ranks and the flat."""
    found: dict[str, Averager] = {}
    means: dict[str, torch.Tensor] = {}
    for (name, options), expected in zip(WAYS.items(), EXPECTED, strict=True):
        if expected == "TwoLevelCollectives" and not with_collectives:
            continue
        config = AveragingConfig(**options)
        averager = Averager(flat_buckets(payload(mb), bucket_bytes(config.bucket_mb, None)), None, config)
        if averager.way != expected:
            raise RuntimeError(f"{name}: {expected} was meant, and {averager.way} was chosen")
        averager.average()
        means[name] = torch.cat(averager.buckets)
        same = [torch.empty_like(means[name]) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
        dist.gather(means[name], same)
        if same and not all(torch.equal(one, means[name]) for one in same):
            raise RuntimeError(f"{name}: the ranks got different bits")
        found[name] = averager
    for name, mean in means.items():
        # Values of up to 0.3 added up in another order: 3 roundings of half an eps (6e-8), twice.
        torch.testing.assert_close(mean, means[FLAT], rtol=0, atol=3 * 0.3 * 1.2e-7, msg=f"{name}: not the mean")
    return found


def once(averager: Averager, hosts: int) -> tuple[float, float]:
    """(seconds on the slowest rank, bytes that a host's port sent, the mean over hosts) of one averaging."""
    counted = os.environ["LOCAL_RANK"] == "0"
    dist.barrier()
    before = (bytes_sent() or 0) if counted else 0
    seconds = timed(averager.average)
    sent = torch.tensor([float((bytes_sent() or 0) - before) if counted else 0.0], dtype=torch.float64)
    dist.all_reduce(sent)
    return seconds, sent.item() / hosts


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    averagers = prepare(arguments.mb, arguments.collectives)
    names = list(averagers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sent: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(arguments.repeats):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            took, counted = once(averagers[name], arguments.hosts)
            seconds[name].append(took)
            sent[name].append(counted)
    nbytes = sum(bucket.nbytes for bucket in averagers[FLAT].buckets)
    rows = []
    for name in names:
        ratios = [mine / flat for mine, flat in zip(seconds[name], seconds[FLAT], strict=True)]
        rows.append(
            {
                "way": name,
                "milliseconds": 1e3 * statistics.median(seconds[name]),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "port_mb": statistics.median(sent[name]) / 1e6,
                "computed_mb": ring_bytes(nbytes, dist.get_world_size() if name == FLAT else arguments.hosts) / 1e6,
            }
        )
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    columns = ("way", "ms", "ratio", "lowest", "highest", "port MB", "computed MB")
    lines = [
        [
            row["way"],
            f"{row['milliseconds']:.1f}",
            *(f"{row[key]:.3f}" for key in ("ratio", "lowest", "highest")),
            *(f"{row[key]:.2f}" for key in ("port_mb", "computed_mb")),
        ]
        for row in rows
    ]
    return table(columns, lines)


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--link", required=True, help="rate of a host's port in each direction, as tc writes it: 1gbit")
    made.add_argument("--hosts", type=int, default=2)
    made.add_argument("--workers", type=int, default=2, help="on each host")
    made.add_argument("--mb", type=float, default=346, help="fp32 parameters that are averaged, in 1e6 bytes")
    made.add_argument("--repeats", type=int, default=11)
    made.add_argument("--collectives", action="store_true", help="also two levels without shared memory")
    return made.parse_args()


def main() -> None:
    arguments = parse()
    report = Report("two-level", arguments, ("torch",), backend="gloo")
    with slow_network(arguments.hosts, arguments.link) as hosts:
        rows = ranks.run(measure, arguments, hosts=hosts, on_each=arguments.workers, master=address(0))
    report.add(
        f"{arguments.hosts} hosts of {arguments.workers} workers, {arguments.mb:g} MB, link {arguments.link}\n\n"
        f"{shown(rows)}"
    )
    report.save(results=rows)


if __name__ == "__main__":
    main()
