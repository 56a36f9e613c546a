"""How fast does sharpness fall near a manifold of minimizers, beside what the paper's slow SDEs say?

    python -m benchmarks.slow_sde              # about 8 minutes on 2 cores, most of it in parallel's all-reduces
    python -m benchmarks.slow_sde --quick      # the two largest learning rates only; 90 seconds
    python -m benchmarks.slow_sde --trials 4000 --workers 2 4 8 --out FOLDER      # figures and a plot, too

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
from collections.abc import Sequence
from dataclasses import asdict, replace

from benchmarks.report import Report, parser, table
from benchmarks.slow_sde.measurement import Outcome, Pair, measure_all
from benchmarks.slow_sde.plots import Parts, plot, predicted_ratio, ratio
from benchmarks.slow_sde.theory import POWERS, Case, predicted_offset, predicted_speed

RATES = (0.04, 0.02, 0.01, 0.005)


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


def _titled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"{title}\n\n{table(columns, rows)}"


def tables(parts: Parts, found: dict[Case, Outcome]) -> str:
    predicted = ["predicted", "step by step"]
    rule = ["strategy", "K", "lr", "alpha", "longest round", "communication"]
    speeds = [*rule, "speed", "ratio to parallel", *predicted]
    along = ["strategy", "lr", "longest round", "its slow time", "speed", *predicted, "u v - 1", *predicted]
    qsr = [case for case in parts.b if case.strategy == "QSR"]
    decay = f"D. Cosine from {parts.d[0].lr:g} to 0, {parts.d[0].steps} steps"
    return "\n\n".join(
        [
            _titled("A. Constant learning rates", speeds, [_ratio_row(case, found, False) for case in parts.a]),
            _titled("B. QSR : parallel against K", speeds, [_ratio_row(case, found, False) for case in qsr]),
            _titled(
                f"C. Noise along the manifold, rho {parts.c[0].along:g}, K {parts.c[0].workers}",
                along,
                [_along_row(case, found) for case in parts.c],
            ),
            _titled(f"{decay}: the whole run", speeds, [_ratio_row(case, found, False) for case in parts.d]),
            _titled(f"{decay}: its last tenth", speeds, [_ratio_row(case, found, True) for case in parts.d]),
        ]
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--trials", type=int, default=1000)
    made.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8], help="values of K; the largest in A, C, D")
    made.add_argument("--quick", action="store_true", help="the two largest learning rates only")
    made.add_argument("--seed", type=int, default=0)
    arguments = made.parse_args()
    report = Report("slow-sde", arguments, ("torch",), backend="gloo")
    parts = make_parts(arguments)
    found = measure_all([*parts.a, *parts.b, *parts.c, *parts.d])
    report.add(tables(parts, found))
    report.save(results=[{"case": asdict(case), "outcome": asdict(outcome)} for case, outcome in found.items()])
    if report.stem:
        plot(parts, found, f"{report.stem}.png")


if __name__ == "__main__":
    main()
