"""How do alpha and h_base shape H, and with it averagings and the longest round? The pictures of docs/choosing-h.md.

    python -m benchmarks.choosing_h docs                # choosing-h-*.png in that folder; half a minute

Nothing is trained: rounds follow from the schedule alone. The runs are the paper's (Gu et al., arXiv 2310.14423): ViT-B
with AdamW, 300 epochs of 312 steps, and ResNet-152 with SGD, 200 epochs, both at batch 4096 with a cosine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.schedule import Round, averagings_percent, learning_rate, rounds

STEPS_PER_EPOCH = 312
VIT: dict[str, Any] = {
    "total_steps": 300 * STEPS_PER_EPOCH,
    "lr": {"schedule": "cosine", "peak": 0.008, "min": 1e-6, "warmup_steps": 10_000},
}
RESNET: dict[str, Any] = {
    "total_steps": 200 * STEPS_PER_EPOCH,
    "lr": {"schedule": "cosine", "peak": 0.8, "min": 1e-6, "warmup_steps": 5 * STEPS_PER_EPOCH},
}
PAPER = {"ViT-B: alpha 0.0175, h_base 4": (VIT, 0.0175, 4), "ResNet-152: alpha 0.2, h_base 2": (RESNET, 0.2, 2)}
RATIOS = [0.1 * 1.15**n for n in range(33)]  # alpha / peak, 0.1 to 8.8


def config(base: dict[str, Any], alpha: float, h_base: int, h_max: int | None = None) -> QSRConfig:
    return QSRConfig.model_validate({**base, "strategy": "qsr", "alpha": alpha, "h_base": h_base, "h_max": h_max})


def draw_periods(folder: Path) -> None:
    """H and the learning rate over the run, for the paper's two settings and another alpha of each."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, (name, (base, alpha, h_base)) in zip(figure.subplots(1, 2), PAPER.items(), strict=True):
        for factor, style in ((0.5, ":"), (1, "-"), (2, "--")):
            qsr = config(base, factor * alpha, h_base)
            panel.step(*_curve(list(rounds(qsr))), where="post", ls=style, c="C0", label=f"H, alpha {factor * alpha:g}")
        qsr = config(base, alpha, h_base)
        assert qsr.lr is not None
        steps = range(0, qsr.total_steps, 300)
        other = panel.twinx()
        other.plot(
            [s / STEPS_PER_EPOCH for s in steps], [learning_rate(qsr.lr, s, qsr.total_steps) for s in steps], "C1"
        )
        other.tick_params(axis="y", colors="C1")
        panel.set(title=name, xlabel="epoch", ylabel="H, steps", yscale="log")
        panel.legend(frameon=False, loc="upper center")
    figure.savefig(folder / "choosing-h-periods.png", dpi=80)


def _curve(schedule: Sequence[Round]) -> tuple[list[float], list[int]]:
    return [round_.start / STEPS_PER_EPOCH for round_ in schedule], [round_.length for round_ in schedule]


def draw_ratios(folder: Path) -> None:
    """Averagings and the longest round over alpha / peak, for a few h_bases, with the ViT's schedule."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, h_base in enumerate((2, 4, 8)):
        schedules = [list(rounds(config(VIT, ratio * 0.008, h_base))) for ratio in RATIOS]
        left.plot(RATIOS, [averagings_percent(s) for s in schedules], c=f"C{colour}", label=f"h_base {h_base}")
        longest = [max(round_.length for round_ in s) / STEPS_PER_EPOCH for s in schedules]
        right.plot(RATIOS, longest, c=f"C{colour}", label=f"h_base {h_base}")
    left.plot([0.0175 / 0.008], [10.4], "k.", ms=9, label="the paper's ViT-B")
    left.set(ylabel="averagings, % of steps", ylim=(0, None))
    right.set(ylabel="longest round, epochs", ylim=(0, None))
    for panel in (left, right):
        panel.set(xscale="log", xlabel="alpha / peak learning rate")
        panel.legend(frameon=False)
        panel.grid(color="0.9")
    figure.savefig(folder / "choosing-h-ratios.png", dpi=80)


def draw_limits(folder: Path) -> None:
    """What h_max costs: averagings over the longest round that is allowed, with the paper's ViT-B."""
    limits = [16, 32, 64, 128, 256, 312, 512, 1024, 2048, 4096, 8192]
    found = [averagings_percent(rounds(config(VIT, 0.0175, 4, h_max))) for h_max in limits]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    panel = figure.add_subplot()
    panel.plot(limits, found, ".-", c="C0")
    panel.axvline(STEPS_PER_EPOCH, c="grey", ls=":", label="an epoch")
    panel.set(xscale="log", xlabel="h_max, steps", ylabel="averagings, % of steps", ylim=(10, None))
    panel.legend(frameon=False)
    figure.savefig(folder / "choosing-h-limits.png", dpi=80)
    for h_max, share in zip(limits, found, strict=True):
        print(f"h_max {h_max:>5}: averagings {share:.2f} %")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    folder = made.parse_args().folder
    for draw in (draw_periods, draw_ratios, draw_limits):
        draw(folder)


if __name__ == "__main__":
    main()
