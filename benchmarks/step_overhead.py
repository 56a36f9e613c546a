"""What does a step between boundaries cost beside the same DeepSpeed engine's step with gradient reduction off?

    python -m benchmarks.step_overhead                                # ViT-Tiny at 32 px; stages 0 and 1
    python -m benchmarks.step_overhead --cases stage1-bf16 --repeats 300
    python -m benchmarks.step_overhead --set averaging.shared_memory=false

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
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, nn

import qsr_engine
from benchmarks import ranks, steps
from benchmarks.report import Report, parser, table
from benchmarks.steps import LEARNING_RATE, PHASES, Step, adamw, loop_step, small_model
from benchmarks.timing import bootstrap, no_collection
from qsr_engine.engines.deepspeed.groups import WorkerGroups

CASES: dict[str, dict[str, Any]] = {
    "stage0-fp32": {},
    "stage1-fp32": {"zero_optimization": {"stage": 1}},
    "stage1-bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
}
BASELINE = "DeepSpeed, reduction off"
Data = tuple[Tensor, Tensor]  # pictures and labels


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


def bare(model: nn.Module, bf16: bool, data: Data, clip: float) -> Step:
    if bf16:
        model.bfloat16()
    return loop_step(model, adamw(model.parameters()), *data, clip)


def engine_step(engine: Any, data: Data, groups: WorkerGroups | None = None, silent: bool = False) -> Step:
    take = steps.engine_step(engine, *data)

    def step() -> list[float]:
        with deepspeed_uses(groups, silent):
            return take()

    return step


def plain(
    model: nn.Module, config: dict[str, Any], data: Data, groups: WorkerGroups | None = None, off: bool = False
) -> Step:
    with deepspeed_uses(groups, silent=False):
        engine = deepspeed.initialize(model=model, optimizer=adamw(model.parameters()), config=config, mpu=groups)[0]
    if off and engine.zero_optimization():
        engine.optimizer.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None
    elif off:
        engine.enable_backward_allreduce = False
    return engine_step(engine, data, groups, silent=off)


def local(
    model: nn.Module, config: dict[str, Any], data: Data, averaging: dict[str, Any], reducing: bool = False
) -> Step:
    qsr = {
        "strategy": "constant",
        "h_base": 10**6,
        "total_steps": 10**6,
        "lr": {"schedule": "constant", "peak": LEARNING_RATE},
        "averaging": averaging,
    }
    engine = qsr_engine.initialize(
        model=model, optimizer=partial(adamw), config={**config, "train_batch_size": "auto", "qsr": qsr}
    )[0]
    if reducing:
        engine.enable_backward_allreduce = True
        engine.optimizer.__dict__.pop("reduce_ready_partitions_and_remove_grads", None)
    return engine_step(engine, data)


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
    alone, bf16 = WorkerGroups.make(1), "bf16" in CASES[case]
    torch.manual_seed(dist.get_rank())
    images = torch.randn(arguments.batch, 3, 32, 32, dtype=torch.bfloat16 if bf16 else torch.float32)
    data = images, torch.randint(10, (arguments.batch,))

    def model() -> nn.Module:
        return small_model(arguments.model)

    made: dict[str, Callable[[], Step]] = {
        "bare PyTorch": lambda: bare(model(), bf16, data, arguments.clip),
        BASELINE: lambda: plain(model(), config, data, alone, off=True),
        f"{BASELINE}, again": lambda: plain(model(), config, data, alone, off=True),
        "DeepSpeed, one rank": lambda: plain(model(), config, data, alone),
        "qsr_engine": lambda: local(model(), config, data, averaging),
        "qsr_engine, reducing": lambda: local(model(), config, data, averaging, reducing=True),
        "DeepSpeed, data parallel": lambda: plain(model(), config, data),
    }
    names = [name for name in made if not arguments.only or name == BASELINE or any(w in name for w in arguments.only)]
    # Drawn, so that no variant is always the first one to get memory.
    random.Random(arguments.seed).shuffle(names)
    found = {name: made[name]() for name in names}
    return {name: found[name] for name in made if name in found}


# -------------------------------------------------------------------------------------------------- measurement


def take_turns(taking: dict[str, Step], repeats: int, warmup: int, seed: int) -> Tensor:
    """Milliseconds of every variant, repetition and phase: the means over the processes."""
    order, draw = list(taking), random.Random(seed)
    seconds = torch.zeros(len(taking), repeats, len(PHASES))
    with no_collection():
        for repetition in range(-warmup, repeats):
            draw.shuffle(order)
            for name in order:
                dist.barrier()
                taken = taking[name]()
                if repetition >= 0:
                    seconds[list(taking).index(name), repetition] = torch.tensor(taken)
            if repetition % 50 == 0:
                gc.collect()
    dist.all_reduce(seconds)
    return seconds / dist.get_world_size() * 1000


def measure(case: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a variant; the same on every process."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling, for inference alone
    deepspeed.init_distributed(dist_backend="gloo")
    taking = variants(case, arguments)
    milliseconds = take_turns(taking, arguments.repeats, arguments.warmup, arguments.seed)
    totals = dict(zip(taking, milliseconds.sum(2), strict=True))
    rows = []
    for name, phases in zip(taking, milliseconds, strict=True):
        ratio, interval = compare(totals[name], totals[BASELINE])
        rows.append(
            {
                "case": case,
                "variant": name,
                "milliseconds": totals[name].median().item(),
                "lowest": totals[name].min().item(),
                "phases": {phase: phases[:, i].median().item() for i, phase in enumerate(PHASES)},
                "ratio": ratio,
                "interval": interval,
                "all": [round(value, 2) for value in totals[name].tolist()],
            }
        )
    return rows


def compare(of: Tensor, baseline: Tensor) -> tuple[float, list[float]]:
    """The ratio as said above, and its 95 % interval."""
    return bootstrap(lambda i: 1 + (of - baseline)[i].median(1).values / baseline[i].median(1).values, len(of))


def shown(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        times = (row["milliseconds"], row["lowest"], *row["phases"].values())
        low, high = row["interval"]
        interval = "" if row["variant"] == BASELINE else f" [{low:.3f}, {high:.3f}]"
        lines.append([row["variant"], *(f"{ms:.1f}" for ms in times), f"{row['ratio']:.3f}{interval}"])
    return table(["variant", "ms", "lowest", *PHASES, "ratio"], lines)


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    made.add_argument("--model", default="vit_tiny_patch16_224", help="a vision transformer of timm's")
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--clip", type=float, default=1.0, help="gradient clipping; 0 for none")
    made.add_argument("--repeats", type=int, default=150)
    made.add_argument("--warmup", type=int, default=5)
    made.add_argument("--only", nargs="+", default=[], help="variants whose names contain one of these, as qsr")
    made.add_argument("--set", nargs="+", default=[], help="for qsr_engine, as averaging.shared_memory=false")
    made.add_argument("--seed", type=int, default=0)
    return made.parse_args()


def main() -> None:
    arguments = parse()
    report = Report("step-overhead", arguments, ("torch", "deepspeed", "timm"), backend="gloo")
    results: list[dict[str, Any]] = []
    for case in arguments.cases:
        rows = ranks.run(measure, case, arguments, on_each=arguments.processes)
        results += rows
        report.add(f"{case}\n\n{shown(rows)}")
        report.save(results=results)


if __name__ == "__main__":
    main()
