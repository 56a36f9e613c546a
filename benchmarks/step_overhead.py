"""What does a step between boundaries cost beside the same DeepSpeed engine's step with gradient reduction off?

    python benchmarks/step_overhead.py                                # ViT-Tiny at 32 px; stages 0 and 1
    python benchmarks/step_overhead.py --cases stage1-bf16 --repeats 300
    python benchmarks/step_overhead.py --set averaging.shared_memory=false

Every process holds all variants. In each repetition every variant takes one whole step (forward, loss, backward,
update) with the same data, in an order drawn anew each time and the same on every process. A barrier, outside the
clock, precedes every step, so that the processes run the same variant at the same time.

    bare PyTorch              the module and the optimizer, with torch's own clipping
    DeepSpeed, reduction off  the baseline, see below; `again` is a second engine like it, to show what noise makes of 1
    DeepSpeed, one rank       as it comes, in a data-parallel group of this rank alone: it reduces over one rank
    qsr_engine                worker_size 1, a period that outlasts the measurement
    qsr_engine, reducing      the same, with DeepSpeed's reduction over one rank left in
    DeepSpeed, data parallel  deepspeed.initialize as it is, over all processes; for reference

The baseline is the strictest that there is: nothing of the reduction is left. Stage 0: `enable_backward_allreduce` is
False. ZeRO-1 has no such switch, and over two ranks each would update half of the masters, which a worker of one rank
cannot. So DeepSpeed gets a data-parallel group of this rank alone, and the optimizer's method that reduces a gradient
at the end of a backward does nothing; the gradients are where it would have left them. At either stage, all collectives
that remain (the norm for clipping, ZeRO's gathering of parameters) return at once and move nothing.

The ratio of a variant is 1 + median over repetitions of (its milliseconds - the baseline's) / median of the baseline's;
a repetition's value is the mean over the processes. In brackets: 95 %, by bootstrap over repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import timm
import torch
import torch.distributed as dist
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.utils import groups as deepspeed_groups
from hardware import machine
from torch import Tensor, nn
from torch.nn import functional as F

import qsr_engine
from qsr_engine.engines.deepspeed.groups import WorkerGroups

CASES: dict[str, dict[str, Any]] = {
    "stage0-fp32": {},
    "stage1-fp32": {"zero_optimization": {"stage": 1}},
    "stage1-bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}
BASELINE = "DeepSpeed, reduction off"
PHASES = ("forward", "backward", "update")
LEARNING_RATE = 1e-4
Step = Callable[[Tensor, Tensor], list[float]]  # seconds of each phase


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)


class Silence:
    """In place of DeepSpeed's communication backend: collectives over one rank, which have nothing to do."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def all_reduce(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the sum over one rank is in place already."""

    def all_gather_into_tensor(self, output_tensor: Tensor, input_tensor: Tensor, **kwargs: Any) -> None:
        if output_tensor.data_ptr() != input_tensor.data_ptr():
            output_tensor.copy_(input_tensor)


@contextlib.contextmanager
def deepspeed_uses(groups: WorkerGroups | None, silent: bool) -> Iterator[None]:
    before = deepspeed_groups.mpu, deepspeed_comm.cdb
    deepspeed_groups.mpu = groups
    if silent:
        deepspeed_comm.cdb = Silence(deepspeed_comm.cdb)
    try:
        yield
    finally:
        deepspeed_groups.mpu, deepspeed_comm.cdb = before


# ---------------------------------------------------------------------------------------------------- variants


def bare(model: nn.Module, case: str, clip: float) -> Step:
    if "bf16" in case:
        model.bfloat16()
    optimizer = optimizer_of(model.parameters())

    def step(images: Tensor, labels: Tensor) -> list[float]:
        started = time.perf_counter()
        loss = F.cross_entropy(model(images), labels)
        forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = time.perf_counter()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return [forward - started, backward - forward, time.perf_counter() - backward]

    return step


def engine_step(engine: Any, groups: WorkerGroups | None = None, silent: bool = False) -> Step:
    def step(images: Tensor, labels: Tensor) -> list[float]:
        with deepspeed_uses(groups, silent):
            started = time.perf_counter()
            loss = F.cross_entropy(engine(images), labels)
            forward = time.perf_counter()
            engine.backward(loss)
            backward = time.perf_counter()
            engine.step()
            return [forward - started, backward - forward, time.perf_counter() - backward]

    return step


def plain(model: nn.Module, config: dict[str, Any], groups: WorkerGroups | None = None, off: bool = False) -> Step:
    with deepspeed_uses(groups, silent=False):
        engine = deepspeed.initialize(
            model=model, optimizer=optimizer_of(model.parameters()), config=config, mpu=groups
        )[0]
    if off and engine.zero_optimization():
        engine.optimizer.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None
    elif off:
        engine.enable_backward_allreduce = False
    return engine_step(engine, groups, silent=off)


def local(model: nn.Module, config: dict[str, Any], averaging: dict[str, Any], reducing: bool = False) -> Step:
    qsr = {
        "strategy": "constant",
        "h_base": 10**6,
        "total_steps": 10**6,
        "lr": {"schedule": "constant", "peak": LEARNING_RATE},
        "averaging": averaging,
    }
    engine = qsr_engine.initialize(
        model=model, optimizer=partial(optimizer_of), config={**config, "train_batch_size": "auto", "qsr": qsr}
    )[0]
    if reducing:
        engine.enable_backward_allreduce = True
        engine.optimizer.__dict__.pop("reduce_ready_partitions_and_remove_grads", None)
    return engine_step(engine)


def variants(case: str, arguments: argparse.Namespace) -> dict[str, Step]:
    config = {
        "train_micro_batch_size_per_gpu": arguments.batch,
        "gradient_clipping": arguments.clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        **CASES[case],
    }
    parts = (part.removeprefix("averaging.").split("=") for part in arguments.set)
    averaging = {key: json.loads(value) for key, value in parts}
    alone = WorkerGroups.make(1)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(  # type: ignore[no-any-return]
            arguments.model, img_size=32, patch_size=4, num_classes=10
        ).train()

    made: dict[str, Callable[[], Step]] = {
        "bare PyTorch": lambda: bare(model(), case, arguments.clip),
        BASELINE: lambda: plain(model(), config, alone, off=True),
        f"{BASELINE}, again": lambda: plain(model(), config, alone, off=True),
        "DeepSpeed, one rank": lambda: plain(model(), config, alone),
        "qsr_engine": lambda: local(model(), config, averaging),
        "qsr_engine, reducing": lambda: local(model(), config, averaging, reducing=True),
        "DeepSpeed, data parallel": lambda: plain(model(), config),
    }
    names = [name for name in made if not arguments.only or name == BASELINE or any(w in name for w in arguments.only)]
    # Drawn, so that no variant is always the first one to get memory.
    random.Random(arguments.seed).shuffle(names)
    steps = {name: made[name]() for name in names}
    return {name: steps[name] for name in made if name in steps}


# -------------------------------------------------------------------------------------------------- measurement


def measure(case: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a variant; the same on every process."""
    steps = variants(case, arguments)
    torch.manual_seed(dist.get_rank())
    images = torch.randn(arguments.batch, 3, 32, 32, dtype=torch.bfloat16 if "bf16" in case else torch.float32)
    labels = torch.randint(10, (arguments.batch,))
    order, draw = list(steps), random.Random(arguments.seed)
    seconds = torch.zeros(len(steps), arguments.repeats, len(PHASES))
    gc.collect()
    gc.disable()  # a collection would fall on whichever variant runs
    for repetition in range(-arguments.warmup, arguments.repeats):
        draw.shuffle(order)
        for name in order:
            dist.barrier()
            taken = steps[name](images, labels)
            if repetition >= 0:
                seconds[list(steps).index(name), repetition] = torch.tensor(taken)
        if repetition % 50 == 0:
            gc.collect()
    gc.enable()
    dist.all_reduce(seconds)
    milliseconds = seconds / dist.get_world_size() * 1000
    totals = dict(zip(steps, milliseconds.sum(2), strict=True))
    rows = []
    for name, phases in zip(steps, milliseconds, strict=True):
        ratio, low, high = compare(totals[name], totals[BASELINE])
        rows.append(
            {
                "case": case,
                "variant": name,
                "milliseconds": totals[name].median().item(),
                "lowest": totals[name].min().item(),
                "phases": {phase: phases[:, i].median().item() for i, phase in enumerate(PHASES)},
                "ratio": ratio,
                "interval": [low, high],
            }
        )
    return rows


def compare(of: Tensor, baseline: Tensor, draws: int = 4000) -> tuple[float, float, float]:
    """The ratio as said above, and its 95 % interval."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(of), (draws, len(of)), generator=generator)
    chosen[0] = torch.arange(len(of))
    ratios = 1 + (of - baseline)[chosen].median(1).values / baseline[chosen].median(1).values
    low, high = ratios[1:].quantile(torch.tensor([0.025, 0.975])).tolist()
    return ratios[0].item(), low, high


def show(case: str, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    print(
        f"\n{case}, {arguments.model} at 32 px, batch {arguments.batch}, clipping {arguments.clip:g}, "
        f"{dist.get_world_size()} processes, {arguments.repeats} repetitions"
    )
    print(f"{'variant':<34}{'ms':>8}{'lowest':>8}{'forward':>9}{'backward':>10}{'update':>8}{'ratio':>8}")
    for row in rows:
        low, high = row["interval"]
        phases = row["phases"]
        interval = "" if row["variant"] == BASELINE else f"  [{low:.3f}, {high:.3f}]"
        print(
            f"{row['variant']:<34}{row['milliseconds']:>8.1f}{row['lowest']:>8.1f}{phases['forward']:>9.1f}"
            f"{phases['backward']:>10.1f}{phases['update']:>8.1f}{row['ratio']:>8.3f}{interval}",
            flush=True,
        )


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **machine("torch", "deepspeed", "timm"),
        "load": [round(load, 1) for load in os.getloadavg()],
        "backend": "gloo",
        "threads_of_a_process": 1,
        **vars(arguments),
    }


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, for inference alone
    deepspeed.init_distributed(dist_backend="gloo")
    results: list[dict[str, Any]] = []
    for case in arguments.cases:
        rows = measure(case, arguments)
        results += rows
        if dist.get_rank() == 0:
            show(case, rows, arguments)
        gc.collect()
    if dist.get_rank() == 0:
        report = {"facts": facts(arguments), "results": results}
        print(json.dumps(report["facts"]))
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    dist.barrier()
    os._exit(0)  # gloo's threads need not be waited for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a vision transformer of timm's")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--clip", type=float, default=1.0, help="gradient clipping; 0 for none")
    parser.add_argument("--repeats", type=int, default=150)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], help="variants whose names contain one of these, as qsr")
    parser.add_argument("--set", nargs="+", default=[], help="for qsr_engine, as averaging.shared_memory=false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the figures as JSON, too")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(arguments.processes):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": arguments.processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": 1,
        }
        words = [sys.executable, *sys.argv]
        started.append(subprocess.Popen(words, env={**os.environ, **{k: str(v) for k, v in environment.items()}}))
    codes = [process.wait() for process in started]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
