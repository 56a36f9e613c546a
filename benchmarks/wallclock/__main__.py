"""How long does a run take on several hosts with a slow network, where does the time go, and was it foretold?

    sudo env PATH="$PATH" python -m benchmarks.wallclock                             # all of it: half an hour
    sudo env PATH="$PATH" python -m benchmarks.wallclock --hosts 2 --rates 100mbit --models vit

Hosts are network namespaces (launch/cluster.sh), a worker each, and `deepspeed --hostfile` starts the ranks on them.
One launch, for one number of hosts and one rate, takes all runs one after another, in new engines:

    alone        local steps and one averaging at the very end: its steps are the compute-only time
    constant 4   DeepSpeed stage 0 under qsr_engine.initialize, H = 4; likewise H = 12
    qsr          H follows the cosine: the longest round is the last
    qsr, behind  the same with averaging.overlap next_forward; likewise with a wire of bf16, and that alone
    qsr, delayed the same with averaging.overlap delayed, one step late: another algorithm
    parallel     DeepSpeed's own gradient averaging, after the backward (stage 0)
    ddp          torch's DistributedDataParallel, which averages gradients beside the backward

`parallel` and `ddp` send at every step, so a part of their steps is enough; their seconds are those of a whole run at
that pace. Every run but these ends on an average. Batches are random pictures in memory: data take no time.

Columns:

    seconds         of the run on the slowest rank
    of compute      seconds / compute-only time, which is that of the slowest rank of `alone`
    foretold        seconds / what qsr_engine.planning.cost says, with the step time of `alone` and the all-reduces of a
                    flat tensor of the model's bytes, timed in the same launch; nothing is fitted to the run itself, and
                    no averaging is taken to hide behind a forward
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
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import ranks, report, slow_network
from benchmarks.report import Report, parser
from benchmarks.wallclock.settings import GRADIENTS, IMAGE, LOCAL, MODELS, STEPS, Setting, rounds_of

RATES = ("100mbit", "1gbit", "unlimited")


def launch(hosts: int, rate: str, models: list[str]) -> list[list[dict[str, Any]]]:
    """What every rank found, on so many hosts."""
    limit = None if rate == "unlimited" else rate
    with slow_network.slow_network(hosts, limit) as words, tempfile.TemporaryDirectory() as at:
        out = Path(at) / "found.json"
        hostfile = Path(f"/run/{slow_network.address(0)[:-1]}-cluster/hosts")
        ours = ["--module", "benchmarks.wallclock.runs", str(out), *models]
        command = [*words[0], "deepspeed", "--hostfile", str(hostfile), *ours]
        known = {
            **ranks.ENVIRONMENT,
            "PYTHONPATH": str(ranks.ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(command, env={**os.environ, **known}, capture_output=True, text=True, check=False)
        if not out.exists():
            sys.exit(f"{hosts} hosts, {rate}: the launch failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        found: list[list[dict[str, Any]]] = json.loads(out.read_text())
        return found


def totals_table(settings: list[Setting]) -> str:
    rows = []
    for at in settings:
        compute = at.step_seconds() * STEPS
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
        compute = at.step_seconds() * STEPS
        foretold, measured = at.foretold("qsr") / compute, at.slowest("qsr") / compute
        mark = " (1.05 is possible)" if foretold <= 1.05 else ""
        rows.append((at, [f"{foretold:.2f}{mark}", f"{measured:.2f}"]))
    return table(["QSR, foretold / compute", "measured / compute"], rows)


def table(columns: list[str], rows: list[tuple[Setting, list[str]]]) -> str:
    """Every row begins with its setting."""
    return report.table(
        ["hosts", "rate", "model", *columns], [[str(at.hosts), at.rate, at.model, *cells] for at, cells in rows]
    )


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--hosts", nargs="+", type=int, default=[2, 4])
    made.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES))
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    return made.parse_args()


def main() -> None:
    arguments = parse()
    found = Report("wallclock", arguments, ("torch", "deepspeed", "timm"), backend="gloo")
    started = time.perf_counter()
    settings: list[Setting] = []
    for hosts in arguments.hosts:
        for rate in arguments.rates:
            timed = launch(hosts, rate, arguments.models)
            for model in arguments.models:
                by_rank = [{run["strategy"]: run for run in rank if run["model"] == model} for rank in timed]
                settings.append(Setting(hosts, rate, model, by_rank))
            print(f"{hosts} hosts, {rate}: {time.perf_counter() - started:.0f} s so far", file=sys.stderr, flush=True)
            found.save(runs=[run for at in settings for run in at.as_runs()], timed=[asdict(at) for at in settings])
    found.add(
        f"The cores are those of all hosts together. {STEPS} steps a run, of "
        f"{' and '.join(str(spec['batch']) for spec in MODELS.values())} pictures of {IMAGE} x {IMAGE} a worker "
        f"({' and '.join(MODELS)}), one thread a rank."
    )
    for shown in (totals_table, split_table, possible_table):
        found.add(shown(settings))
    found.save(runs=[run for at in settings for run in at.as_runs()], timed=[asdict(at) for at in settings])


if __name__ == "__main__":
    main()
