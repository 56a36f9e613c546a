"""An averaging behind a training step: what of it the step does not hide, on a CPU that also computes.

The window is what an averaging has before somebody waits for it: with next_forward the forward, where layer after layer
asks for its parameters; with delayed and d = 1 the whole step. Two figures say what is left of the averaging's seconds:

    waited   the training thread stood still until pieces arrived; what remains of 100 % is hidden
    longer   the step took so much longer than alone. It holds what was waited, and the CPU time that gloo's copies and
             sums, the network and the threads' change take from the step: hidden nowhere, if the step has all cores

`cpu` is the averaging's own CPU time, on this rank, as a part of its seconds: with one core a rank, at least that much
makes the step longer. Everything is the slowest rank's, and the difference of neighbours in time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.averaging.ways import build
from benchmarks.timing import timed
from qsr_engine.averaging import Averager, bucket_bytes, flat_buckets, place_in
from qsr_engine.averaging.background import Background
from qsr_engine.config.averaging import AveragingConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "next_forward, fp32": {"overlap": "next_forward"},
    "next_forward, bf16": {"overlap": "next_forward", "wire_dtype": "bf16"},
    "delayed, d = 1, fp32": {"overlap": "delayed", "delay_steps": 1},
}


class Step:
    """A training step of a model, forward and backward, and the averaging that goes on beside it."""

    def __init__(self, model: str, batch: int, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = build(model)
        self.images = torch.randn(batch, 3, 224, 224)
        self.delayed = options["overlap"] == "delayed"
        buckets = flat_buckets(list(self.net.parameters()), bucket_bytes(None, None))
        self.averager = Averager(buckets, None, AveragingConfig(shared_memory=False, **options))
        self.forward = 0.0  # seconds of the last one
        self.waited = 0.0  # seconds, so far
        _count_waits(self)
        if not self.delayed:
            places = [(parameter, *place_in(parameter, buckets)) for parameter in self.net.parameters()]
            self.averager.overlap_with(self.net, places, refresh=lambda part: None)

    def nothing(self) -> None:
        self.averager.begin_forward()
        started = time.perf_counter()
        loss = self.net(self.images).square().mean()
        self.forward = time.perf_counter() - started
        loss.backward()
        if self.delayed and self.averager.in_background:
            self.averager.apply()
        self.averager.finish()
        self.net.zero_grad()

    def averaging(self) -> None:
        if self.delayed:
            self.averager.snapshot()
            self.averager.apply()
        else:
            self.averager.average()

    def behind(self) -> None:
        self.averager.snapshot() if self.delayed else self.averager.start()
        self.nothing()


def _count_waits(step: Step) -> None:
    """Let every wait of the training thread for the background be counted."""
    plain = Background.wait

    def wait(self: Background, index: int) -> None:
        started = time.perf_counter()
        plain(self, index)
        step.waited += time.perf_counter() - started

    Background.wait = wait  # type: ignore[method-assign]


def overlap(model: str, repeats: int, batch: int, setting: str) -> dict[str, Any]:
    """Of one setting: seconds of a step alone, of an averaging alone, and of both beside one another."""
    dist.init_process_group("gloo")
    step = Step(model, batch, SETTINGS[setting])
    step.nothing()  # the order in which the forward reads is recorded
    step.behind()
    ways: dict[str, Callable[[], None]] = {"step": step.nothing, "averaging": step.averaging, "both": step.behind}
    raw: dict[str, list[float]] = {name: [] for name in (*ways, "waited", "window", "cpu")}
    for _ in range(repeats):
        for name, way in ways.items():
            waited, cpu = step.waited, time.process_time()
            raw[name].append(timed(way))
            if name == "averaging":
                raw["cpu"].append(_slowest(time.process_time() - cpu))
            if name == "both":
                raw["waited"].append(_slowest(step.waited - waited))
        raw["window"].append(raw["step"][-1] if step.delayed else _slowest(step.forward))
    step.averager.close()
    median = {name: statistics.median(values) for name, values in raw.items()}
    longer = statistics.median(both - alone for both, alone in zip(raw["both"], raw["step"], strict=True))
    part = 100 / median["averaging"]
    return {
        "model": model,
        "images": batch,
        "setting": setting,
        **{name: median[name] for name in ("step", "window", "averaging", "both")},
        "waited, %": part * median["waited"],
        "longer, %": part * longer,
        "cpu, %": part * median["cpu"],
        "raw": raw,
    }


def _slowest(seconds: float) -> float:
    told = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return told.item()
