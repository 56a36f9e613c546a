"""What do local steps on PyTorch's own sharding (`initialize_fsdp`) save on a slow network, and what do they cost?

    sudo .venv/bin/python benchmarks/fsdp.py                              # all parts, workers of 1 and 2 ranks
    sudo .venv/bin/python benchmarks/fsdp.py --parts A --link 100mbit --worker-sizes 2
    python benchmarks/fsdp.py --parts B,C --repeats-b 300 --json out.json   # needs no root

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
engine counts (local_steps.bytes_sent), and for HSDP 2 (K - 1) / K times the gradient shards, of all ranks of a host.
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
import contextlib
import copy
import dataclasses
import gc
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import qsr_engine
from qsr_engine.averaging import ring_bytes

sys.path.insert(0, str(Path(__file__).parent))
from hardware import machine
from slow_network import address, bytes_sent, slow_network

HOSTS = 2
HSDP, ALONE = "HSDP by hand", "no exchange"
PLAIN, PLAIN_BF16 = "plain loop", "plain loop, bf16"
LEARNING_RATE = 1e-4
LONG = 10**6  # steps of a round that outlasts the measurement
BYTES_A_SECOND = {"kbit": 125, "mbit": 125_000, "gbit": 125_000_000}
Row = dict[str, Any]
Step = Callable[[], list[float]]  # seconds of forward, backward, and update with clipping


@dataclasses.dataclass
class Variant:
    """Something that takes steps; a block of them is whole rounds."""

    step: Step
    block: int
    computed: Callable[[], int]  # bytes that this rank should have sent to other workers so far


# ------------------------------------------------------------------------------------------ models and engines


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4} if name.startswith("vit") else {}
    model: nn.Module = timm.create_model(name, num_classes=10, **sizes)
    return model.train()


def blocks_of(model: Any) -> list[nn.Module]:
    """As a user of fully_shard lists them: a transformer's blocks, a ResNet's stages."""
    return list(model.blocks) if hasattr(model, "blocks") else [getattr(model, f"layer{i}") for i in range(1, 5)]


def make_data(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(dist.get_rank())
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def make_optimizer(parameters: Iterable[Tensor], fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05, fused=fused)


def make_sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def make_engine(model: nn.Module, arguments: argparse.Namespace, qsr: dict[str, Any], **config: Any) -> Any:
    optimizer = config.pop("optimizer", partial(make_optimizer, fused=arguments.fused))
    lr = {"schedule": "constant", "peak": LEARNING_RATE}
    return qsr_engine.initialize_fsdp(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": arguments.batch,
            "gradient_clipping": arguments.clip,
            "qsr": {"total_steps": LONG, "lr": lr, **qsr},
            **config,
        },
    )


def engine_step(engine: Any, images: Tensor, labels: Tensor) -> Step:
    def step() -> list[float]:
        started = time.perf_counter()
        loss = F.cross_entropy(engine(images).float(), labels)
        forward = time.perf_counter()
        engine.backward(loss)
        backward = time.perf_counter()
        engine.step()
        return [forward - started, backward - forward, time.perf_counter() - backward]

    return step


def loop_step(model: nn.Module, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> Step:
    """A training loop as its users write it, for a plain model and for one that fully_shard has changed."""
    optimizer = make_optimizer(model.parameters(), arguments.fused)

    def step() -> list[float]:
        started = time.perf_counter()
        loss = F.cross_entropy(model(images).float(), labels)
        forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = time.perf_counter()
        if arguments.clip:
            nn.utils.clip_grad_norm_(model.parameters(), arguments.clip)
        optimizer.step()
        optimizer.zero_grad()
        return [forward - started, backward - forward, time.perf_counter() - backward]

    return step


def bf16_step(model: nn.Module, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> Step:
    """The plain loop in bf16 with fp32 masters."""
    low = copy.deepcopy(model).bfloat16()
    masters: list[Tensor] = list(model.parameters())
    copies: list[Tensor] = list(low.parameters())
    optimizer, images = make_optimizer(masters, arguments.fused), images.bfloat16()

    def step() -> list[float]:
        started = time.perf_counter()
        loss = F.cross_entropy(low(images).float(), labels)
        forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        for master, lower in zip(masters, copies, strict=True):
            assert lower.grad is not None
            master.grad, lower.grad = lower.grad.float(), None
        backward = time.perf_counter()
        if arguments.clip:
            nn.utils.clip_grad_norm_(masters, arguments.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(copies, masters)
        return [forward - started, backward - forward, time.perf_counter() - backward]

    return step


def shard_by_hand(model: nn.Module, mesh: DeviceMesh, bf16: bool = False) -> nn.Module:
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = low if bf16 else MixedPrecisionPolicy()
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


# ------------------------------------------------------------------------------- A: beside HSDP, on a network


def hsdp_variant(model: nn.Module, worker_size: int, arguments: argparse.Namespace) -> Variant:
    mesh = init_device_mesh("cpu", (HOSTS, worker_size), mesh_dim_names=("replicate", "shard"))
    shard_by_hand(model, mesh)
    shards: list[Any] = list(model.parameters())
    sent = ring_bytes(sum(shard.to_local().numel() * 4 for shard in shards), HOSTS)
    take, steps = loop_step(model, *make_data(arguments.batch), arguments), [0]

    def step() -> list[float]:
        steps[0] += 1
        return take()

    return Variant(step, arguments.block, lambda: sent * steps[0])


def engine_variant(model: nn.Module, worker_size: int, arguments: argparse.Namespace, block: int, qsr: Row) -> Variant:
    engine = make_engine(model, arguments, {"worker_size": worker_size, **qsr})
    return Variant(engine_step(engine, *make_data(arguments.batch)), block, lambda: int(engine.local_steps.bytes_sent))


def network_variants(worker_size: int, arguments: argparse.Namespace) -> dict[str, Variant]:
    block, bf16 = arguments.block, {"wire_dtype": "bf16"}
    engines: dict[str, tuple[int, Row]] = {
        "parallel": (block, {"strategy": "parallel"}),
        "constant, H = 4": (8, {"strategy": "constant", "h_base": 4}),
        "constant, H = 16": (16, {"strategy": "constant", "h_base": 16}),
        "constant, H = 4, bf16": (8, {"strategy": "constant", "h_base": 4, "averaging": bf16}),
        ALONE: (block, {"strategy": "constant", "h_base": LONG}),
    }
    found = {HSDP: hsdp_variant(make_model(arguments.model), worker_size, arguments)}
    for name, (steps, qsr) in engines.items():
        found[name] = engine_variant(make_model(arguments.model), worker_size, arguments, steps, qsr)
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


def network_job(arguments: argparse.Namespace, job: Row) -> list[Row]:
    """One row a variant, of one link and one size of workers."""
    worker_size, repeats = job["worker_size"], arguments.repeats
    dist.init_process_group("gloo")
    variants = network_variants(worker_size, arguments)
    order, draw = list(variants), random.Random(arguments.seed)
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
    counted /= HOSTS
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


def show_network(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(f"\n### {first['link']}, worker_size {first['worker_size']}\n")
    lines = []
    for row in rows:
        port, computed = row["port_mb"], row["computed_mb"]
        above = f"{100 * (port / computed - 1):+.1f} %" if computed else ""
        lines.append(
            [
                row["variant"],
                f"{row['milliseconds']:.0f}",
                ratio_of(row, HSDP),
                f"{port:.2f}",
                f"{computed:.2f}",
                above,
                f"{row['loopback_mb']:.1f}",
                f"{row['limit_ms']:.0f}",
                f"{row['milliseconds'] / row['limit_ms']:.2f}",
            ]
        )
    heads = "variant|ms a step|ratio to HSDP|MB a step, port|computed|difference|MB, loopback|limit, ms|of the limit"
    table(heads, lines)


# ------------------------------------------------------------------------------------ B: a worker of one rank


def single_variants(arguments: argparse.Namespace) -> dict[str, Step]:
    dist.init_process_group("gloo")
    images, labels = make_data(arguments.batch)
    mesh = init_device_mesh("cpu", (1,))
    silent = {"strategy": "constant", "h_base": LONG}
    bf16 = {"enabled": True}

    def model() -> nn.Module:
        return make_model(arguments.model)

    made: dict[str, Callable[[], Step]] = {
        PLAIN: lambda: loop_step(model(), images, labels, arguments),
        f"{PLAIN}, again": lambda: loop_step(model(), images, labels, arguments),
        "engine": lambda: engine_step(make_engine(model(), arguments, silent), images, labels),
        "fully_shard": lambda: loop_step(shard_by_hand(model(), mesh), images, labels, arguments),
        PLAIN_BF16: lambda: bf16_step(model(), images, labels, arguments),
        f"{PLAIN_BF16}, again": lambda: bf16_step(model(), images, labels, arguments),
        "engine, bf16": lambda: engine_step(make_engine(model(), arguments, silent, bf16=bf16), images, labels),
        "fully_shard, bf16": lambda: loop_step(shard_by_hand(model(), mesh, bf16=True), images, labels, arguments),
    }
    names = list(made)
    random.Random(arguments.seed).shuffle(names)  # so that no variant is always the first one to get memory
    steps = {name: made[name]() for name in names}
    return {name: steps[name] for name in made}


def single_job(arguments: argparse.Namespace, job: Row) -> list[Row]:
    steps = single_variants(arguments)
    order, draw = list(steps), random.Random(arguments.seed)
    phases = torch.zeros(len(steps), arguments.repeats_b, 3, dtype=torch.float64)
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


def show_single(rows: Sequence[Row]) -> None:
    print("\n### A worker of one rank\n")
    lines = []
    for row in rows:
        times = (row["milliseconds"], row["lowest"], *row["phases"])
        baseline = row["baseline"]
        lines.append([row["variant"], *(f"{ms:.1f}" for ms in times), ratio_of(row, baseline), baseline])
    table("variant|ms a step|lowest|forward|backward|clip and update|ratio|beside", lines)


# --------------------------------------------------------------------------------------- C: memory of a boundary


def memory_job(arguments: argparse.Namespace, job: Row) -> list[Row]:
    """One row for every way of averaging and optimizer; the largest figures of all ranks."""
    rows = []
    optimizers = {"AdamW": make_optimizer, "SGD": make_sgd}
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
    engine = make_engine(make_model(arguments.memory_model), arguments, qsr, optimizer=optimizer)
    images, labels = make_data(1)
    inside, ends, alone = [], [], []
    advance = engine.local_steps.advance

    def marked() -> Any:
        with torch.profiler.record_function("boundary"):
            return advance()

    engine.local_steps.advance = marked
    while not engine.local_steps.finished:
        engine.backward(F.cross_entropy(engine(images), labels))
        with torch.profiler.profile(profile_memory=True) as profiler:
            boundary = engine.step()
        most, above = most_memory(profiler)
        if boundary:
            ends.append(most)
            alone.append(above)
        elif engine.local_steps.step > 1:  # in which the optimizer makes its state
            inside.append(most)
    return {
        "way": engine.local_steps.averager.way,
        "parameters": sum(master.numel() * 4 for master in engine._masters.held()),
        "inside": max(inside),
        "first": ends[0] - max(inside),
        "later": max(ends[1:]) - max(inside),
        "alone_first": alone[0],
        "alone_later": max(alone[1:]),
    }


def most_memory(profiler: Any) -> tuple[int, int]:
    """The most bytes that torch held above the beginning of the step; and, inside the boundary, above its beginning."""
    events = profiler.profiler.kineto_results.events()
    marks = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "boundary"]
    begin, end = marks[0]
    most = kept = at_begin = above = 0
    for when, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        kept += change
        most = max(most, kept)
        if when < begin:
            at_begin = kept
        elif when <= end:
            above = max(above, kept - at_begin)
    return most, above


def show_memory(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(f"\n### Memory of a boundary, worker_size {first['worker_size']}, buckets of {first['bucket_mb']:g} MB\n")
    size = first["bucket_mb"] * 1e6
    keys = ("first", "later", "alone_first", "alone_later")
    lines = [
        [
            row["optimizer"],
            f"{row['wire_dtype']}, shared memory {'on' if row['shared_memory'] else 'off'} ({row['way']})",
            f"{row['parameters'] / size:.1f}",
            f"{row['inside'] / size:.1f}",
            *(f"{row[key] / size:.2f}" for key in keys),
        ]
        for row in rows
    ]
    heads = "a rank's parameters|a step inside a round|the first end of a round beside it|later ones"
    table(f"optimizer|averaging|{heads}|by itself, the first|later ones", lines)


# -------------------------------------------------------------------------------------------------- figures


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """A collection of garbage would fall on whichever variant runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def figures(times: Tensor, baseline: Tensor, draws: int = 4000) -> Row:
    """The median, and the ratio as said above with its 95 % interval."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(times), (draws, len(times)), generator=generator)
    chosen[0] = torch.arange(len(times))
    ratios = (times / baseline)[chosen].quantile(0.5, 1)  # which interpolates, as statistics.median does
    quantiles = torch.tensor([0.025, 0.975], dtype=ratios.dtype)
    return {
        "milliseconds": times.quantile(0.5).item(),
        "lowest": times.min().item(),
        "highest": times.max().item(),
        "ratio": ratios[0].item(),
        "interval": ratios[1:].quantile(quantiles).tolist(),
        "all": [round(value, 2) for value in times.tolist()],
    }


def ratio_of(row: Row, baseline: str) -> str:
    low, high = row["interval"]
    return "1" if row["variant"] == baseline else f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def table(heads: str, lines: Iterable[Sequence[str]]) -> None:
    names = heads.split("|")
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join(["---"] * len(names)) + " |")
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


def facts(arguments: argparse.Namespace) -> Row:
    return {
        **machine("torch", "timm"),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_at_the_end": [round(load, 1) for load in os.getloadavg()],
        "kernel": platform.release(),
        "backend": "gloo",
        "threads_of_a_process": 1,
        "parameters": sum(p.numel() for p in make_model(arguments.model).parameters()),
        "parameters_of_memory_model": sum(p.numel() for p in make_model(arguments.memory_model).parameters()),
        **vars(arguments),
    }


# --------------------------------------------------------------------------------------------------- running

JOBS: dict[str, Callable[[argparse.Namespace, Row], list[Row]]] = {"A": network_job, "B": single_job, "C": memory_job}
SHOW: dict[str, Callable[[Sequence[Row]], None]] = {"A": show_network, "B": show_single, "C": show_memory}


def run(arguments: argparse.Namespace) -> None:
    """One process of a job; rank 0 writes the rows."""
    torch.set_num_threads(1)
    job = json.loads(os.environ["QSR_BENCHMARK_JOB"])
    rows = JOBS[job["part"]](arguments, job)
    if dist.get_rank() == 0:
        Path(os.environ["QSR_BENCHMARK_ROWS"]).write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # gloo's threads need not be waited for


def launch(job: Row, hosts: Sequence[list[str]], processes: int, master: str, seconds: float) -> list[Row]:
    """Run a job on some processes of each host (the words before a command that run it there); its rows.

    Raises:
        RuntimeError: a process failed, or the time ran out.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "WORLD_SIZE": len(hosts) * processes,
            "MASTER_ADDR": master,
            "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": 1,
            "KINETO_LOG_LEVEL": 99,
            "QSR_BENCHMARK_JOB": json.dumps(job),
            "QSR_BENCHMARK_ROWS": f"{folder}/rows.json",
        }
        try:
            for rank in range(len(hosts) * processes):
                environment = {**shared, "RANK": rank, "LOCAL_RANK": rank % processes}
                words = [*hosts[rank // processes], sys.executable, *sys.argv]
                added = {key: str(value) for key, value in environment.items()}
                started.append(subprocess.Popen(words, env={**os.environ, **added}))
            wait_for(started, time.monotonic() + seconds)
        finally:
            for process in started:
                process.kill()
                process.wait()
        rows: list[Row] = json.loads(Path(f"{folder}/rows.json").read_text(encoding="utf-8"))
    return rows


def wait_for(started: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    while any(process.poll() is None for process in started):
        if any(process.poll() not in (None, 0) for process in started):
            raise RuntimeError("a process failed; its message stands above")
        if time.monotonic() > deadline:
            raise RuntimeError("the processes took longer than --timeout")
        time.sleep(0.2)
    if any(process.returncode for process in started):
        raise RuntimeError("a process failed; its message stands above")


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
    size = job.get("worker_size", 1)
    if job["part"] != "A":
        return launch(job, [[]], 1 if job["part"] == "B" else HOSTS * size, "127.0.0.1", arguments.timeout)
    with slow_network(HOSTS, None if job["link"] == "none" else job["link"]) as hosts:
        return launch(job, hosts, size, address(0), arguments.timeout)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="A,B,C")
    parser.add_argument("--link", nargs="+", default=["100mbit", "1gbit", "none"], help="A: rates of the hosts' ports")
    parser.add_argument("--worker-sizes", type=int, nargs="+", default=[2, 1], help="A: processes a host; C")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="A and B: a ViT or ResNet of timm's, at 32 px")
    parser.add_argument("--memory-model", default="vit_small_patch16_224", help="C")
    parser.add_argument("--bucket-mb", type=float, default=4.0, help="C: averaging.bucket_mb")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--clip", type=float, default=1.0, help="gradient clipping; 0 for none")
    parser.add_argument("--fused", action="store_true", help="A and B: torch's fused AdamW")
    parser.add_argument("--repeats", type=int, default=8, help="A")
    parser.add_argument("--repeats-b", type=int, default=100, help="B")
    parser.add_argument("--block", type=int, default=4, help="A: steps of a block where every step is a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900, help="seconds of one table")
    parser.add_argument("--json", help="write the figures as JSON, too")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if "QSR_BENCHMARK_JOB" in os.environ:
        run(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts and processes go
    results: list[Row] = []
    try:
        for job in jobs_of(arguments):
            rows = run_job(job, arguments)
            results += rows
            SHOW[job["part"]](rows)
    finally:
        if results:
            report = {"facts": facts(arguments), "results": results}
            print("\n" + json.dumps(report["facts"]))
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
