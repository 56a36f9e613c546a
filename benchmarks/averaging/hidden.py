"""An averaging behind the next forward: seconds of the training step after a boundary."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.averaging.ways import build
from benchmarks.timing import timed
from qsr_engine.averaging import Averager, bucket_bytes, flat_buckets, place_in
from qsr_engine.config.qsr import AveragingConfig


def overlap(model: str, repeats: int, batch: int) -> dict[str, Any]:
    """Seconds of one training step after a boundary: without averaging, averaged before it, averaged behind it."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = build(model)
    images = torch.randn(batch, 3, 224, 224)
    buckets = flat_buckets(list(net.parameters()), bucket_bytes(None, None))
    averager = Averager(buckets, None, AveragingConfig(shared_memory=False, overlap="next_forward"))
    places = [(parameter, *place_in(parameter, buckets)) for parameter in net.parameters()]
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
