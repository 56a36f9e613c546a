"""Speeds beside parallel's, drawn. Dots: measured, with 95 %. Dotted: the paper's equation. Solid: step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from benchmarks.slow_sde.measurement import Outcome, Pair
from benchmarks.slow_sde.theory import POWERS, Case, predict, predicted_offset, predicted_speed


@dataclass
class Parts:
    """A: over constant learning rates; B: over K; C: with noise along the manifold; D: a decaying rate."""

    a: list[Case]
    b: list[Case]
    c: list[Case]
    d: list[Case]


def ratio(case: Case, found: dict[Case, Outcome], part: str = "speed") -> Pair:
    """The speed beside that of parallel: measured, with its standard error."""
    own, base = (getattr(found[one], part) for one in (case, replace(case, strategy="parallel")))
    return own[0] / base[0], abs(own[0] / base[0]) * math.hypot(own[1] / own[0], base[1] / base[0])


def predicted_ratio(case: Case, finite: bool, since: float = 0.0) -> float:
    base = replace(case, strategy="parallel")
    return predicted_speed(case, finite, since) / predicted_speed(base, finite, since)


def plot(parts: Parts, found: dict[Case, Outcome], path: str) -> None:
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
