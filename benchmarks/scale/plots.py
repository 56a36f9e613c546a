"""Plots of the study: one panel for each kind of step times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.scale.study import STRATEGIES, Row

FIGURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "time": ("hours", lambda row: row.hours),
    "idle": ("waiting for the slowest, % of kept time", lambda row: 100 * row.waiting / (1 - row.lost)),
    "bytes": ("TB that a worker sends", lambda row: row.bytes / 1e12),
}


def plot(rows: Sequence[Row], prefix: str) -> None:
    """Write PREFIX-time.png, PREFIX-idle.png and PREFIX-bytes.png."""
    for name, (label, value) in FIGURES.items():
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        kinds = list(dict.fromkeys(row.steps for row in rows))
        for panel, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
            for colour, strategy in enumerate(STRATEGIES):
                for way, line in (("restart", ".-"), ("elastic", ".:")):
                    own = [row for row in rows if (row.steps, row.strategy, row.way) == (kind, strategy, way)]
                    named = strategy if way == "restart" else f"{strategy}, elastic"
                    panel.plot([r.workers for r in own], [value(r) for r in own], line, c=f"C{colour}", label=named)
            panel.set(title=kind, xlabel="workers K", xscale="log")
            if name != "idle":
                _logarithmic(panel, list(map(value, rows)))
            panel.grid(color="0.9")
        figure.axes[0].set_ylabel(label)
        lines, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=len(STRATEGIES), frameon=False)
        figure.savefig(f"{prefix}-{name}.png", dpi=80)


def _logarithmic(panel: Any, values: Sequence[float]) -> None:
    panel.set_yscale("log")
    ticks = [n * 10**e for e in range(3) for n in (1, 2, 5)]
    panel.set_yticks([t for t in ticks if min(values) / 1.2 < t < max(values) * 1.2])
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")
