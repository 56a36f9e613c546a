"""A boundary of one rank, beside which a second one is pretended: time, memory, waits of the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.rows import Found, Row, checked, not_run
from qsr_engine.averaging import Averager
from qsr_engine.config.averaging import AveragingConfig
from qsr_engine.local_steps.header import Header, exchange_headers
from tests.support import fsdp_engine, second_rank, training, waits

PART = "boundary"
TIMED = {"in place": {}, "packed": {}, "in place, CUDA graph": {"cuda_graph": True}}
MEMORY, WAITS = "memory of one by itself", "waits of the host"
CHECKS = [*(f"time, {way}" for way in TIMED), MEMORY, WAITS]
BUCKET_MB = 8.0
REPEATS = 15
SMALL = 1000  # elements of each tensor that is packed
PACKED = {"cuda": 1000, "cpu": 50}  # of these


def measure(device: str, megabytes: float) -> list[Row]:
    """Runs in one rank. NCCL on a GPU, gloo on a CPU."""
    on = torch.device(device)
    if on.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on.type == "cuda" else "gloo")
    numel = int(megabytes * 1e6 / 4)
    rows = []
    for way, options in TIMED.items():
        if options and on.type != "cuda":
            rows += not_run(PART, [f"time, {way}"], "needs CUDA")
            continue
        config = AveragingConfig(shared_memory=False, **options)  # type: ignore[arg-type]
        rows.append(checked(PART, f"time, {way}", partial(_time, on, numel, way, config)))
    rows.append(checked(PART, MEMORY, partial(_memory, on, numel)))
    rows.append(checked(PART, WAITS, _waits))
    return rows


def _tensors(device: torch.device, numel: int, way: str) -> list[Tensor]:
    torch.manual_seed(0)
    if way.startswith("in place"):
        return [torch.randn(numel, device=device)]
    return list(torch.randn(PACKED[device.type], SMALL, device=device).unbind())


def whole(averager: Averager) -> Tensor | None:
    """All that a boundary does: finite?, header, averaging, distance."""
    header = Header(1, 1, 0.1, 1, averager.sum_of_squares(), averager.moved())
    met = exchange_headers(header, averager.device)
    averager.average()
    return averager.relative_distance(met.squares, met.ranks)


def _time(device: torch.device, numel: int, way: str, config: AveragingConfig) -> Found:
    """Beside a copy of as many bytes on the device. The values are halved at each averaging, and looked at."""
    tensors = _tensors(device, numel, way)
    source = torch.cat(tensors)
    target = torch.empty_like(source)
    copies = _seconds(device, lambda: target.copy_(source))
    averager = Averager(tensors, None, config)
    with second_rank.of_zeros(averager):
        whole(averager)  # warms up; a graph is captured in the second
        exact = torch.equal(torch.cat(tensors), source / 2)
        boundaries = _seconds(device, lambda: whole(averager))
        exact &= torch.equal(torch.cat(tensors), source * 2.0 ** -(REPEATS + 3))
    reducer = averager.way
    averager.close()
    copy, boundary = statistics.median(copies), statistics.median(boundaries)
    figures = {
        "way": reducer,
        "bytes": source.nbytes,
        "copy_seconds": copies,
        "boundary_seconds": boundaries,
        "copy_gb_per_second": 2 * source.nbytes / copy / 1e9,
        "ratio": boundary / copy,
    }
    words = f"{reducer}, {source.nbytes / 1e6:.0f} MB: {1e3 * boundary:.2f} ms, {boundary / copy:.2f} copies"
    return exact, f"{words} ({figures['copy_gb_per_second']:.0f} GB/s read and written)", figures


def _seconds(device: torch.device, way: Callable[[], object]) -> list[float]:
    """Of each run, after two that are not counted; the device has done its work when a clock is read."""
    found = []
    for _ in range(REPEATS + 2):
        _await(device)
        started = time.perf_counter()
        way()
        _await(device)
        found.append(round(time.perf_counter() - started, 7))
    return found[2:]


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device, numel: int) -> Found:
    """The most that torch holds above the parameters: large ones are averaged where they are, small ones packed."""
    tensors = [*_tensors(device, numel, "in place"), *_tensors(device, numel, "packed")]
    averager = Averager(tensors, None, AveragingConfig(shared_memory=False, bucket_mb=BUCKET_MB))
    with second_rank.of_zeros(averager):
        most = _most(device, lambda: whole(averager))
    limit, held = 2 * BUCKET_MB * 1e6 + 1e6, sum(tensor.nbytes for tensor in tensors)
    words = f"{most / 1e6:.2f} MB beside {held / 1e6:.0f} MB; at most two buckets of {BUCKET_MB:g} MB"
    return 0 < most <= limit, words, {"bytes": most, "limit": limit, "parameters": held}


def _most(device: torch.device, action: Callable[[], object]) -> int:
    if device.type != "cuda":
        return training.memory_of(action)[1]
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _waits() -> Found:
    """Of each boundary in a run of the FSDP engine."""
    engine = fsdp_engine.start(training.QSR, model=waits.normed())
    with waits.at_boundaries() as found, second_rank.of_zeros(engine.local_steps.averager):
        while not engine.local_steps.finished:
            fsdp_engine.take_step(engine)
    engine.destroy()
    calls = [seen.total() - seen["warned"] for seen in found]
    warned = [seen["warned"] for seen in found]
    good = bool(calls) and set(calls) == {1} and max(warned) <= 1
    words = f"{calls} at {len(calls)} boundaries by the calls made, {warned} by torch's own count"
    return good, words, {"calls": calls, "warned": warned, "names": [dict(seen) for seen in found]}
