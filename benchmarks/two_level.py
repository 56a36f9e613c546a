"""Is averaging in two levels, inside every host and then between hosts, faster than the flat ring over all ranks?

    sudo .venv/bin/python benchmarks/two_level.py --link 1gbit             # 2 hosts of 2 workers, 346 MB as ViT-B/16
    sudo .venv/bin/python benchmarks/two_level.py --link 100mbit --mb 20 --repeats 5

Hosts are network namespaces of this machine (launch/cluster.sh), joined by links of the rate; their cores and their
memory are one machine's. In each repetition every way averages once, the first one another time; the time is that of
the slowest rank. A ratio is that of two times of one repetition; the table has the median, the lowest and the highest.
MB at the port are counted at a host's interface, headers included, the mean over hosts; beside it what is computed:
2 (n - 1) / n of the payload, n the ranks of the flat ring, numbered host by host, or the hosts in two levels.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qsr_engine.averaging import Averager, bucket_bytes, flat_buckets, ring_bytes
from qsr_engine.config.qsr import AveragingConfig

sys.path.insert(0, str(Path(__file__).parent))
from hardware import machine
from slow_network import address, bytes_sent, slow_network

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


def once(averager: Averager) -> tuple[float, float]:
    """(seconds on the slowest rank, bytes that a host's port sent, the mean over hosts) of one averaging."""
    counted = os.environ["LOCAL_RANK"] == "0"
    dist.barrier()
    before = (bytes_sent() or 0) if counted else 0
    started = time.perf_counter()
    averager.average()
    seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.barrier()
    sent = torch.tensor([float((bytes_sent() or 0) - before) if counted else 0.0], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(sent)
    return seconds.item(), sent.item() / int(os.environ["HOSTS"])


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    averagers = prepare(arguments.mb, arguments.collectives)
    names = list(averagers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sent: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(arguments.repeats):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            took, counted = once(averagers[name])
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


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rows = measure(arguments)
    if dist.get_rank() == 0:
        print(f"\n{arguments.hosts} hosts of {arguments.workers} workers, {arguments.mb:g} MB, link {arguments.link}")
        print(f"{'way':<34}{'ms':>9}{'ratio':>8}{'lowest':>8}{'highest':>9}{'port MB':>10}{'computed':>10}")
        for row in rows:
            print(
                f"{row['way']:<34}{row['milliseconds']:>9.1f}{row['ratio']:>8.3f}{row['lowest']:>8.3f}"
                f"{row['highest']:>9.3f}{row['port_mb']:>10.2f}{row['computed_mb']:>10.2f}"
            )
        print(json.dumps(facts(arguments)), flush=True)
        if arguments.out:
            report = {"facts": facts(arguments), "results": rows}
            Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    dist.barrier()
    os._exit(0)  # gloo's threads need not be waited for


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **machine("torch"),
        "backend": "gloo",
        "repeats": arguments.repeats,
        "link": arguments.link,
        "threads_of_a_process": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", required=True, help="rate of a host's port in each direction, as tc writes it: 1gbit")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="on each host")
    parser.add_argument("--mb", type=float, default=346, help="fp32 parameters that are averaged, in 1e6 bytes")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--collectives", action="store_true", help="also two levels without shared memory")
    parser.add_argument("--out", help="write the figures as JSON, too")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with slow_network(arguments.hosts, arguments.link) as hosts:
        started = []
        for rank in range(arguments.hosts * arguments.workers):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank % arguments.workers,
                "WORLD_SIZE": arguments.hosts * arguments.workers,
                "HOSTS": arguments.hosts,
                "MASTER_ADDR": address(0),
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
            }
            words = [*hosts[rank // arguments.workers], sys.executable, *sys.argv]
            started.append(subprocess.Popen(words, env={**os.environ, **{k: str(v) for k, v in environment.items()}}))
        codes = [process.wait() for process in started]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
