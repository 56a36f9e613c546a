"""How long does a run take on several hosts with a slow network, where does the time go, and was it foretold?

    sudo env PATH="$PATH" python benchmarks/wallclock.py --json wallclock.json           # all of it: half an hour
    sudo env PATH="$PATH" python benchmarks/wallclock.py --hosts 2 --rates 100mbit --models vit

Hosts are network namespaces (launch/cluster.sh), a worker each, and `deepspeed --hostfile` starts the ranks on them.
One launch, for one number of hosts and one rate, takes all runs one after another, in new engines:

    alone        local steps and one averaging at the very end: its steps are the compute-only time
    constant 4   DeepSpeed stage 0 under qsr_engine.initialize, H = 4; likewise H = 12
    qsr          H follows the cosine: the longest round is the last
    qsr, behind  the same with averaging.overlap next_forward
    parallel     DeepSpeed's own gradient averaging, after the backward (stage 0)
    ddp          torch's DistributedDataParallel, which averages gradients beside the backward

`parallel` and `ddp` send at every step, so a part of their steps is enough; their seconds are those of a whole run at
that pace. Every run but these ends on an average. Batches are random pictures in memory: data take no time.

Columns:

    seconds         of the run on the slowest rank
    of compute      seconds / compute-only time, which is that of the slowest rank of `alone`
    foretold        seconds / what qsr_engine.cost says, with the step time of `alone` and the all-reduces of a flat
                    tensor of the model's bytes, timed in the same launch; nothing is fitted to the run itself
    bytes           that the host's port sent / computed: 2 (K - 1) / K of the payload for each averaging

Splitting the time, as the paper's Appendix F does: seconds = steps x c + averagings x a for two runs of different
periods gives c, the compute of a step, and a, the cost of an averaging. Beside them stand the same measured directly,
by clocks around each step, each boundary, and each rank's waiting there for the last to come. Waiting counts as
compute: where there are more hosts than cores, a rank that waits lends its core to those that still compute, so that
the compute of all is the same whatever the period. For the same reason the cost model is given the slowest rank's step,
and no spread: its spread is that of machines that do not share.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import slow_network
from hardware import in_words, machine

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.planning.cost import CostModel, Network, Observed, StepTime, fit_two_runs
from qsr_engine.schedule import Round, rounds

STEPS = 24
GRADIENT_STEPS = 6  # of `parallel` and `ddp`
IMAGE = 64
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "vit_tiny_patch16_224",
        "options": {"img_size": IMAGE, "patch_size": 8, "depth": 4, "num_classes": 100},
        "batch": 24,
    },
    "resnet": {
        "name": "resnet18",
        "options": {"layers": [1, 1, 1, 1], "channels": [48, 96, 192, 384], "num_classes": 100},
        "batch": 36,
    },
}
LR: dict[str, Any] = {"schedule": "cosine", "peak": 1e-3, "min": 1e-6, "warmup_steps": 2}
# By default 16 MB, more than these models have: the first layer would wait for all of it.
BEHIND = {"overlap": "next_forward", "bucket_mb": 1}
LOCAL: dict[str, dict[str, Any]] = {
    "alone": {"strategy": "constant", "h_base": STEPS},
    "constant 4": {"strategy": "constant", "h_base": 4},
    "constant 12": {"strategy": "constant", "h_base": 12},
    "qsr": {"strategy": "qsr", "h_base": 4, "alpha": 2e-3},
    "qsr, behind": {"strategy": "qsr", "h_base": 4, "alpha": 2e-3, "averaging": BEHIND},
}
GRADIENTS = ("parallel", "ddp")
DDP_BUCKET_MB = 2  # by default 25, more than these models have: nothing would travel beside the backward
RATES = {"100mbit": 100e6 / 8, "1gbit": 1e9 / 8, "unlimited": None}  # bytes/s


def qsr_block(strategy: str) -> dict[str, Any]:
    """The configuration's block of a strategy."""
    if strategy in GRADIENTS:
        return {"strategy": "parallel", "total_steps": GRADIENT_STEPS, "lr": LR}
    return {**LOCAL[strategy], "total_steps": STEPS, "lr": LR}


def rounds_of(strategy: str) -> list[Round]:
    """All rounds of a whole run; of parallel and ddp, of as many steps as the others have."""
    return list(rounds(QSRConfig(**{**qsr_block(strategy), "total_steps": STEPS})))


# ------------------------------------------------------------------------------------------------ in the ranks


def measure_here(out: Path, models: list[str]) -> None:
    """In one of the ranks that the launcher started: all runs of all models; rank 0 writes what came out."""
    import deepspeed
    import torch
    import torch.distributed as dist

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


def _model(spec: dict[str, Any]) -> Any:
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(spec["name"], **spec["options"])


def _engine(spec: dict[str, Any], strategy: str, batch: tuple[Any, Any]) -> dict[str, Any]:
    """A run of qsr_engine.initialize, which is DeepSpeed's own engine under `parallel`."""
    import qsr_engine

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
        engine.backward(_loss(engine(batch[0]), batch[1]))
        engine.step()
        return float(state.costs.seconds_averaging - before)

    timed = _time(step, state.qsr.total_steps)
    payload = sum(parameter.numel() * 4 for parameter in model.parameters())
    figures = {"computed": state.bytes_sent, "averagings": state.averagings, "waiting": state.costs.seconds_waiting}
    engine.destroy()
    return {**timed, **figures, "parameter_bytes": payload}


def _ddp(spec: dict[str, Any], strategy: str, batch: tuple[Any, Any]) -> dict[str, Any]:
    """torch's own data parallel, with the same model, optimizer and batches."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(_model(spec), bucket_cap_mb=DDP_BUCKET_MB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR["min"], weight_decay=0.05)

    def step() -> float:
        optimizer.zero_grad()
        _loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
        return 0.0

    timed = _time(step, GRADIENT_STEPS)
    payload = sum(parameter.numel() * 4 for parameter in model.parameters())
    buffers = 0 if dist.get_rank() else sum(b.numel() * b.element_size() for b in model.buffers())
    workers = dist.get_world_size()
    sent = GRADIENT_STEPS * (2 * (workers - 1) / workers * payload + buffers)  # rank 0 tells its buffers at every step
    return {**timed, "computed": sent, "averagings": GRADIENT_STEPS, "waiting": None, "parameter_bytes": payload}


def _loss(scores: Any, labels: Any) -> Any:
    from torch.nn import functional as F

    return F.cross_entropy(scores, labels)


def _time(step: Callable[[], float], steps: int) -> dict[str, Any]:
    """Seconds of a run, of the compute of each step, and of its averagings; and what this host's port sent."""
    import torch.distributed as dist

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
    import torch
    import torch.distributed as dist

    flat, found = torch.zeros(payload // 4), []
    for _ in range(5):
        time.sleep(0.2)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(flat)
        found.append(time.perf_counter() - started)
    return found


# ------------------------------------------------------------------------------------------------ from outside


def launch(hosts: int, rate: str, models: list[str]) -> list[list[dict[str, Any]]]:
    """What every rank found, on so many hosts."""
    limit = None if rate == "unlimited" else rate
    with slow_network.slow_network(hosts, limit) as words, tempfile.TemporaryDirectory() as at:
        out = Path(at) / "found.json"
        hostfile = Path(f"/run/{slow_network.address(0)[:-1]}-cluster/hosts")
        ours = [str(Path(__file__).resolve()), "--here", str(out), "--models", *models]
        command = [*words[0], "deepspeed", "--hostfile", str(hostfile), *ours]
        known = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(command, env={**os.environ, **known}, capture_output=True, text=True, check=False)
        if not out.exists():
            sys.exit(f"{hosts} hosts, {rate}: the launch failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        found: list[list[dict[str, Any]]] = json.loads(out.read_text())
        return found


@dataclass(frozen=True)
class Setting:
    """One launch's runs of one model, and what the cost model is given of them."""

    hosts: int
    rate: str
    model: str
    ranks: list[dict[str, dict[str, Any]]]  # a rank: strategy -> its figures

    def slowest(self, strategy: str) -> float:
        """Seconds of the run on the slowest rank; of parallel and ddp, of a whole run at their pace."""
        runs = [rank[strategy] for rank in self.ranks]
        return STEPS * float(max(float(run["seconds"]) / run["steps"] for run in runs))

    def mean(self, strategy: str, figure: str) -> float:
        """Of one figure of a run, over the ranks."""
        return statistics.mean(float(rank[strategy][figure]) for rank in self.ranks)

    def step_time(self) -> StepTime:
        """Of the compute of `alone`, on the slowest rank."""
        return StepTime(max(statistics.mean(rank["alone"]["compute"]) for rank in self.ranks))

    @property
    def payload(self) -> int:
        return int(self.ranks[0]["alone"]["parameter_bytes"])

    def network(self) -> Network:
        """With the bandwidth that the timed all-reduces reached."""
        seconds = statistics.median(
            max(times) for times in zip(*(rank["ddp"]["all_reduce"] for rank in self.ranks), strict=True)
        )
        return Network(bandwidth=2 * (self.hosts - 1) / self.hosts * self.payload / seconds)

    def foretold(self, strategy: str) -> float:
        """Seconds of a whole run by the cost model."""
        step, network = self.step_time(), self.network()
        model = CostModel(
            step,
            network,
            self.hosts,
            parameter_bytes=self.payload,
            gradient_bytes=self.payload,
            backward_share=2 / 3 if strategy == "ddp" else 0.0,
            forward_share=1 / 3 if "behind" in strategy else 0.0,
            bucket_bytes=DDP_BUCKET_MB * 2**20,
        )
        return model.run(rounds_of(strategy)).total

    def split(self, first: str, second: str) -> tuple[float, float]:
        """(compute of a step, cost of an averaging) in seconds, from the total times of two runs."""
        pair = [Observed(STEPS, len(rounds_of(name)), self.slowest(name)) for name in (first, second)]
        try:
            fit = fit_two_runs(*pair)
        except ValueError:  # noise of more than the averagings cost
            return math.nan, math.nan
        return fit.step_seconds, fit.averaging_seconds

    def direct(self, strategy: str) -> tuple[float, float]:
        """The same by the clock around each step and around each boundary."""
        compute = statistics.mean(sum(rank[strategy]["compute"]) for rank in self.ranks)
        waiting, averaging = self.mean(strategy, "waiting"), self.mean(strategy, "averaging")
        return (compute + waiting) / STEPS, (averaging - waiting) / self.mean(strategy, "averagings")

    def port_ratio(self, strategy: str) -> float:
        """Bytes that the hosts' ports sent / bytes computed."""
        return self.mean(strategy, "port") / self.mean(strategy, "computed")

    def as_runs(self) -> list[dict[str, Any]]:
        """One entry a run, as benchmarks/scale.py --validate reads them."""
        step, network = self.step_time(), self.network()
        return [
            {
                "model": f"{self.model}, {strategy}, {self.rate}",
                "strategy": qsr_block(strategy)["strategy"],
                "workers": self.hosts,
                "bandwidth": network.bandwidth,
                "steps": STEPS,
                "rounds": [round_.length for round_ in rounds_of(strategy)],
                "parameter_bytes": self.payload,
                "step_seconds": step.mean,
                "step_cv": step.cv,
                "seconds": self.slowest(strategy),
            }
            for strategy in (*LOCAL, *GRADIENTS)
        ]


def totals_table(settings: list[Setting]) -> str:
    rows = []
    for at in settings:
        compute = at.step_time().mean * STEPS
        for strategy in (*LOCAL, *GRADIENTS):
            seconds, averagings = at.slowest(strategy), len(rounds_of(strategy))
            ratios = (
                f"{seconds / compute:.2f}",
                f"{seconds / at.foretold(strategy):.2f}",
                f"{at.port_ratio(strategy):.3f}",
            )
            rows.append((at, [strategy, str(averagings), f"{seconds:.1f}", *ratios]))
    return table(["run", "averagings", "seconds", "of compute", "foretold", "bytes"], rows)


def split_table(settings: list[Setting]) -> str:
    rows = []
    for at in settings:
        pairs = zip(at.split("constant 4", "constant 12"), at.direct("constant 4"), strict=True)
        rows.append((at, [cell for s, d in pairs for cell in (f"{1e3 * s:.0f}", f"{1e3 * d:.0f}", f"{s / d:.2f}")]))
    return table(["c split, ms", "c direct, ms", "ratio", "a split, ms", "a direct, ms", "ratio"], rows)


def possible_table(settings: list[Setting]) -> str:
    """QSR's total over the compute-only time, where the cost model says that 1.05 can be had."""
    rows = []
    for at in settings:
        compute = at.step_time().mean * STEPS
        foretold, measured = at.foretold("qsr") / compute, at.slowest("qsr") / compute
        mark = " (1.05 is possible)" if foretold <= 1.05 else ""
        rows.append((at, [f"{foretold:.2f}{mark}", f"{measured:.2f}"]))
    return table(["QSR, foretold / compute", "measured / compute"], rows)


def table(columns: list[str], rows: list[tuple[Setting, list[str]]]) -> str:
    """In Markdown; every row begins with its setting."""
    lines = [["hosts", "rate", "model", *columns], ["---:", "---", "---", *["---:"] * len(columns)]]
    lines += [[str(at.hosts), at.rate, at.model, *cells] for at, cells in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading() -> str:
    return (
        f"{in_words(machine('torch', 'deepspeed', 'timm'))}, gloo, for all hosts together. {STEPS} steps a run, of "
        f"{' and '.join(str(spec['batch']) for spec in MODELS.values())} pictures of {IMAGE} x {IMAGE} a worker "
        f"({' and '.join(MODELS)}), one thread a rank."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rates", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--json", type=Path, help="every run, for benchmarks/scale.py --validate, and all that was timed"
    )
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return measure_here(args.here, args.models)
    started, settings = time.perf_counter(), []
    for hosts in args.hosts:
        for rate in args.rates:
            found = launch(hosts, rate, args.models)
            for model in args.models:
                ranks = [{run["strategy"]: run for run in rank if run["model"] == model} for rank in found]
                settings.append(Setting(hosts, rate, model, ranks))
            print(f"{hosts} hosts, {rate}: {time.perf_counter() - started:.0f} s so far", file=sys.stderr, flush=True)
            if args.json:
                runs = [run for at in settings for run in at.as_runs()]
                args.json.write_text(json.dumps({"runs": runs, "timed": [asdict(at) for at in settings]}, indent=1))
    print(heading(), totals_table(settings), split_table(settings), possible_table(settings), sep="\n\n")
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    return None


if __name__ == "__main__":
    main()
