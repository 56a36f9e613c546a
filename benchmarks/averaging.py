"""How long does one averaging take, and how much memory, beside a raw all-reduce and the ways of others?

    python benchmarks/averaging.py                                  # ViT-B/16, ResNet-152, 1,000 tiny tensors
    python benchmarks/averaging.py --processes 4 --models vit
    python benchmarks/averaging.py --bucket-sizes                   # 1 to 256 MB
    sudo .venv/bin/python benchmarks/averaging.py --link 1gbit --models vit   # two hosts, wire types, overlap

Every process holds the parameters of the model. In each repetition every way averages them once, one way after another;
a way's time in a repetition is that of the slowest process. The table gives the median over the repetitions, and its
ratio to the median of the floor: one all-reduce of one flat fp32 tensor, made beforehand, not divided. Extra memory is
what a way needs beside the parameters, at its peak: anonymous memory, sampled during runs that are not timed.

The ways of others are written anew from their descriptions, or called where they are an installed library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging import Averager, bucket_bytes, flat_buckets
from qsr_engine.averaging.allreduce import AllReduce
from qsr_engine.averaging.buckets import packed_pieces
from qsr_engine.config.qsr import AveragingConfig
from qsr_engine.local_steps.header import Header, exchange_headers

sys.path.insert(0, str(Path(__file__).parent))
from hardware import machine
from slow_network import address, bytes_sent, slow_network

MODELS = {"vit": "ViT-B/16", "resnet": "ResNet-152", "tiny": "1,000 tensors of 1,000 elements"}
FLOOR = "raw all-reduce of a flat tensor"
Way = Callable[[], None]


def shapes_of(model: str) -> list[torch.Size]:
    if model == "tiny":
        return [torch.Size([1000])] * 1000
    with torch.device("meta"):
        return [p.shape for p in build(model).parameters()]


def build(model: str) -> nn.Module:
    if model == "vit":
        import timm

        return timm.create_model("vit_base_patch16_224")  # type: ignore[no-any-return]
    import torchvision

    return torchvision.models.resnet152()  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------- ways of others


def authors(tensors: list[Tensor]) -> Way:
    """The paper's authors: concatenate all, all-reduce, divide, copy back."""

    def way() -> None:
        flat = torch.cat([tensor.view(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    return way


def torch_averager(tensors: list[Tensor]) -> Way:
    from torch.distributed.algorithms.model_averaging.utils import average_parameters

    parameters = [nn.Parameter(tensor) for tensor in tensors]
    return lambda: average_parameters(iter(parameters), dist.group.WORLD)  # type: ignore[arg-type]


def torch_coalesced(tensors: list[Tensor]) -> Way:
    def way() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.all_reduce_coalesced(tensors)
        torch._foreach_div_(tensors, dist.get_world_size())

    return way


def accelerate_reduce(tensors: list[Tensor]) -> Way | None:
    """What accelerate's LocalSGD does: reduce every parameter by itself."""
    try:
        from accelerate import Accelerator
    except ImportError:
        return None
    accelerator = Accelerator(cpu=True)
    parameters = [nn.Parameter(tensor) for tensor in tensors]

    def way() -> None:
        for parameter in parameters:
            parameter.data = accelerator.reduce(parameter.data, reduction="mean")

    return way


def torchft_local_sgd(tensors: list[Tensor]) -> Way:
    """torchft's LocalSGD: a copy of every parameter, all of them reduced by themselves in flight, then copied back."""

    def way() -> None:
        copies = [tensor.clone() for tensor in tensors]
        works = [dist.all_reduce(copy, async_op=True) for copy in copies]
        for tensor, copy, work in zip(tensors, copies, works, strict=True):
            work.wait()
            tensor.copy_(copy.div_(dist.get_world_size()))

    return way


# --------------------------------------------------------------------------------------------- ways of ours


def boundary(averager: Averager) -> Way:
    """All that a boundary does: finite?, header, averaging, distance."""

    def way() -> None:
        header = Header(1, 1, 0.1, 1, averager.sum_of_squares(), averager.moved())
        headers = exchange_headers(header, torch.device("cpu"))
        averager.average()
        averager.relative_distance([header.sum_of_squares for header in headers])

    return way


def packed(tensors: list[Tensor]) -> Way:
    mean = AllReduce(packed_pieces(tensors, 64_000_000), None)

    def way() -> None:
        for _ in mean.run(range(len(mean.pieces))):
            pass

    return way


def averager_of(shapes: list[torch.Size], **options: Any) -> Averager:
    averaging = AveragingConfig(**{"shared_memory": False, **options})
    buckets = flat_buckets(random_tensors(shapes), bucket_bytes(averaging.bucket_mb, None))
    return Averager(buckets, None, averaging)


def random_tensors(shapes: list[torch.Size]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(shape, generator=generator).mul_(0.05) for shape in shapes]


def ways(shapes: list[torch.Size], only: str) -> dict[str, Callable[[], Way | None]]:
    """Name of every way, and what prepares it. Those of others share one set of tensors."""
    total = sum(shape.numel() for shape in shapes)
    tensors: list[Tensor] = []

    def shared() -> list[Tensor]:
        if not tensors:
            tensors.extend(random_tensors(shapes))
        return tensors

    @functools.cache
    def averager(shared_memory: bool) -> Averager:
        return averager_of(shapes, shared_memory=shared_memory)

    def floor() -> Way:
        flat = torch.randn(total).mul_(0.05)

        def way() -> None:
            dist.all_reduce(flat)

        return way

    found: dict[str, Callable[[], Way | None]] = {FLOOR: floor}
    ours = {
        "qsr: in place, gloo": lambda: averager(False).average,
        "qsr: in place, one flat tensor, gloo": lambda: averager_of([torch.Size([total])]).average,
        "qsr: the whole boundary, gloo": lambda: boundary(averager(False)),
        "qsr: packed through two buckets": lambda: packed(shared()),
        "qsr: bf16 on the wire": lambda: averager_of(shapes, wire_dtype="bf16").average,
        "qsr: fp16 on the wire": lambda: averager_of(shapes, wire_dtype="fp16").average,
        "qsr: int8 on the wire": lambda: averager_of(shapes, wire_dtype="int8").average,
        "qsr: shared memory": lambda: averager(True).average,
        "qsr: the whole boundary, shared memory": lambda: boundary(averager(True)),
    }
    if len(shapes) < 1000:
        del ours["qsr: in place, one flat tensor, gloo"]
    others: dict[str, Callable[[], Way | None]] = {
        "paper's authors": lambda: authors(shared()),
        "torch average_parameters": lambda: torch_averager(shared()),
        "torch coalesced": lambda: torch_coalesced(shared()),
        "accelerate": lambda: accelerate_reduce(shared()),
        "torchft LocalSGD": lambda: torchft_local_sgd(shared()),
    }
    if only == "nothing":
        return found
    if only == "bucket sizes":
        sizes = (1.0, 4.0, 16.0, 25.0, 64.0, 128.0, 256.0)
        return found | {
            f"buckets of {mb:g} MB": lambda mb=mb: averager_of(shapes, bucket_mb=mb).average for mb in sizes
        }
    if only == "link":
        return found | {name: way for name, way in ours.items() if "shared" not in name and "flat" not in name}
    return found | others | ours


# -------------------------------------------------------------------------------------------------- measuring


def anonymous() -> float:
    """This process's anonymous memory in MB (1e6 bytes)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status has no RssAnon")


def release() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def peak_memory(peak: list[float]) -> Iterator[None]:
    """Appends the highest anonymous memory in MB while the context runs."""
    stop, seen = threading.Event(), [anonymous()]

    def sample() -> None:
        while not stop.wait(0.001):
            seen.append(anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        peak.append(max(*seen, anonymous()))


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


def timed(way: Way) -> float:
    """Seconds on the slowest process."""
    dist.barrier()
    started = time.perf_counter()
    way()
    seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def measure(model: str, repeats: int, only: str, leave_out: str) -> list[dict[str, Any]]:
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


# ------------------------------------------------------------------------------------ behind the next forward


def overlap(model: str, repeats: int, batch: int) -> dict[str, Any]:
    """Seconds of one training step after a boundary: without averaging, averaged before it, averaged behind it."""
    torch.manual_seed(0)
    net = build(model)
    images = torch.randn(batch, 3, 224, 224)
    parameters = list(net.parameters())
    buckets = flat_buckets(parameters, bucket_bytes(None, None))
    averager = Averager(buckets, None, AveragingConfig(shared_memory=False, overlap="next_forward"))
    places = []
    for parameter in parameters:
        number = next(
            i
            for i, bucket in enumerate(buckets)
            if 0 <= parameter.data_ptr() - bucket.data_ptr() < bucket.numel() * bucket.element_size()
        )
        start = (parameter.data_ptr() - buckets[number].data_ptr()) // 4
        places.append((parameter, number, start, start + parameter.numel()))
    averager.overlap_with(net, places, refresh=lambda part: None)

    def train() -> None:
        averager.begin_forward()
        net(images).square().mean().backward()
        averager.finish()
        net.zero_grad()

    def before() -> None:
        averager.average()
        train()

    def behind() -> None:
        averager.start()
        train()

    train()  # the order in which the forward reads is recorded
    behind()
    found = {"nothing": train, "averaging": averager.average, "before": before, "behind": behind}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, way in found.items():
            seconds[name].append(timed(way))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    exposed = median["behind"] - median["nothing"]
    return {
        "model": model,
        "batch": batch,
        "seconds_of_a_step": median["nothing"],
        "seconds_of_an_averaging": median["averaging"],
        "averaged_before_the_step": median["before"],
        "averaged_behind_the_step": median["behind"],
        "hidden_percent": 100 * (1 - exposed / median["averaging"]),
    }


# ---------------------------------------------------------------------------------------------------- running


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    only = "bucket sizes" if arguments.bucket_sizes else "link" if arguments.link else ""
    only = "nothing" if arguments.overlap_only else only
    results: list[dict[str, Any]] = []
    for model in arguments.models:
        found = measure(model, arguments.repeats * (10 if model == "tiny" else 1), only, arguments.leave_out)
        results += found
        if dist.get_rank() == 0:
            show(model, found)
    report: dict[str, Any] = {"facts": facts(arguments), "results": results}
    if arguments.batch:
        report["overlap"] = [overlap(m, max(3, arguments.repeats // 3), arguments.batch) for m in arguments.models]
    if dist.get_rank() == 0:
        for key, value in report.get("overlap", [{}])[0].items():
            print(f"{key}: {value if isinstance(value, str) else round(value, 3)}")
        print(json.dumps(report["facts"]))
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    dist.barrier()
    os._exit(0)  # gloo's threads need not be waited for


def show(model: str, rows: list[dict[str, Any]]) -> None:
    mb = sum(shape.numel() for shape in shapes_of(model)) * 4 / 1e6
    print(f"\n{MODELS[model]}, {mb:.0f} MB in fp32, {rows[0]['processes']} processes")
    print(f"{'way':<42}{'ms':>9}{'ratio':>8}{'lowest':>8}{'highest':>9}{'extra MB':>10}{'sent MB':>9}")
    for row in rows:
        sent = "" if row["sent_mb"] is None else f"{row['sent_mb']:.1f}"
        low, high = row["spread"]
        print(
            f"{row['way']:<42}{row['milliseconds']:>9.1f}{row['ratio']:>8.2f}{low:>8.2f}{high:>9.2f}"
            f"{row['extra_mb']:>10.0f}{sent:>9}",
            flush=True,
        )


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **machine("torch", "accelerate", "timm", "torchvision"),
        "backend": "gloo",
        "repeats": arguments.repeats,
        "link": arguments.link,
        "threads_of_a_process": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--leave-out", default="", help="ways whose names contain this, where memory is short: wire")
    parser.add_argument("--bucket-sizes", action="store_true", help="compare sizes of buckets instead")
    parser.add_argument("--link", help="each process on a host of its own, joined by links of this rate, as 1gbit")
    parser.add_argument("--batch", type=int, default=0, help="also: hide an averaging behind a step of so many images")
    parser.add_argument("--overlap-only", action="store_true", help="with --batch: leave the table out")
    parser.add_argument("--out", help="write the figures as JSON, too")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run(arguments)
    with contextlib.ExitStack() as open_network:
        hosts: list[list[str]] = [[]] * arguments.processes
        master = "127.0.0.1"
        if arguments.link:
            hosts = open_network.enter_context(slow_network(arguments.processes, arguments.link))
            master = address(0)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started = []
        for rank, host in enumerate(hosts):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": arguments.processes,
                "MASTER_ADDR": master,
                "MASTER_PORT": port,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": 1,
            }
            words = [*host, sys.executable, *sys.argv]
            started.append(subprocess.Popen(words, env={**os.environ, **{k: str(v) for k, v in environment.items()}}))
        codes = [process.wait() for process in started]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
