"""What is measured: every rank is a worker, and takes its steps through LocalSteps, Averager and the schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import ranks
from benchmarks.slow_sde.theory import START, START_Q, Case
from qsr_engine.averaging import Averager
from qsr_engine.local_steps.steps import LocalSteps

LATE = 0.9  # the last part of a run begins here, in slow time
TICKS = 40  # points of a curve
Pair = tuple[float, float]  # a value and its standard error
NOTHING: Pair = (math.nan, math.nan)


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


def measure_in_turn(cases: Sequence[Case]) -> list[Outcome]:
    """In every rank: the cases one after another."""
    dist.init_process_group("gloo")
    outcomes = []
    for number, case in enumerate(cases):
        outcomes.append(measure(case, number))
        if dist.get_rank() == 0:
            print(f"K {case.workers}, {case.strategy}, lr {case.lr:g}: {outcomes[-1].seconds:.1f} s", flush=True)
    return outcomes


def measure_all(cases: Sequence[Case]) -> dict[Case, Outcome]:
    """Start as many processes as there are workers, for each number of workers once."""
    found: dict[Case, Outcome] = {}
    for workers in sorted({case.workers for case in cases}):
        chosen = [case for case in dict.fromkeys(cases) if case.workers == workers]
        found |= zip(chosen, ranks.run(measure_in_turn, chosen, on_each=workers), strict=True)
    return found
