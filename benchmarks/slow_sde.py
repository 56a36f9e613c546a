"""How fast does sharpness fall near a manifold of minimizers, beside what the paper's slow SDEs say?

    python benchmarks/slow_sde.py              # about 8 minutes on 2 cores, most of it in parallel's all-reduces
    python benchmarks/slow_sde.py --quick      # the two largest learning rates only; 90 seconds
    python benchmarks/slow_sde.py --trials 4000 --workers 2 4 8 --json OUT.json --plot OUT.png

Source: Section 3 of the paper (Gu et al., arXiv 2310.14423). Near a manifold of minimizers SGD drifts along it, at a
speed that is of order 1 in *slow time*, the sum of lr^2 over the steps. With K workers, total batch B, gradient noise
of covariance S, a Hessian of eigenvalues l_i, and M_ij = S_ij / (l_i + l_j), parallel's drift is -1/(2B) times the
third derivative of the loss applied to M. Local steps add K - 1 times the same, with M_ij psi((l_i + l_j) lr H) for
M_ij, where psi(x) = 1 - (1 - e^-x) / x grows from 0 to 1. Constant H ends at parallel's drift as lr falls, H ~ 1/lr
lies between, and QSR, whatever its alpha, ends at K times parallel's. So does power 3 here, but its slow time of a
round, lr^2 H, grows without bound, and no slow SDE is claimed for it.

**The smallest case**, f = u v, with label noise: loss (u v - y)^2 / 2, y = 1 + noise of variance 1, one fresh label for
each worker and step, so that B = K. Where u v = 1 the Hessian has one eigenvalue other than 0, the sharpness
l = u^2 + v^2. Let q = u^2 - v^2. Gradient flow conserves q, so the minimizer to which the parameters would settle has
the sharpness sqrt(q^2 + 4), which is measured: it is free of the noise across the manifold. With r = u v - y,

    a step             u, v <- u - lr r v, v - lr r u, so q <- q (1 - lr^2 r^2), exactly
    parallel           E r^2 = 1/K,  so d log q / dt = -1/K in slow time t
    a local step       E r^2 = 1, so q falls K times as fast; each worker moves across the manifold on its own
    a boundary         the average loses the workers' variance across the manifold, V, and q <- q (1 + V / l),
                       V = (1 - 1/K) (lr / 2) (1 - e^(-2 l lr H)), which gives back a part of what H steps have won
    together           d log q / dt = -(1 + (K - 1) psi(2 l lr H)) / K, the paper's equation

*Speed* is -K times d log q / dt, the mean over a run: 1 for parallel as lr -> 0. The tables compare it with the paper's
equation, and with the same account kept step by step (`step_by_step`), which is right to the next order in lr and also
where lr falls within a round. Neither reads a measured number or the engine's schedule of rounds.

Label noise vanishes along the manifold, so all workers drift alike, and long rounds do no harm. Part C adds noise along
it: a gradient rho n (u, -v). The slow SDE then says speed - rho^2 for the mean of q. Workers part along the manifold,
which is a curve, so their average leaves it: u v - 1 is (1 - 1/K) rho^2 lr^2 H to lowest order. lr^2 H is alpha^2 for
QSR. For power 3 it grows as lr falls: the average leaves the region in which the approximation holds. To the
next order in lr the noise itself moves u v - 1 by -lr (3/2 - 1/(2K) + rho^2) / l.

Every worker is a process (gloo), and takes its steps through LocalSteps, Averager and the schedule of qsr_engine.
Intervals are 95 %, normal, over trials; where speeds are divided, by the delta method.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hardware import machine
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from qsr_engine.averaging import Averager
from qsr_engine.config.qsr import LearningRateConfig, QSRConfig
from qsr_engine.local_steps.steps import LocalSteps
from qsr_engine.schedule import learning_rate

POWERS = {"parallel": None, "constant H": 0, "H ~ 1/lr": 1, "QSR": 2, "power 3": 3}
PEAK = 0.04  # the learning rate at which every rule gives the same period
RATES = (0.04, 0.02, 0.01, 0.005)
START = (2.0, 0.5)  # u, v
START_Q = START[0] ** 2 - START[1] ** 2
LATE = 0.9  # the last part of a run begins here, in slow time
TICKS = 40  # points of a curve
Pair = tuple[float, float]  # a value and its standard error
NOTHING: Pair = (math.nan, math.nan)


@dataclass(frozen=True)
class Case:
    """One run of all trials: `period` is H at the learning rate PEAK, `along` is rho, `slow_time` the run's length."""

    strategy: str
    workers: int
    lr: float
    trials: int
    decaying: bool = False
    slow_time: float = 0.125
    period: int = 8
    along: float = 0.0
    seed: int = 0

    @property
    def steps(self) -> int:
        mean_square = 3 / 8 if self.decaying else 1.0  # of a cosine from 1 to 0
        return round(self.slow_time / (mean_square * self.lr**2))

    def rates(self) -> list[float]:
        """The learning rate of every step."""
        config = LearningRateConfig(schedule="cosine" if self.decaying else "constant", peak=self.lr)
        return [learning_rate(config, step, self.steps) for step in range(self.steps)]

    @property
    def alpha(self) -> float | None:
        """As the paper's H = (alpha / lr)^power has it."""
        power = POWERS[self.strategy]
        return PEAK * math.pow(self.period, 1 / power) if power else None

    @property
    def qsr(self) -> QSRConfig:
        power = POWERS[self.strategy]
        rule: dict[str, Any] = {"strategy": "qsr", "alpha": self.alpha, "power": float(power or 1)}
        if power is None:
            rule = {"strategy": "parallel"}
        elif power == 0:
            rule = {"strategy": "constant", "h_base": self.period}
        lr = LearningRateConfig(schedule="cosine" if self.decaying else "constant", peak=self.lr)
        return QSRConfig(**rule, total_steps=self.steps, lr=lr)


@dataclass
class Outcome:
    """What one Case gave; speeds are in the unit of the text above."""

    speed: Pair
    late: Pair  # the speed from late_from to the end; this and offset are not a number where there is none
    late_from: float  # slow time
    curve: list[tuple[float, float, float]]  # slow time, sharpness, its standard error
    offset: Pair  # u v - 1 of the average, after the last of the longest rounds
    longest: int  # steps of that round
    averagings: int
    seconds: float


# ------------------------------------------------------------------------------------------------------- theory


def psi(x: float) -> float:
    """How independent the workers' noise across the manifold is, over a round; x = 2 sharpness lr H."""
    return 1 + math.expm1(-x) / x if x > 1e-4 else x / 2 - x * x / 6


def slow_sde(case: Case) -> tuple[list[float], list[float]]:
    """Slow time and q after every step, by the paper's equation; H is (alpha / lr)^power at every moment."""
    power, times, values = POWERS[case.strategy], [0.0], [START_Q]
    for lr in case.rates():
        q, speed = values[-1], 1.0
        if power is not None:
            x = 2 * math.hypot(q, 2) * lr * case.period * (PEAK / lr) ** power
            speed += (case.workers - 1) * psi(x)
        times.append(times[-1] + lr**2)
        values.append(q * math.exp(-(lr**2) * (speed - case.along**2) / case.workers))
    return times, values


def step_by_step(case: Case) -> tuple[list[float], list[float]]:
    """Slow time and q at every boundary, from the variances across the manifold: of the average, and of each worker
    about it but for a factor 1 - 1/K, which starts from 0 in every round. H is set at the start of a round."""
    power, rates = POWERS[case.strategy], case.rates()
    others, times, values = 1 - 1 / case.workers, [0.0], [START_Q]
    average = apart = slow = 0.0
    q, end = START_Q, 0
    for step, lr in enumerate(rates):
        if step == end:
            period = 1 if power is None else math.floor(case.period * (PEAK / lr) ** power + 1e-9)
            end = min(step + period, len(rates))
        sharpness = math.hypot(q, 2)
        noise = 1 / case.workers if power is None else 1.0
        q *= math.exp(-(lr**2) * (noise + sharpness * (average + others * apart) - case.along**2 / case.workers))
        kept, added = (1 - lr * sharpness) ** 2, lr**2 * sharpness
        average = kept * average + added / case.workers
        slow += lr**2
        if power is not None:
            apart = kept * apart + added
        if step + 1 == end:
            q *= 1 + others * apart / sharpness
            apart = 0.0
            times.append(slow)
            values.append(q)
    return times, values


def predict(case: Case, finite: bool) -> tuple[list[float], list[float]]:
    return step_by_step(case) if finite else slow_sde(case)


def predicted_speed(case: Case, finite: bool, since: float = 0.0) -> float:
    """The mean speed from this slow time to the end."""
    times, values = predict(case, finite)
    first = min(bisect_left(times, since * (1 - 1e-9)), len(times) - 2)
    return case.workers * math.log(values[first] / values[-1]) / (times[-1] - times[first])


def predicted_offset(case: Case, finite: bool) -> float:
    """u v - 1 of the average after a long round, to lowest order in the round's slow time, and in lr where finite."""
    power, noise = POWERS[case.strategy] or 0, case.along**2
    offset = (1 - 1 / case.workers) * noise * case.lr**2 * case.period * math.pow(PEAK / case.lr, power)
    sharpness = math.hypot(predict(case, finite)[1][-1], 2)
    return offset - (case.lr * (3 / 2 - 1 / (2 * case.workers) + noise) / sharpness if finite else 0)


# -------------------------------------------------------------------------------------------------- measurement


def measure(case: Case, number: int = 0) -> Outcome:
    """Run all trials; every rank of the process group is one worker, and all call it with the same arguments."""
    started, qsr = time.perf_counter(), case.qsr
    seed = ((case.seed * 100 + case.workers) * 1000 + number) * 100 + dist.get_rank()
    generator = torch.Generator().manual_seed(seed)
    flat = torch.tensor(START, dtype=torch.float64).repeat_interleave(case.trials)
    local = LocalSteps(qsr, Averager([flat], None, qsr.averaging), digest=0)
    parameters = flat.view(2, case.trials)
    before_late = torch.full((case.trials,), START_Q, dtype=torch.float64)
    late_from = slow = 0.0
    curve = [(0.0, *_mean(_sharpness(before_late)))]
    offset, longest = NOTHING, 1
    while not local.finished:
        lr, period, mode = local.learning_rate, local.period, local.mode
        local.begin_forward()
        gradient = _gradient(parameters, case.along, generator)
        if mode == "parallel":
            dist.all_reduce(gradient)
            gradient /= case.workers
        local.begin_update()
        parameters.sub_(gradient, alpha=lr)
        slow += lr**2
        if not local.advance():
            continue
        if mode == "local" and period >= longest:
            longest, offset = period, _mean(parameters[0] * parameters[1] - 1)
        if slow >= case.slow_time * len(curve) / TICKS or local.finished:
            curve.append((slow, *_mean(_sharpness(_q(parameters)))))
        if not late_from and slow >= LATE * case.slow_time and not local.finished:
            late_from, before_late = slow, _q(parameters)
    last, start = _q(parameters), torch.full_like(before_late, START_Q)
    late = _speed(before_late, last, slow - late_from, case) if late_from else NOTHING
    seconds = time.perf_counter() - started
    return Outcome(_speed(start, last, slow, case), late, late_from, curve, offset, longest, local.averagings, seconds)


def _gradient(parameters: Tensor, along: float, generator: torch.Generator) -> Tensor:
    """Of one label for each trial, and the noise along the manifold."""
    u, v = parameters
    error = u * v - 1 - torch.randn(u.shape, generator=generator, dtype=u.dtype)
    gradient = torch.stack([error * v, error * u])
    if along:
        noise = along * torch.randn(u.shape, generator=generator, dtype=u.dtype)
        gradient += torch.stack([noise * u, -noise * v])
    return gradient


def _q(parameters: Tensor) -> Tensor:
    return parameters[0] ** 2 - parameters[1] ** 2


def _sharpness(q: Tensor) -> Tensor:
    return (q**2 + 4).sqrt()


def _mean(values: Tensor) -> Pair:
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def _speed(before: Tensor, after: Tensor, slow_time: float, case: Case) -> Pair:
    """From the trials' q at both ends; that of the mean of q, since its equation is linear."""
    scale, means = case.workers / slow_time, (before.mean(), after.mean())
    error = (after / means[1] - before / means[0]).std() / math.sqrt(len(after))
    return scale * math.log(means[0] / means[1]), scale * error.item()


def _worker(rank: int, workers: int, cases: Sequence[Case], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store-{workers}", rank=rank, world_size=workers)
    outcomes = []
    for number, case in enumerate(cases):
        outcomes.append(measure(case, number))
        if rank == 0:
            print(f"K {workers}, {case.strategy}, lr {case.lr:g}: {outcomes[-1].seconds:.1f} s", flush=True)
    if rank == 0:
        torch.save([asdict(outcome) for outcome in outcomes], f"{folder}/{workers}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measure_all(cases: Sequence[Case]) -> dict[Case, Outcome]:
    """Start as many processes as there are workers, for each number of workers once."""
    found: dict[Case, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in sorted({case.workers for case in cases}):
            chosen = [case for case in dict.fromkeys(cases) if case.workers == workers]
            spawn(_worker, args=(workers, chosen, folder), nprocs=workers)  # type: ignore[no-untyped-call]
            outcomes = torch.load(f"{folder}/{workers}.pt")
            found |= {case: Outcome(**outcome) for case, outcome in zip(chosen, outcomes, strict=True)}
    return found


# ------------------------------------------------------------------------------------------------------- tables


@dataclass
class Parts:
    """A: over constant learning rates; B: over K; C: with noise along the manifold; D: a decaying rate."""

    a: list[Case]
    b: list[Case]
    c: list[Case]
    d: list[Case]


def make_parts(arguments: argparse.Namespace) -> Parts:
    rates = RATES[:2] if arguments.quick else RATES
    most = max(arguments.workers)
    plain = Case("parallel", most, rates[0], arguments.trials, seed=arguments.seed)
    along = replace(plain, along=1.0, period=25, slow_time=0.5, trials=4 * arguments.trials)
    return Parts(
        a=[replace(plain, strategy=name, lr=lr) for name in POWERS for lr in rates],
        b=[
            replace(plain, strategy=name, lr=rates[-1], workers=workers)
            for workers in arguments.workers
            for name in ("parallel", "QSR")
        ],
        c=[replace(along, strategy=name, lr=lr) for name in ("QSR", "power 3") for lr in rates],
        d=[replace(plain, strategy=name, decaying=True, slow_time=1.0) for name in POWERS],
    )


def _interval(value: Pair, digits: int = 3) -> str:
    half = 1.96 * value[1]
    return f"{value[0]:.{digits}f} [{value[0] - half:.{digits}f}, {value[0] + half:.{digits}f}]"


def ratio(case: Case, found: dict[Case, Outcome], part: str = "speed") -> Pair:
    """The speed beside that of parallel: measured, with its standard error."""
    own, base = (getattr(found[one], part) for one in (case, replace(case, strategy="parallel")))
    return own[0] / base[0], abs(own[0] / base[0]) * math.hypot(own[1] / own[0], base[1] / base[0])


def predicted_ratio(case: Case, finite: bool, since: float = 0.0) -> float:
    base = replace(case, strategy="parallel")
    return predicted_speed(case, finite, since) / predicted_speed(base, finite, since)


def _ratio_row(case: Case, found: dict[Case, Outcome], late: bool) -> list[str]:
    own = found[case]
    part, since = ("late", own.late_from) if late else ("speed", 0.0)
    return [
        case.strategy,
        str(case.workers),
        f"{case.lr:g}",
        "" if case.alpha is None else f"{case.alpha:.3f}",
        str(own.longest),
        f"{100 * own.averagings / case.steps:.2f} %",
        _interval(getattr(own, part)),
        "1" if case.strategy == "parallel" else _interval(ratio(case, found, part)),
        *(f"{predicted_ratio(case, finite, since):.3f}" for finite in (False, True)),
    ]


def _along_row(case: Case, found: dict[Case, Outcome]) -> list[str]:
    own = found[case]
    return [
        case.strategy,
        f"{case.lr:g}",
        str(own.longest),
        f"{own.longest * case.lr**2:.3f}",
        _interval(own.speed, 2),
        *(f"{predicted_speed(case, finite):.2f}" for finite in (False, True)),
        _interval(own.offset, 4),
        *(f"{predicted_offset(case, finite):.4f}" for finite in (False, True)),
    ]


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(["", title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def tables(parts: Parts, found: dict[Case, Outcome]) -> str:
    predicted = ["predicted", "step by step"]
    rule = ["strategy", "K", "lr", "alpha", "longest round", "communication"]
    speeds = [*rule, "speed", "ratio to parallel", *predicted]
    along = ["strategy", "lr", "longest round", "its slow time", "speed", *predicted, "u v - 1", *predicted]
    qsr = [case for case in parts.b if case.strategy == "QSR"]
    decay = f"D. Cosine from {parts.d[0].lr:g} to 0, {parts.d[0].steps} steps"
    return "\n".join(
        [
            _table("A. Constant learning rates", speeds, [_ratio_row(case, found, False) for case in parts.a]),
            _table("B. QSR : parallel against K", speeds, [_ratio_row(case, found, False) for case in qsr]),
            _table(
                f"C. Noise along the manifold, rho {parts.c[0].along:g}, K {parts.c[0].workers}",
                along,
                [_along_row(case, found) for case in parts.c],
            ),
            _table(f"{decay}: the whole run", speeds, [_ratio_row(case, found, False) for case in parts.d]),
            _table(f"{decay}: its last tenth", speeds, [_ratio_row(case, found, True) for case in parts.d]),
        ]
    )


# --------------------------------------------------------------------------------------------------------- plot


def plot(parts: Parts, found: dict[Case, Outcome], path: str) -> None:
    """Dots: measured, with 95 %. Dotted lines: the paper's equation. Solid lines: step by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (rates, workers), (decay, offset) = figure.subplots(2, 2)
    for colour, name in enumerate(POWERS):
        style = {"label": name, "c": f"C{colour}"}
        a, b, c, d = ([case for case in part if case.strategy == name] for part in (parts.a, parts.b, parts.c, parts.d))
        lrs = [case.lr for case in a]
        if name != "parallel":
            _draw(rates, lrs, [ratio(case, found) for case in a], _lines(predicted_ratio, a), style)
        if name == "QSR":
            counts = [case.workers for case in b]
            _draw(workers, counts, [ratio(case, found) for case in b], _lines(predicted_ratio, b), style)
        if c:
            _draw(offset, lrs, [found[case].offset for case in c], _lines(predicted_offset, c), style)
        for case in d:
            lines = [(times, [math.hypot(q, 2) for q in qs]) for times, qs in (predict(case, f) for f in (False, True))]
            curve = found[case].curve
            _draw(decay, [point[0] for point in curve], [point[1:] for point in curve], lines, style)
    workers.plot(counts, counts, "--", c="0.6", label="K")
    labels = [
        (rates, "learning rate, constant", f"speed : parallel's, K = {parts.a[0].workers}"),
        (workers, f"workers K, lr = {parts.b[0].lr:g}", "speed : parallel's"),
        (decay, "slow time, cosine to 0", "sharpness"),
        (offset, "learning rate, constant, noise along the manifold", "u v - 1 of the average"),
    ]
    for panel, x, y in labels:
        panel.set(xlabel=x, ylabel=y)
        panel.grid(color="0.9")
        panel.legend(frameon=False)
    workers.set_xticks(counts)
    for panel in (rates, offset):
        panel.set_xscale("log")
        panel.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        panel.minorticks_off()
    figure.savefig(path, dpi=80)


def _lines(predicted: Callable[[Case, bool], float], cases: Sequence[Case]) -> list[tuple[None, list[float]]]:
    return [(None, [predicted(case, finite) for case in cases]) for finite in (False, True)]


def _draw(
    panel: Any, xs: Sequence[float], points: Sequence[Pair], lines: Sequence[tuple[Any, Any]], style: dict[str, str]
) -> None:
    panel.errorbar(xs, [p[0] for p in points], [1.96 * p[1] for p in points], fmt=".", **style)
    for (places, line), dashes in zip(lines, (":", "-"), strict=True):
        panel.plot(places or xs, line, dashes, lw=1, c=style["c"])


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **machine("torch"),
        "backend": "gloo",
        **{key: value for key, value in vars(arguments).items() if key not in ("json", "plot")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8], help="values of K; the largest in A, C, D")
    parser.add_argument("--quick", action="store_true", help="the two largest learning rates only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the figures here, too")
    parser.add_argument("--plot", help="draw them here")
    arguments = parser.parse_args()
    parts, started = make_parts(arguments), time.perf_counter()
    found = measure_all([*parts.a, *parts.b, *parts.c, *parts.d])
    print(tables(parts, found))
    print(json.dumps({**facts(arguments), "seconds": round(time.perf_counter() - started)}))
    if arguments.json:
        results = [{"case": asdict(case), "outcome": asdict(outcome)} for case, outcome in found.items()]
        Path(arguments.json).write_text(json.dumps({"facts": facts(arguments), "results": results}, indent=1) + "\n")
    if arguments.plot:
        plot(parts, found, arguments.plot)


if __name__ == "__main__":
    main()
