"""The learning rate, the period rules and the rounds of a run, as pure functions of the step.

Source: Gu, Lyu, Huang, Arora, Zhang, "A Quadratic Synchronization Rule for Distributed Deep Learning", ICLR 2024
(arXiv 2310.14423), Section 2 for the rule and Appendix B for the strategies and schedules that it compares.

A run of total_steps optimizer steps, counted from 0, is a sequence of rounds. Each round ends on a boundary. In a
`local` round of H steps every worker steps alone, and the parameters are averaged at the boundary. In a `parallel`
round, which is one step long, gradients are averaged instead; that is standard data parallel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from qsr_engine.config.qsr import LearningRateConfig, QSRConfig

Mode = Literal["local", "parallel"]


@dataclass(frozen=True)
class Round:
    """Steps start .. start + length - 1; the boundary is after the last of them."""

    start: int
    length: int
    mode: Mode


def learning_rate(lr: LearningRateConfig, step: int, total_steps: int) -> float:
    """Learning rate of one optimizer step: linear warm-up from min to peak, then the schedule.

    cosine       min + (peak - min) (1 + cos(pi t)) / 2, where t goes from 0 to 1 between warm-up and the end
    linear       min + (peak - min) (1 - t)
    step         peak x factor for each decay step reached
    cosine_step  the cosine, rounded to the nearest power of base (on a logarithmic scale)
    constant     peak
    """
    if step < lr.warmup_steps:
        return lr.min + step * (lr.peak - lr.min) / lr.warmup_steps
    span, done = max(1, total_steps - lr.warmup_steps), step - lr.warmup_steps
    t = min(1.0, done / span)
    if lr.schedule == "linear":
        # Not 1 - t: at the end of a long run the subtraction would leave few of its digits.
        return lr.min + (lr.peak - lr.min) * max(0, span - done) / span
    if lr.schedule == "step":
        return float(lr.peak * lr.factor ** sum(step >= decay for decay in lr.decay_steps))
    if lr.schedule == "constant":
        return lr.peak
    cosine = lr.min + (lr.peak - lr.min) * (1 + math.cos(math.pi * t)) / 2
    return _nearest_power(cosine, lr.base) if lr.schedule == "cosine_step" else cosine


def _nearest_power(value: float, base: float) -> float:
    return float(base ** round(math.log(value, base))) if value > 0 else 0.0


def mode(qsr: QSRConfig, step: int) -> Mode:
    """Whether this step averages gradients (`parallel`) or belongs to a round of local steps."""
    before_switch = qsr.switch_step is not None and step < qsr.switch_step
    return "parallel" if qsr.strategy == "parallel" or (qsr.strategy == "post_local" and before_switch) else "local"


def rises(qsr: QSRConfig, step: int, lr: float, before: float | None) -> bool:
    """Whether a warm-up of which the configuration says nothing is seen at the start of a round.

    So it is only for a learning rate that is read from the optimizer, and where warmup_steps is 0 or not given.

    Args:
        lr: learning rate of the round's first step.
        before: that of the round before; None where it is not known.
    """
    if qsr.lr is not None or qsr.warmup_steps:
        return False
    return lr > before if before is not None else step == 0 and lr == 0


def period(qsr: QSRConfig, step: int, lr: float, rising: bool = False) -> int:
    """H of the round that starts at this step, where lr is the learning rate of that step.

    The strategy `qsr` gives max(h_base, floor((alpha / lr)^power)), h_warmup while the learning rate warms up
    (step < warm-up, or rising), and h_base where alpha is 0. Whatever the strategy, 1 <= H <= total_steps - step, and
    H <= h_max; a round of `swap` also ends at switch_step, so that the last phase starts from an average.

    Args:
        rising: as rises() says.
    Raises:
        ValueError: the step is outside the run, or lr is negative or not a number.
    """
    remaining = qsr.total_steps - step
    if remaining < 1 or step < 0:
        raise ValueError(f"no round starts at step {step} of a run of {qsr.total_steps} steps")
    if not lr >= 0:
        raise ValueError(f"the learning rate of step {step} is {lr}; the period needs one that is 0 or more")
    if mode(qsr, step) == "parallel":
        return 1
    longest = min(remaining, qsr.h_max or remaining)
    if qsr.strategy == "swap" and qsr.switch_step is not None:
        return min(qsr.h_base, qsr.switch_step - step, longest) if step < qsr.switch_step else longest
    if qsr.strategy == "qsr" and (rising or step < qsr.period_warmup_steps):
        return min(qsr.h_warmup or qsr.h_base, longest)
    if qsr.strategy != "qsr" or not qsr.alpha:
        return min(qsr.h_base, longest)
    return min(max(qsr.h_base, _floor_power(qsr.alpha, lr, qsr.power, longest)), longest)


def _floor_power(alpha: float, lr: float, power: float, limit: int) -> int:
    """floor((alpha / lr)^power), at most limit; lr may be 0."""
    if lr == 0 or power * (math.log(alpha) - math.log(lr)) > math.log(limit + 1):
        return limit  # also where the power would overflow
    value: float = (alpha / lr) ** power
    # 0.3 / 0.1 is 2.9999999999999996 in floating point, and its square must count as 9. A division and a power are
    # wrong by less than 1e-14 relative for any exponent in use.
    return math.floor(value * (1 + 1e-12))


def rounds(qsr: QSRConfig, lr: Callable[[int], float] | None = None) -> Iterator[Round]:
    """All rounds of a run in order. They cover every step once, and the last ends at total_steps.

    Args:
        qsr: the run.
        lr: learning rate of a step; needed where the configuration has no `lr` block.
    """
    if lr is None:
        if qsr.lr is None:
            raise ValueError("the configuration has no lr block; give rounds() the learning rate as a function")
        lr = partial(learning_rate, qsr.lr, total_steps=qsr.total_steps)
    step, before = 0, None
    while step < qsr.total_steps:
        rate = lr(step)
        length = period(qsr, step, rate, rises(qsr, step, rate, before))
        yield Round(step, length, mode(qsr, step))
        step, before = step + length, rate


def due_fragments(length: int, taken: int, fragments: int) -> tuple[int, ...]:
    """The fragments of the parameters that are averaged after so many steps of a round of `length`.

    Number p (from 0) of P after floor((p + 1) length / P) steps, as torchft does it, and never before the first: each
    once a round, the last one at its end, and several at one step where the round is shorter than P. Source: Streaming
    DiLoCo (Douillard et al., arXiv 2501.18512), which averages fragments at steps of their own.
    """
    return tuple(p for p in range(fragments) if max(1, (p + 1) * length // fragments) == taken)


def averagings_percent(schedule: Iterable[Round]) -> float:
    """Averagings over steps, in per cent: the paper's relative communication, as each step of `parallel` averages once.

    How many bytes an averaging and a step of `parallel` send is another question: see local_steps.traffic.
    """
    count = steps = 0
    for round_ in schedule:
        count += 1
        steps += round_.length
    return 100.0 * count / steps
