"""All strategies, kinds of step times and numbers of workers, simulated and beside the closed form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from benchmarks.scale.closed_form import CostModel, Network
from benchmarks.scale.simulation import NO_FAILURES, Failures, Outcome, Simulation
from benchmarks.scale.step_times import Sampler, Steps, Sums
from configs.imagenet import table
from qsr_engine.planning.cost import Observed, fit_two_runs
from qsr_engine.schedule import Round

STRATEGIES = {
    "parallel": "vit-b",
    "constant H 4": "vit-b-constant-h4",
    "post-local": "vit-b-post-local-h4",
    "SWAP": "vit-b-swap-h4",
    "QSR": "vit-b-qsr-h4",
}
WORKERS = (2, 8, 64, 512, 4096, 32768, 100_000)
PARAMETERS = 86_381_800  # of qsr/simple_vit_b16; they and their gradients are sent in fp32
PAPER_WORKERS = 16
PAPER_RUNS = (Observed(93_600, 93_600, 26.7 * 3600), Observed(93_600, 9_711, 20.2 * 3600))  # parallel, QSR
STATE_BYTES = 3 * 4 * PARAMETERS  # that a member sends to one that joins: the parameters, and m and v of AdamW
WAYS: tuple[Literal["restart", "elastic"], ...] = ("restart", "elastic")
DRAWN_ONE_BY_ONE = 64  # workers at most; more are drawn as their slowest


def paper_network() -> tuple[Network, float]:
    """The network between hosts of 8 GPUs, and the seconds of a step; see "Assumptions" at the top."""
    fit = fit_two_runs(*PAPER_RUNS)
    network = Network(25e9 / 8, 10e-6, 8, 12.5e9, two_level=True, local_latency=3e-6)
    modelled = network.all_reduce_seconds(4 * PARAMETERS, PAPER_WORKERS)
    return replace(network, efficiency=modelled / fit.averaging_seconds), fit.step_seconds


def kinds_of_steps(mean: float, cv: float) -> dict[str, Steps]:
    return {
        "lognormal": Steps(mean, cv),
        "pareto": Steps(mean, cv, "pareto"),
        "slow": Steps(mean, cv, slow_share=1 / 64, slow_by=0.1),
    }


@dataclass(frozen=True)
class Options:
    workers: tuple[int, ...] = WORKERS
    runs: int = 20
    cv: float = 0.05
    mtbf_hours: float = 50_000.0
    backward_share: float = 0.0
    failures: Failures = field(default_factory=lambda: replace(NO_FAILURES, save_every=3120))
    seed: int = 0


def save_every(options: Options, workers: int, step_seconds: float) -> int:
    """Steps between two checkpoints: Young's, and no more than the recipes'.

    Elastic runs have the recipes', since they need one only where all fail.
    """
    if options.failures.way == "elastic":
        return options.failures.save_every or 3120
    between = options.mtbf_hours * 3600 / workers
    young = math.sqrt(2 * options.failures.save_seconds * between)
    return max(1, round(min(options.failures.save_every or 3120, young / step_seconds)))


@dataclass
class Row:
    """Means over the runs of one strategy, kind of step times, and K; shares are of total."""

    steps: str
    strategy: str
    way: str
    workers: int
    hours: float
    least: float
    most: float
    waiting: float
    communication: float
    saving: float
    lost: float
    bytes: float
    failures: float
    finished: int
    last_begun: float  # how often the last round was
    absent: float  # of all workers' steps, the share that is in no average
    one_by_one: bool
    waiting_hours: float
    closed_waiting_hours: float
    closed_hours: float  # without failures and checkpoints


def study(options: Options) -> Iterator[Row]:
    network, mean = paper_network()
    schedules = {name: table.plan(recipe).rounds for name, recipe in STRATEGIES.items()}
    most = max(r.length for schedule in schedules.values() for r in schedule)
    tables: dict[tuple[float, str], Sums] = {}
    for kind, (steps_name, steps) in enumerate(kinds_of_steps(mean, options.cv).items()):
        if steps.cv and (steps.cv, steps.tail) not in tables:
            tables[steps.cv, steps.tail] = Sums(steps, most)
        for number, (name, schedule) in enumerate(schedules.items()):
            for workers, way in itertools.product(options.workers, WAYS):
                model = _model(steps, network, workers, options.backward_share)
                one_by_one = workers <= DRAWN_ONE_BY_ONE
                sums = None if one_by_one else tables.get((steps.cv, steps.tail))
                sampler = Sampler(steps, workers, sums, one_by_one)
                so = replace(options, failures=replace(options.failures, way=way))
                failures = replace(
                    so.failures,
                    mean_seconds=options.mtbf_hours * 3600,
                    save_every=save_every(so, workers, mean),
                    join_seconds=STATE_BYTES / (network.bandwidth * network.efficiency),
                    give_up=100 * model.run(schedule).total,
                )
                seeds = [options.seed, kind, number, workers]
                outcomes = [
                    Simulation(schedule, model, sampler, failures, [*seeds, run]).run() for run in range(options.runs)
                ]
                yield _row((steps_name, name, way), model, schedule, sampler, outcomes)


def _model(steps: Steps, network: Network, workers: int, backward_share: float) -> CostModel:
    payload = 4.0 * PARAMETERS
    return CostModel(steps.closed_form(workers), network, workers, payload, payload, backward_share=backward_share)


def _row(
    names: tuple[str, str, str],
    model: CostModel,
    schedule: Sequence[Round],
    sampler: Sampler,
    outcomes: Sequence[Outcome],
) -> Row:
    closed, hours = model.run(schedule), [outcome.total / 3600 for outcome in outcomes]
    count, all_steps = len(outcomes), model.workers * sum(r.length for r in schedule)
    steps, name, way = names
    return Row(
        steps=steps,
        strategy=name,
        way=way,
        workers=model.workers,
        hours=sum(hours) / count,
        least=min(hours),
        most=max(hours),
        waiting=sum(outcome.share("waiting") for outcome in outcomes) / count,
        communication=sum(outcome.share("communication") for outcome in outcomes) / count,
        saving=sum(outcome.share("saving") for outcome in outcomes) / count,
        lost=sum(outcome.share("lost") for outcome in outcomes) / count,
        bytes=sum(outcome.bytes for outcome in outcomes) / count,
        failures=sum(outcome.failures for outcome in outcomes) / count,
        finished=sum(outcome.finished for outcome in outcomes),
        last_begun=sum(outcome.last_begun for outcome in outcomes) / count,
        absent=sum(outcome.absent for outcome in outcomes) / count / all_steps,
        one_by_one=sampler.one_by_one,
        waiting_hours=sum(float(np.mean(outcome.waiting)) for outcome in outcomes) / count / 3600,
        closed_waiting_hours=closed.waiting / 3600,
        closed_hours=closed.total / 3600,
    )


def paper_check() -> str:
    """The paper's other two times, at K = 64 and a quarter of the steps, which the model has not been fitted to."""
    network, mean = paper_network()
    cells = []
    for name, recipe, hours in (("parallel", "vit-b-b16384", 8.6), ("QSR", "vit-b-b16384-qsr-h4", 5.5)):
        schedule = table.plan(recipe).rounds
        total = _model(Steps(mean), network, 64, 0.0).run(schedule).total / 3600
        cells.append(f"{name} {total:.1f} h (paper {hours} h)")
    return "At K = 64 and batch 16384, without variance and failures: " + ", ".join(cells)
