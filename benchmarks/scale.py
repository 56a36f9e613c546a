"""How do time, waiting, bytes and what failures cost grow with the number of workers, up to 100,000?

    python benchmarks/scale.py                          # the paper's ViT-B, K from 2 to 100,000; a few minutes
    python benchmarks/scale.py --quick                  # K = 2, 64, 4096 and one run of each; 30 seconds
    python benchmarks/scale.py --plots PREFIX --json OUT.json
    python benchmarks/scale.py --validate MEASURED.json # beside measured runs; see below

A simulation of discrete events. Rounds come from qsr_engine.schedule, seconds and bytes of an all-reduce from
qsr_engine.cost, whose closed form for the waiting is thereby checked. The number of steps and the time of a step do not
change with K: each worker keeps its batch, so the batch over all workers grows with K. Whether anybody would train so
is not asked.

**A round** of H steps ends for each worker after the sum of H draws. The averaging begins when the last has come. Steps
are drawn independently, with the same mean and cv (standard deviation over mean), from one of

    lognormal  as the closed form has it
    pareto     a shortest time and a Lomax tail of index 3: P(longer than x) falls as 1/x^3, so that 1 step in 10^9 is
               longer by 1,000 scales (58 steps at cv 0.05). No moment above the second is finite
    slow       lognormal, and one worker in 64 takes 10 % longer, always (none where there are fewer workers)

Up to 64 workers every step of every worker is drawn. Beyond, the slowest of n equal workers is drawn at once, from
P(max <= x) = F(x)^n, with F the distribution of a sum of H draws. F is computed by FFT on 2^19 cells, so it is exact up
to a cell (a 50th of the tail's scale) and to tails of 1e-12. What the others computed is then its expectation, given
the slowest. With `slow`, there are two kinds of workers and the later of two such maxima.

**Failures.** Each worker fails after an exponential time, and is replaced by one that does the same; the events wait in
a queue. The others notice when they meet: they finish their steps, and at the boundary the failed one is missing (for
when they meet, the time at which the last of all would have come is taken). All go back to the last checkpoint, after
restart_seconds. What was done since is lost, and done again with new draws and new bytes. With `--notice at_once` a
failure stops all at that moment. Checkpoints are written at the first boundary after so many steps that the time in
between is Young's sqrt(2 x seconds of one x time between two failures of the whole) ("A first order approximation to
the optimum checkpoint interval", 1974), but at most 3,120 steps, as in the recipes.

    time = compute + waiting + communication + saving + lost, for every worker

**Assumptions and their sources.** A step of 0.748 s and an averaging of 0.279 s at K = 16 follow from the paper's 26.7
hours (parallel) and 20.2 hours (QSR) on 2 hosts of 8 GPUs with 25 Gbit/s (Gu et al., arXiv 2310.14423, Figure 5 and the
fit of Appendix F); the efficiency of the network is set so that the model gives that averaging. One failure per worker
in 50,000 hours: 419 unexpected interruptions in 54 days on 16,384 GPUs are 50,676 hours ("The Llama 3 Herd of Models",
arXiv 2407.21783, Section 3.3.4). Nothing is hidden behind the backward pass (--backward-share), since the paper's hours
leave no room for it. Assumed without a source: cv 0.05, the slow workers, 12.5 GB/s inside a host, latencies of 10 and
3 microseconds, 300 s to restart, 10 s to save.

**--validate FILE** reads a JSON object with `runs`, a list of objects with

    model, strategy    words, for the table; strategy is one of the block's, and `parallel` means gradients each step
    workers            2 or more; each has a host of its own
    bandwidth          bytes/s of a host's port, or null for no limit, where an all-reduce is taken to cost nothing
    steps              optimizer steps
    rounds             a list of lengths that add up to steps, or a "qsr" block (an object with an lr block)
    parameter_bytes    payload of an averaging, and of parallel's gradients unless gradient_bytes is there too
    step_seconds       mean seconds of one step's compute
    step_cv            its standard deviation over its mean
    seconds            measured, of the whole training

and prints simulated : measured. Latency is 0 and efficiency 1, no failure happens and nothing is saved: nothing is
calibrated but step_seconds and step_cv, which are measured in the same run.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from hardware import machine

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError, validate
from qsr_engine.planning.cost import CostModel, Network, Observed, StepTime, fit_two_runs
from qsr_engine.planning.plan import make_plan
from qsr_engine.schedule import Round, rounds

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

RECIPES = Path(__file__).parents[1] / "configs" / "imagenet"
STRATEGIES = {
    "parallel": "vit-b.yaml",
    "constant H 4": "vit-b-constant-h4.yaml",
    "post-local": "vit-b-post-local-h4.yaml",
    "SWAP": "vit-b-swap-h4.yaml",
    "QSR": "vit-b-qsr-h4.yaml",
}
WORKERS = (2, 8, 64, 512, 4096, 32768, 100_000)
PARAMETERS = 86_415_592  # of qsr/vit_base_patch16_sincos; they and their gradients are sent in fp32
PAPER_WORKERS = 16
PAPER_RUNS = (Observed(93_600, 93_600, 26.7 * 3600), Observed(93_600, 9_711, 20.2 * 3600))  # parallel, QSR
DRAWN_ONE_BY_ONE = 64  # workers at most; more are drawn as their slowest
TAIL_INDEX = 3  # of the Pareto tail
CELLS = 1 << 19
SMALLEST_TAIL = 1e-12
# Logits of F between which the quantile is interpolated: from tails of 1e-13 to 1 - 1e-13.
KNOTS: Floats = np.linspace(-30.0, 30.0, 12_001)


# --------------------------------------------------------------------------------------------------- step times


@dataclass(frozen=True)
class Steps:
    """How long steps take.

    Args:
        mean: seconds of a step, over all steps and workers.
        cv: standard deviation over mean of one worker's steps.
        tail: distribution of one worker's steps.
        slow_share, slow_by: so many of all workers take 1 + slow_by times as long as the others, always.
    """

    mean: float
    cv: float = 0.0
    tail: Literal["lognormal", "pareto"] = "lognormal"
    slow_share: float = 0.0
    slow_by: float = 0.0

    def slow_workers(self, workers: int) -> int:
        return round(self.slow_share * workers)

    def seconds(self, workers: int) -> tuple[float, float]:
        """Mean step of the fast workers and of the slow ones."""
        fast = self.mean / (1 + self.slow_by * self.slow_workers(workers) / workers)
        return fast, fast * (1 + self.slow_by)

    def closed_form(self, workers: int) -> StepTime:
        """The same mean and variances, as qsr_engine.planning.cost knows them."""
        share = self.slow_workers(workers) / workers
        worker_cv = self.slow_by * math.sqrt(share * (1 - share)) / (1 + self.slow_by * share)
        return StepTime(self.mean, self.cv, worker_cv)

    @property
    def scale(self) -> float:
        """Of the Lomax tail, whose variance is scale^2 index / ((index - 1)^2 (index - 2))."""
        return self.cv * (TAIL_INDEX - 1) * math.sqrt((TAIL_INDEX - 2) / TAIL_INDEX)

    @property
    def sigma(self) -> float:
        """Of the lognormal's logarithm."""
        return math.sqrt(math.log1p(self.cv**2))

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        """Steps of mean 1."""
        if self.cv == 0:
            return np.ones(shape)
        if self.tail == "pareto":
            return 1 + self.scale * (random.pareto(TAIL_INDEX, shape) - 1 / (TAIL_INDEX - 1))
        return random.lognormal(-(self.sigma**2) / 2, self.sigma, shape)

    def longer(self, x: Floats) -> Floats:
        """P(a step of mean 1 is longer than x)."""
        if self.tail == "pareto":
            above = np.maximum(0.0, (x - 1) / self.scale + 1 / (TAIL_INDEX - 1))
            return np.asarray((1 + above) ** -float(TAIL_INDEX))
        logs = np.log(np.maximum(x, 1e-300))
        return np.asarray(_normal_tail((logs + self.sigma**2 / 2) / self.sigma))

    def longest(self) -> float:
        """The step of mean 1 that is exceeded with probability SMALLEST_TAIL."""
        if self.tail == "pareto":
            return 1 + self.scale * math.pow(SMALLEST_TAIL, -1 / TAIL_INDEX)
        return math.exp(7.1 * self.sigma)


def _normal_tail(z: Floats) -> Floats:
    from scipy.special import ndtr

    return np.asarray(ndtr(-z), dtype=np.float64)


class Sums:
    """Quantiles of the sum of any number of independent steps of mean 1.

    Args:
        steps: their cv must be above 0.
        most: the largest number of steps in a sum.
    """

    def __init__(self, steps: Steps, most: int) -> None:
        self._spread = 10 * steps.cv
        self._cell = (steps.longest() + 2 * self._spread * math.sqrt(most)) / CELLS
        edges = (np.arange(CELLS + 1, dtype=np.float64) - 0.5) * self._cell
        beyond = steps.longer(edges)
        cells = beyond[:-1] - beyond[1:]
        cells /= cells.sum()
        # What rounding to cells does to the mean; a sum of H is off by H times as much.
        self._shift = 1 - float(cells @ np.arange(CELLS)) * self._cell
        self._transform = np.fft.rfft(cells)
        self._known: dict[int, tuple[Floats, Floats]] = {}

    def table(self, count: int) -> tuple[Floats, Floats]:
        """At each of KNOTS: the quantile of a sum of count steps, and the mean of the sums below it."""
        if count not in self._known:
            self._known[count] = self._compute(count)
        return self._known[count]

    def _compute(self, count: int) -> tuple[Floats, Floats]:
        density = np.maximum(0.0, np.fft.irfft(self._transform**count, CELLS))
        # The transform is periodic, so the sums from `first` on stand at their remainder by CELLS.
        first = max(0, int((count - self._spread * math.sqrt(count) - 1) / self._cell))
        density = np.roll(density, -(first % CELLS))
        middles = (first + np.arange(CELLS)) * self._cell + count * self._shift
        below = np.cumsum(density)
        above = np.cumsum(density[::-1])[::-1] - density
        mean_below = np.cumsum(density * middles)
        kept = (below > 1e-13) & (above > 1e-13)
        logits = np.maximum.accumulate(np.log(below[kept]) - np.log(above[kept]))
        quantiles = np.interp(KNOTS, logits, middles[kept] + self._cell / 2)
        return quantiles, np.interp(KNOTS, logits, mean_below[kept] / below[kept])


@dataclass
class Drawn:
    """Seconds from a round's start until its last worker has come, (rounds,), and those that each column's worker
    computed, (rounds, columns). Columns are the workers, or one for the mean worker."""

    slowest: Floats
    compute: Floats


class Sampler:
    """Draws rounds.

    Args:
        sums: of these steps; None where cv is 0 or all workers are drawn one by one.
        one_by_one: whether every step of every worker is drawn.
    """

    def __init__(self, steps: Steps, workers: int, sums: Sums | None, one_by_one: bool) -> None:
        self.steps, self.workers, self.one_by_one = steps, workers, one_by_one
        self.columns = workers if one_by_one else 1
        self._sums = sums

    def draw(self, lengths: Counts, random: np.random.Generator) -> Drawn:
        drawn = Drawn(np.empty(len(lengths)), np.empty((len(lengths), self.columns)))
        for length in np.unique(lengths):
            places = np.flatnonzero(lengths == length)
            part = (self._each if self.one_by_one else self._largest)(int(length), len(places), random)
            drawn.slowest[places], drawn.compute[places] = part.slowest, part.compute
        return drawn

    def _each(self, length: int, count: int, random: np.random.Generator) -> Drawn:
        fast, slow = self.steps.seconds(self.workers)
        means = np.full(self.workers, fast)
        means[self.workers - self.steps.slow_workers(self.workers) :] = slow
        compute = self.steps.draw(random, (count, length, self.workers)).sum(axis=1) * means
        return Drawn(compute.max(axis=1), compute)

    def _largest(self, length: int, count: int, random: np.random.Generator) -> Drawn:
        """The slowest of the fast workers and of the slow ones; what the others computed is its expectation."""
        slow_workers = self.steps.slow_workers(self.workers)
        numbers = (self.workers - slow_workers, slow_workers)
        kinds = [(n, mean) for n, mean in zip(numbers, self.steps.seconds(self.workers), strict=True) if n]
        if self._sums is None:
            slowest = np.full(count, length * max(mean for _, mean in kinds))
            return Drawn(slowest, np.full((count, 1), length * self.steps.mean))
        quantiles, means_below = self._sums.table(length)
        largest = [mean * np.interp(_logit_of_largest(n, count, random), KNOTS, quantiles) for n, mean in kinds]
        slowest = np.maximum.reduce(largest)
        total = slowest.copy()
        for (n, mean), own in zip(kinds, largest, strict=True):
            others = n - (own == slowest)
            total += others * mean * np.interp(slowest / mean, quantiles, means_below)
        return Drawn(slowest, total[:, None] / self.workers)


def _logit_of_largest(n: int, count: int, random: np.random.Generator) -> Floats:
    """log(F / (1 - F)) at the largest of n draws: F^n is uniform there."""
    log_f = np.log(1 - random.random(count)) / n
    return np.asarray(np.minimum(log_f - np.log(-np.expm1(log_f) + 1e-300), KNOTS[-1]))


# --------------------------------------------------------------------------------------------------- simulation


class FailureQueue:
    """Which worker fails next, and when; each fails after an exponential time, and so does what replaces it.

    Args:
        mean_seconds: between two failures of one worker; math.inf for none.
    """

    def __init__(self, workers: int, mean_seconds: float, random: np.random.Generator) -> None:
        self._mean, self._random = mean_seconds, random
        self._events: list[tuple[float, int]] = []
        if math.isfinite(mean_seconds):
            self._events = list(zip(random.exponential(mean_seconds, workers).tolist(), range(workers), strict=True))
            heapq.heapify(self._events)

    @property
    def next_time(self) -> float:
        return self._events[0][0] if self._events else math.inf

    def pop(self) -> tuple[float, int]:
        seconds, worker = self._events[0]
        heapq.heapreplace(self._events, (seconds + self._random.exponential(self._mean), worker))
        return seconds, worker


@dataclass(frozen=True)
class Failures:
    """What failures cost.

    Args:
        mean_seconds: between two failures of one worker; math.inf for none.
        restart_seconds: until all work again at the last checkpoint.
        save_seconds: that a checkpoint stops all workers.
        save_every: steps; at the first boundary after them. None: no checkpoints.
        notice: "boundary": when the others meet; "at_once": all stop when one fails.
        give_up: seconds after which a run is called off.
    """

    mean_seconds: float = math.inf
    restart_seconds: float = 300.0
    save_seconds: float = 10.0
    save_every: int | None = None
    notice: Literal["boundary", "at_once"] = "boundary"
    give_up: float = math.inf


NO_FAILURES = Failures()


@dataclass
class Outcome:
    """Seconds, and bytes that a worker has sent; compute and waiting have one entry per column of the sampler.

    All of compute, waiting, communication and saving belong to work that was kept, all else is lost. Bytes are those of
    all averagings that ended, lost ones too.
    """

    total: float
    compute: Floats
    waiting: Floats
    communication: float
    saving: float
    lost: float
    bytes: float
    failures: int
    finished: bool = True

    def share(self, part: Literal["waiting", "communication", "saving", "lost"]) -> float:
        return float(np.mean(getattr(self, part))) / self.total


@dataclass
class _Clock:
    """Where a run is: rounds before `position` are done, those before `saved` cannot be lost."""

    now: float = 0.0
    position: int = 0
    saved: int = 0
    saved_at: float = 0.0  # when the work that is not saved began
    lost: float = 0.0
    bytes: float = 0.0
    failures: int = 0


class Simulation:
    """One run, from event to event.

    Args:
        model: communication and bytes of a round.
    """

    def __init__(
        self, schedule: Sequence[Round], model: CostModel, sampler: Sampler, failures: Failures, seed: Sequence[int]
    ) -> None:
        self._sampler, self._failures = sampler, failures
        self._random = np.random.default_rng(seed)
        self._queue = FailureQueue(model.workers, failures.mean_seconds, self._random)
        self._lengths = np.array([r.length for r in schedule], dtype=np.int64)
        costs = {r: model.round(Round(0, *r)) for r in {(r.length, r.mode) for r in schedule}}
        kinds = [costs[r.length, r.mode] for r in schedule]
        kinds[-1] = model.round(schedule[-1], last=True)
        self._communication = np.array([cost.communication for cost in kinds])
        self._bytes = np.array([cost.bytes for cost in kinds])
        self._saves = _saved_boundaries(self._lengths, failures.save_every)

    def run(self, queue: FailureQueue | None = None) -> Outcome:
        """Args: queue: of failures, in place of the drawn ones."""
        queue = queue or self._queue
        clock, drawn = _Clock(), self._sampler.draw(self._lengths, self._random)
        last = len(self._lengths)
        while clock.position < last and clock.now < self._failures.give_up:
            saving = self._saves[clock.position :] * self._failures.save_seconds
            durations = drawn.slowest[clock.position :] + self._communication[clock.position :] + saving
            ends = clock.now + np.cumsum(durations)
            reached = clock.position + int(np.searchsorted(ends, queue.next_time, side="right"))
            self._advance(clock, ends, reached)
            if reached < last:
                arrival = clock.now + float(drawn.slowest[reached])
                if queue.next_time >= arrival + self._communication[reached]:  # while its checkpoint is written
                    clock.bytes += float(self._bytes[reached])
                self._fail(clock, queue, arrival)
                again = slice(clock.saved, reached + 1)
                redrawn = self._sampler.draw(self._lengths[again], self._random)
                drawn.slowest[again], drawn.compute[again] = redrawn.slowest, redrawn.compute
        return self._outcome(clock, drawn)

    def _advance(self, clock: _Clock, ends: Floats, reached: int) -> None:
        """To the end of the last round before `reached`."""
        if reached == clock.position:
            return
        saves = np.flatnonzero(self._saves[clock.position : reached])
        if len(saves):
            clock.saved, clock.saved_at = clock.position + int(saves[-1]) + 1, float(ends[saves[-1]])
        clock.bytes += float(self._bytes[clock.position : reached].sum())
        clock.now, clock.position = float(ends[reached - clock.position - 1]), reached

    def _fail(self, clock: _Clock, queue: FailureQueue, arrival: float) -> None:
        """From a failure to the restart at the last checkpoint; machines fail in between, too.

        Args:
            arrival: when the last worker comes to the boundary of the round that fails.
        """
        failed, _ = queue.pop()
        clock.failures += 1
        noticed = max(failed, arrival) if self._failures.notice == "boundary" else failed
        restarted = noticed + self._failures.restart_seconds
        while queue.next_time < restarted:
            again, _ = queue.pop()
            clock.failures += 1
            if again > noticed:  # before that, it is one more that is missing at the boundary
                restarted = again + self._failures.restart_seconds
        clock.lost += restarted - clock.saved_at
        clock.now = clock.saved_at = restarted
        clock.position = clock.saved

    def _outcome(self, clock: _Clock, drawn: Drawn) -> Outcome:
        kept = slice(0, clock.position)
        compute = drawn.compute[kept].sum(axis=0)
        return Outcome(
            total=clock.now,
            compute=compute,
            waiting=(drawn.slowest[kept, None] - drawn.compute[kept]).sum(axis=0),
            communication=float(self._communication[kept].sum()),
            saving=float(self._saves[kept].sum()) * self._failures.save_seconds,
            lost=clock.lost,
            bytes=clock.bytes,
            failures=clock.failures,
            finished=clock.position == len(self._lengths),
        )


def _saved_boundaries(lengths: Counts, every: int | None) -> npt.NDArray[np.bool_]:
    """At which boundaries a checkpoint is written: the first after every so many steps, and not at the run's end."""
    saves, steps, due = np.zeros(len(lengths), dtype=bool), 0, every or math.inf
    for number, length in enumerate(lengths[:-1].tolist()):
        steps += length
        if every and steps >= due:
            saves[number], due = True, (steps // every + 1) * every
    return saves


# ------------------------------------------------------------------------------------------------------ the study


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
    """Steps between two checkpoints: Young's, and no more than the recipes'."""
    between = options.mtbf_hours * 3600 / workers
    young = math.sqrt(2 * options.failures.save_seconds * between)
    return max(1, round(min(options.failures.save_every or 3120, young / step_seconds)))


@dataclass
class Row:
    """Means over the runs of one strategy, kind of step times, and K; shares are of total."""

    steps: str
    strategy: str
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
    one_by_one: bool
    waiting_hours: float
    closed_waiting_hours: float
    closed_hours: float  # without failures and checkpoints


def study(options: Options) -> Iterator[Row]:
    network, mean = paper_network()
    schedules = {name: make_plan(RECIPES / recipe).rounds for name, recipe in STRATEGIES.items()}
    most = max(r.length for schedule in schedules.values() for r in schedule)
    tables: dict[tuple[float, str], Sums] = {}
    for kind, (steps_name, steps) in enumerate(kinds_of_steps(mean, options.cv).items()):
        if steps.cv and (steps.cv, steps.tail) not in tables:
            tables[steps.cv, steps.tail] = Sums(steps, most)
        for number, (name, schedule) in enumerate(schedules.items()):
            for workers in options.workers:
                model = _model(steps, network, workers, options.backward_share)
                one_by_one = workers <= DRAWN_ONE_BY_ONE
                sums = None if one_by_one else tables.get((steps.cv, steps.tail))
                sampler = Sampler(steps, workers, sums, one_by_one)
                failures = replace(
                    options.failures,
                    mean_seconds=options.mtbf_hours * 3600,
                    save_every=save_every(options, workers, mean),
                    give_up=100 * model.run(schedule).total,
                )
                outcomes = [
                    Simulation(schedule, model, sampler, failures, [options.seed, kind, number, workers, run]).run()
                    for run in range(options.runs)
                ]
                yield _row(steps_name, name, model, schedule, sampler, outcomes)


def _model(steps: Steps, network: Network, workers: int, backward_share: float) -> CostModel:
    payload = 4.0 * PARAMETERS
    return CostModel(steps.closed_form(workers), network, workers, payload, payload, backward_share=backward_share)


def _row(
    steps: str, name: str, model: CostModel, schedule: Sequence[Round], sampler: Sampler, outcomes: Sequence[Outcome]
) -> Row:
    closed, hours = model.run(schedule), [outcome.total / 3600 for outcome in outcomes]
    count = len(outcomes)
    return Row(
        steps=steps,
        strategy=name,
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
        one_by_one=sampler.one_by_one,
        waiting_hours=sum(float(np.mean(outcome.waiting)) for outcome in outcomes) / count / 3600,
        closed_waiting_hours=closed.waiting / 3600,
        closed_hours=closed.total / 3600,
    )


def tables(rows: Sequence[Row]) -> str:
    header = ["strategy", "K", "hours", "least to most", "waiting", "communication", "saving", "lost"]
    header += ["TB sent by a worker", "failures", "waiting, hours", "closed form : simulated waiting"]
    parts = []
    for kind in dict.fromkeys(row.steps for row in rows):
        lines = [f"\n### Step times: {kind}\n", _line(header), _line(["---"] * len(header))]
        lines += [_line(_cells(row)) for row in rows if row.steps == kind]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _cells(row: Row) -> list[str]:
    ratio = row.closed_waiting_hours / row.waiting_hours if row.waiting_hours > 1e-9 else math.nan
    return [
        row.strategy,
        f"{row.workers:,}",
        f"{row.hours:.1f}" + ("" if row.finished else " (called off)"),
        f"{row.least:.1f} to {row.most:.1f}",
        *(f"{100 * share:.1f} %" for share in (row.waiting, row.communication, row.saving, row.lost)),
        f"{row.bytes / 1e12:.2f}",
        f"{row.failures:.1f}",
        f"{row.waiting_hours:.2f}",
        f"{ratio:.2f}",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def paper_check() -> str:
    """The paper's other two times, at K = 64 and a quarter of the steps, which the model has not been fitted to."""
    network, mean = paper_network()
    cells = []
    for name, recipe, hours in (("parallel", "vit-b-b16384", 8.6), ("QSR", "vit-b-b16384-qsr-h4", 5.5)):
        schedule = make_plan(RECIPES / f"{recipe}.yaml").rounds
        total = _model(Steps(mean), network, 64, 0.0).run(schedule).total / 3600
        cells.append(f"{name} {total:.1f} h (paper {hours} h)")
    return "At K = 64 and batch 16384, without variance and failures: " + ", ".join(cells)


# ---------------------------------------------------------------------------------------------------------- plots


def plot(rows: Sequence[Row], prefix: str) -> list[str]:
    """Write PREFIX-time.png, PREFIX-idle.png and PREFIX-bytes.png; one panel for each kind of step times."""
    figures: dict[str, tuple[str, Callable[[Row], float]]] = {
        "time": ("hours", lambda row: row.hours),
        "idle": ("waiting for the slowest, % of kept time", lambda row: 100 * row.waiting / (1 - row.lost)),
        "bytes": ("TB that a worker sends", lambda row: row.bytes / 1e12),
    }
    written = []
    for name, (label, value) in figures.items():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.8), layout="constrained")
        kinds = list(dict.fromkeys(row.steps for row in rows))
        for panel, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
            for colour, strategy in enumerate(STRATEGIES):
                own = [row for row in rows if (row.steps, row.strategy) == (kind, strategy)]
                panel.plot([r.workers for r in own], [value(r) for r in own], ".-", c=f"C{colour}", label=strategy)
            panel.set(title=kind, xlabel="workers K", xscale="log")
            if name != "idle":
                panel.set_yscale("log")
                ticks = [n * 10**e for e in range(3) for n in (1, 2, 5)]
                low, high = min(map(value, rows)), max(map(value, rows))
                panel.set_yticks([t for t in ticks if low / 1.2 < t < high * 1.2])
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_formatter("")
            panel.grid(color="0.9")
        figure.axes[0].set_ylabel(label)
        lines, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
        written.append(f"{prefix}-{name}.png")
        figure.savefig(written[-1], dpi=80)
    return written


# ----------------------------------------------------------------------------------------------------- validation


@dataclass(frozen=True)
class Measured:
    """One run of --validate; see the text at the top."""

    model: str
    strategy: str
    workers: int
    bandwidth: float | None
    steps: int
    schedule: tuple[Round, ...]
    parameter_bytes: float
    gradient_bytes: float
    step_seconds: float
    step_cv: float
    seconds: float


def read_measured(path: str | Path) -> list[Measured]:
    """Raises: ConfigError: it is not a file as the text at the top says."""
    try:
        runs = json.loads(Path(path).read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path}: cannot be read as a JSON object with "runs": {error}') from error
    return [_measured(f"{path}: runs[{number}]", run) for number, run in enumerate(runs)]


def _measured(where: str, run: Mapping[str, Any]) -> Measured:
    keys = set(Measured.__dataclass_fields__) - {"schedule", "gradient_bytes"} | {"rounds"}
    if missing := sorted(keys - set(run)):
        raise ConfigError(f"{where}: {', '.join(missing)} missing; write what the text of this script says")
    schedule = tuple(_schedule(where, run))
    covered = sum(r.length for r in schedule)
    if covered != run["steps"]:
        raise ConfigError(f"{where}: rounds cover {covered} steps, and steps is {run['steps']}; write all rounds")
    kept = {key: run[key] for key in keys - {"rounds"}}
    return Measured(**kept, gradient_bytes=run.get("gradient_bytes", run["parameter_bytes"]), schedule=schedule)


def _schedule(where: str, run: Mapping[str, Any]) -> Iterator[Round]:
    if isinstance(run["rounds"], Mapping):
        yield from rounds(validate(QSRConfig, run["rounds"], where=where, prefix="rounds."))
        return
    if run["strategy"] == "post_local":
        raise ConfigError(f"{where}: rounds is a list, which does not say where post_local switches; write the block")
    step = 0
    for length in run["rounds"]:
        yield Round(step, length, "parallel" if run["strategy"] == "parallel" else "local")
        step += length


def simulate_measured(run: Measured, backward_share: float, runs: int, seed: int) -> float:
    """Mean simulated seconds of a measured run."""
    steps = Steps(run.step_seconds, run.step_cv)
    network = Network(math.inf if run.bandwidth is None else run.bandwidth)
    payloads = (run.parameter_bytes, run.gradient_bytes)
    model = CostModel(steps.closed_form(run.workers), network, run.workers, *payloads, backward_share=backward_share)
    sampler = Sampler(steps, run.workers, None, one_by_one=True)
    simulations = (Simulation(run.schedule, model, sampler, NO_FAILURES, [seed, number]) for number in range(runs))
    return sum(simulation.run().total for simulation in simulations) / runs


def validation(runs: Sequence[Measured], backward_share: float, repeats: int, seed: int) -> str:
    header = ["model", "strategy", "workers", "Mbit/s", "steps", "averagings", "measured, s", "simulated, s"]
    header += ["simulated : measured"]
    lines = [_line(header), _line(["---"] * len(header))]
    for run in runs:
        seconds = simulate_measured(run, backward_share, repeats, seed)
        rate = "no limit" if run.bandwidth is None else f"{run.bandwidth * 8 / 1e6:g}"
        cells = [run.model, run.strategy, str(run.workers), rate, str(run.steps), str(len(run.schedule))]
        lines.append(_line([*cells, f"{run.seconds:.2f}", f"{seconds:.2f}", f"{seconds / run.seconds:.3f}"]))
    return "\n".join(lines)


def facts(options: Options, seconds: float) -> dict[str, Any]:
    network, step = paper_network()
    return {
        **machine("numpy"),
        "seconds": round(seconds),
        "step_seconds": round(step, 4),
        "network": asdict(network),
        "options": {
            **asdict(options),
            "failures": {k: v for k, v in asdict(options.failures).items() if k not in ("mean_seconds", "give_up")},
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS), help="values of K")
    parser.add_argument("--runs", type=int, default=20, help="of each strategy and K, with seeds of their own")
    parser.add_argument("--cv", type=float, default=0.05, help="of a worker's steps")
    parser.add_argument("--mtbf-hours", type=float, default=50_000.0, help="between failures of one worker; inf: none")
    parser.add_argument("--restart-seconds", type=float, default=300.0)
    parser.add_argument("--save-seconds", type=float, default=10.0)
    parser.add_argument("--notice", choices=["boundary", "at_once"], default="boundary", help="of a failure")
    parser.add_argument("--backward-share", type=float, default=0.0, help="of a step, behind which gradients travel")
    parser.add_argument("--quick", action="store_true", help="K = 2, 64 and 4096, one run of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", metavar="FILE", help="compare with these measured runs instead")
    parser.add_argument("--json", help="write the figures here, too")
    parser.add_argument("--plots", metavar="PREFIX", help="draw them: PREFIX-time.png, -idle.png, -bytes.png")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error(f"--runs is {arguments.runs}; write 1 or more")
    return arguments


def main() -> None:
    arguments, started = _arguments(), time.perf_counter()
    if arguments.validate:
        measured = read_measured(arguments.validate)
        print(validation(measured, arguments.backward_share, arguments.runs, arguments.seed))
        return
    options = Options(
        workers=(2, 64, 4096) if arguments.quick else tuple(arguments.workers),
        runs=1 if arguments.quick else arguments.runs,
        cv=arguments.cv,
        mtbf_hours=arguments.mtbf_hours,
        backward_share=arguments.backward_share,
        failures=Failures(
            restart_seconds=arguments.restart_seconds,
            save_seconds=arguments.save_seconds,
            save_every=3120,
            notice=arguments.notice,
        ),
        seed=arguments.seed,
    )
    rows = list(study(options))
    print(tables(rows))
    print(f"\n{paper_check()}")
    found = facts(options, time.perf_counter() - started)
    print(json.dumps(found))
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"facts": found, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        )
    if arguments.plots:
        plot(rows, arguments.plots)


if __name__ == "__main__":
    main()
