"""What runs on the hosts: all runs of one launch, one after another in every rank.

`deepspeed --hostfile ... --module benchmarks.wallclock.runs OUT MODEL ...`, after which OUT has what every rank found.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import qsr_engine
from benchmarks import slow_network
from benchmarks.wallclock.settings import DDP_BUCKET_MB, GRADIENT_STEPS, GRADIENTS, IMAGE, LOCAL, LR, MODELS, qsr_block

Data = tuple[Tensor, Tensor]  # pictures and labels


def measure(out: Path, models: list[str]) -> None:
    """All runs of all models; rank 0 writes what came out."""
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    found: list[dict[str, Any]] = []
    for name in models:
        spec = MODELS[name]
        generator = torch.Generator().manual_seed(dist.get_rank())
        images = torch.randn(spec["batch"], 3, IMAGE, IMAGE, generator=generator)
        labels = torch.randint(100, (spec["batch"],), generator=generator)
        _engine(spec, "alone", (images, labels))  # warms up: threads, memory, connections
        for strategy in (*LOCAL, *GRADIENTS):
            one = _ddp if strategy == "ddp" else _engine
            found.append({"model": name, "strategy": strategy, **one(spec, strategy, (images, labels))})
        found[-1]["all_reduce"] = _all_reduces(found[-1]["parameter_bytes"])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(gathered))
    dist.barrier()
    dist.destroy_process_group()


def _model(spec: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(spec["name"], **spec["options"])  # type: ignore[no-any-return]


def _engine(spec: dict[str, Any], strategy: str, batch: Data) -> dict[str, Any]:
    """A run of qsr_engine.initialize, which is DeepSpeed's own engine under `parallel`."""
    config = {
        "train_micro_batch_size_per_gpu": spec["batch"],
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.05}},
        "qsr": qsr_block(strategy),
    }
    model = _model(spec)
    engine, *_ = qsr_engine.initialize(model=model, model_parameters=model.parameters(), config=config)
    state = engine.local_steps

    def step() -> float:
        """Seconds of it that went into an averaging."""
        before = state.costs.seconds_averaging
        engine.backward(F.cross_entropy(engine(batch[0]), batch[1]))
        engine.step()
        return float(state.costs.seconds_averaging - before)

    timed = _time(step, state.qsr.total_steps)
    payload = sum(parameter.numel() * 4 for parameter in model.parameters())
    figures = {"computed": state.bytes_sent, "averagings": state.averagings, "waiting": state.costs.seconds_waiting}
    engine.destroy()
    return {**timed, **figures, "parameter_bytes": payload}


def _ddp(spec: dict[str, Any], strategy: str, batch: Data) -> dict[str, Any]:
    """torch's own data parallel, with the same model, optimizer and batches."""
    model = DistributedDataParallel(_model(spec), bucket_cap_mb=DDP_BUCKET_MB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR["min"], weight_decay=0.05)

    def step() -> float:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return 0.0

    timed = _time(step, GRADIENT_STEPS)
    payload = sum(parameter.numel() * 4 for parameter in model.parameters())
    buffers = 0 if dist.get_rank() else sum(b.numel() * b.element_size() for b in model.buffers())
    workers = dist.get_world_size()
    sent = GRADIENT_STEPS * (2 * (workers - 1) / workers * payload + buffers)  # rank 0 tells its buffers at every step
    return {**timed, "computed": sent, "averagings": GRADIENT_STEPS, "waiting": None, "parameter_bytes": payload}


def _time(step: Callable[[], float], steps: int) -> dict[str, Any]:
    """Seconds of a run, of the compute of each step, and of its averagings; and what this host's port sent."""
    dist.barrier()
    sent, started = slow_network.bytes_sent(), time.perf_counter()
    compute, averaging = [], 0.0
    for _ in range(steps):
        before = time.perf_counter()
        within = step()
        compute.append(time.perf_counter() - before - within)
        averaging += within
    seconds = time.perf_counter() - started
    dist.barrier()
    after = slow_network.bytes_sent()
    counted = None if sent is None or after is None else after - sent
    return {"seconds": seconds, "compute": compute, "averaging": averaging, "port": counted, "steps": steps}


def _all_reduces(payload: int) -> list[float]:
    """Seconds of a few all-reduces of a flat tensor of the model's bytes: what the network and gloo give.

    A pause before each, as a run has steps: a link that is held to a rate lets a burst of 1 MB through after it.
    """
    flat, found = torch.zeros(payload // 4), []
    for _ in range(5):
        time.sleep(0.2)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(flat)
        found.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    made = argparse.ArgumentParser()
    made.add_argument("out", type=Path)
    made.add_argument("models", nargs="+", choices=list(MODELS))
    made.add_argument("--local_rank", help="what the launcher adds")
    given = made.parse_args()
    measure(given.out, given.models)
