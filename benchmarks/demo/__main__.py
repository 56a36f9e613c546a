"""The end of `make demo`: a small frontier of accuracy over averagings, and three lines of what was seen.

    python -m benchmarks.demo --runs demo/runs --report demo/report

The runs are those of configs/digits-*.yaml. The frontier trains a small network in two processes, under a constant H
and under QSR at about as many averagings, with the same seeds. Every word that judges is computed.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo.frontier import STEPS, Result, Setting, run_all
from benchmarks.intervals import Interval, interval
from benchmarks.report import table
from qsr_engine.data import read_index
from qsr_engine.records.runs import figures, find_runs, read_run
from qsr_engine.records.seeds import Group, groups

SEEDS = 8
PAIRS = [  # a constant H, and QSR with about as many averagings, as benchmarks/demo_tune.py has found them
    (Setting.constant(4, 0.03), Setting.qsr(2, 1.5, 0.03)),
    (Setting.constant(8, 0.03), Setting.qsr(2, 2.5, 0.03)),
    (Setting.constant(16, 0.03), Setting.qsr(8, 2.5, 0.03)),
    (Setting.constant(32, 0.01), Setting.qsr(16, 4, 0.03)),
]
_NORMAL = 1.96  # standard deviations on both sides of a mean hold 95 %


def cost_line(found: Sequence[Group]) -> str:
    """What each strategy cost, against data parallel's cost."""
    base, *others = sorted(found, key=lambda group: group.strategy != "parallel")
    steps = figures(base.runs[0])["step"]

    def cost(group: Group) -> str:
        return f"{group.name} averaged {_mean(group, 'averagings'):.0f} times"

    said = [
        f"{cost(group)} (bytes: {_mean(group, 'bytes_percent'):.3g} %) in {3600 * _mean(group, 'hours'):.1f} s"
        for group in others
    ]
    return f"Cost of {steps} steps: {cost(base)} in {3600 * _mean(base, 'hours'):.1f} s, {', '.join(said)}."


def accuracy_line(found: Sequence[Group], images: int) -> str:
    """Mean accuracies over the seeds, and which differences are larger than so many images and these seeds can hide.

    The same images judge all, which makes differences surer than the interval of one accuracy says.
    """
    accuracies = {group.name: _mean(group, "accuracy_percent") for group in found}
    half = max(_NORMAL * math.sqrt(value * (100 - value) / images) for value in accuracies.values())
    spread = max(max(of_seeds) - min(of_seeds) for group in found if (of_seeds := _of_seeds(group)))
    best = max(accuracies, key=lambda name: accuracies[name])
    hidden = max(math.sqrt(2) * half, spread)
    behind = [name for name, value in accuracies.items() if accuracies[best] - value > hidden]
    shown = ", ".join(f"{name} {value:.2f} %" for name, value in accuracies.items())
    told = "which tells none of them apart" if not behind else f"which puts {' and '.join(behind)} behind {best}"
    return (
        f"Accuracy, mean of {len(found[0].runs)} seeds: {shown}; {images} images are sure to {half:.1f} points, and "
        f"seeds are up to {spread:.1f} apart, {told}."
    )


def _of_seeds(group: Group) -> list[float]:
    return [figures(run)["accuracy_percent"] for run in group.runs]


def frontier_line(rows: Sequence[tuple[float, Interval]], seeds: int) -> str:
    """What QSR gained over a constant H with about as many averagings."""
    words = {1: "ahead", -1: "behind", 0: "not told apart"}
    judged: dict[str, list[str]] = {}
    for percent, gain in rows:
        sign = 0 if abs(gain.mean) <= gain.half else int(math.copysign(1, gain.mean))
        judged.setdefault(words[sign], []).append(
            f"{percent:.3g} % ({gain.mean:+.2f} \N{PLUS-MINUS SIGN} {gain.half:.2f})"
        )
    told = "; ".join(f"{word} at {', '.join(points)}" for word, points in judged.items())
    return f"Frontier, {seeds} seeds: against a constant H with about as many averagings, QSR is {told}."


def _mean(group: Group, figure: str) -> float:
    value = group.mean(figure)
    if value is None:
        raise SystemExit(f"{group.name}: its runs do not tell {figure}")
    return value


def _draw(found: dict[str, list[Result]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for column, (label, colour) in enumerate((("constant H", "#D55E00"), ("QSR", "#009E73"))):
        own = [found[pair[column].name] for pair in PAIRS]
        told = [interval([result.accuracy for result in results]) for results in own]
        x = [results[0].averagings_percent for results in own]
        panel.errorbar(
            x, [i.mean for i in told], [i.half for i in told], label=label, color=colour, marker="o", capsize=4
        )
        for percent, value, pair in zip(x, told, PAIRS, strict=True):
            name = pair[column].name.removeprefix("constant ").removeprefix("QSR ")
            place, side = ((6, -12), "left") if column == 0 else ((-6, 8), "right")
            panel.annotate(
                name.replace(", ", "\n"),
                (percent, value.mean),
                place,
                textcoords="offset points",
                ha=side,
                fontsize=7,
                color=colour,
            )
    panel.set_xscale("log")
    panel.set_xlim(2, 32)
    panel.set_xticks([2, 3, 5, 10, 20, 30], labels=["2", "3", "5", "10", "20", "30"])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("averagings (% of steps)")
    panel.set_ylabel(f"accuracy (%), mean of {SEEDS} seeds\nand its 95 % interval")
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=Path, required=True, help="folder of the runs of configs/digits-*.yaml")
    made.add_argument("--report", type=Path, required=True, help="folder of the pictures")
    args = made.parse_args()
    runs = [read_run(path) for path in find_runs([args.runs])]
    strategies = groups(runs)
    if len(strategies) < 2:
        raise SystemExit(f"{args.runs}: needs finished runs of two strategies, with two seeds each")
    data: dict[str, Any] = runs[0].recipe["data"]
    images = read_index(data["shards"]).split(data["eval"]).samples
    print(f"A frontier: {2 * len(PAIRS)} settings of a small network, {SEEDS} seeds, {STEPS} steps each", flush=True)
    found: dict[str, list[Result]] = {}
    for result in run_all([setting for pair in PAIRS for setting in pair], range(SEEDS), args.report / "frontier.json"):
        found.setdefault(result.name, []).append(result)
    shown, gains = [], []
    for pair in PAIRS:
        constant, qsr = (found[setting.name] for setting in pair)
        gain = interval([b.accuracy - a.accuracy for a, b in zip(constant, qsr, strict=True)])
        gains.append((constant[0].averagings_percent, gain))
        for setting, results in zip(pair, (constant, qsr), strict=True):
            accuracy = interval([result.accuracy for result in results])
            shown.append([setting.name, f"{results[0].averagings_percent:.1f}", str(accuracy)])
    print(table(["setting", "averagings %", "accuracy % and its 95 % interval"], shown))
    _draw(found, args.report / "frontier.png")
    print(f"\n{args.report / 'frontier.png'}\n\nWhat was seen")
    for line in (cost_line(strategies), accuracy_line(strategies, images), frontier_line(gains, SEEDS)):
        print(textwrap.fill(line, 110, initial_indent="- ", subsequent_indent="  "))


if __name__ == "__main__":
    main()
