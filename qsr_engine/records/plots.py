"""What `qsr report` draws of runs. Nothing here imports torch, nor pyplot with its global state."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsr_engine.config.extras import check_extra
from qsr_engine.records.members import counts, spans
from qsr_engine.records.runs import NORMS, Run, accuracies, figures, series, waiting_percent
from qsr_engine.records.seeds import groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart too; the dashes change with every turn through them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")


def plots(runs: Sequence[Run], out_dir: Path) -> list[Path]:
    """Draw the runs into out_dir, as PNG and as SVG, and return the PNGs.

    Only what a run has told is drawn: accuracy, or of a text the loss, where it was evaluated.

    Raises:
        ConfigError: matplotlib is not there.
    """
    check_extra("report", "matplotlib", "`qsr report`")
    drawings = [_period_and_lr]
    if any(accuracies(run) for run in runs):
        drawings += [_accuracy_over_communication, _accuracy_over_steps]
    if any(series(run, "eval_perplexity") for run in runs):
        drawings += [_loss_over_communication, _loss_over_steps]
    if any(waiting_percent(run.workers) for run in runs):
        drawings.append(_waiting_over_steps)
    if any(run.events for run in runs):
        drawings.append(_members_over_steps)
    if any(series(run, "sharpness") for run in runs):
        drawings.append(_sharpness_over_steps)
    if any(series(run, name) for run in runs for name in NORMS):
        drawings.append(_norms_over_steps)
    out_dir.mkdir(parents=True, exist_ok=True)
    files = [out_dir / f"{draw.__name__[1:]}.png" for draw in drawings]
    for draw, file in zip(drawings, files, strict=True):
        figure = draw(runs)
        figure.savefig(file, dpi=150)
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    return files


def _panels(runs: Sequence[Run], ylabels: Sequence[str], xlabel: str = "optimizer step") -> tuple[Figure, list[Any]]:
    """Panels above one another on one x axis, in a figure tall enough to name every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 2.6 * len(ylabels) + 0.2 * len(runs)), layout="constrained")
    axes = list(figure.subplots(len(ylabels), 1, sharex=True, squeeze=False)[:, 0])
    for panel, ylabel in zip(axes, ylabels, strict=True):
        panel.set_ylabel(ylabel)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(xlabel)
    return figure, axes


def _curve(index: int, runs: Sequence[Run]) -> dict[str, Any]:
    """Curves often lie on one another: earlier ones are wider, and show beneath the later ones."""
    width, dashes = 1.2 + 2.4 * (1 - (index + 1) / len(runs)), _DASHES[index // len(_COLOURS) % len(_DASHES)]
    return {"label": _label(runs[index]), "c": _COLOURS[index % len(_COLOURS)], "ls": dashes, "lw": width}


def _label(run: Run) -> str:
    facts = [run.strategy] * (run.strategy != run.name) + ["unfinished"] * (not run.finished)
    return f"{run.name} ({', '.join(facts)})" if facts else run.name


def _period_and_lr(runs: Sequence[Run]) -> Figure:
    """The paper's Figure 5, over steps."""
    figure, (period, rate) = _panels(runs, ["period H (steps)", "learning rate"])
    for index, run in enumerate(runs):
        steps, curve = [row["step"] for row in run.records], _curve(index, runs)
        period.plot(
            steps,
            [math.nan if row["period"] is None else row["period"] for row in run.records],
            drawstyle="steps-pre",
            **curve,
        )
        rate.plot(steps, [math.nan if row["lr"] is None else row["lr"] for row in run.records], **curve)
    period.set_yscale("log", base=2)
    period.yaxis.set_major_formatter("{x:g}")
    rate.set_ylim(bottom=0)
    figure.legend(handles=rate.lines, loc="outside lower center", frameon=False)
    return figure


def _accuracy_over_steps(runs: Sequence[Run]) -> Figure:
    """With panels for top-5 and for training where a run has them."""
    fields = {"eval_accuracy": "accuracy (%)", "eval_top5_accuracy": "top-5 (%)", "train_accuracy": "in training (%)"}
    return _over_steps(runs, fields)


def _loss_over_steps(runs: Sequence[Run]) -> Figure:
    return _over_steps(
        [run for run in runs if run.task == "text"], {"eval_loss": "held-out loss", "loss": "in training"}
    )


def _sharpness_over_steps(runs: Sequence[Run]) -> Figure:
    return _over_steps(runs, {"sharpness": "sharpness (largest eigenvalue)"}, log=True)


def _norms_over_steps(runs: Sequence[Run]) -> Figure:
    """Of gradient, parameters and optimizer state of rank 0's worker."""
    return _over_steps(runs, {name: f"L2 norm of {name.removesuffix('_norm')}" for name in NORMS}, log=True)


def _over_steps(runs: Sequence[Run], fields: Mapping[str, str], *, log: bool = False) -> Figure:
    """A panel for each of these fields that a run has, by their labels. At least one run must have one."""
    fields = {name: label for name, label in fields.items() if any(series(run, name) for run in runs)}
    figure, panels = _panels(runs, list(fields.values()))
    for panel, name in zip(panels, fields, strict=True):
        for index, run in enumerate(runs):
            if any(series(run, known) for known in fields):
                points = series(run, name) or [(0, math.nan)]  # named in the legend, drawn in another panel
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, **_curve(index, runs))
        if log:
            panel.set_yscale("log")
    figure.legend(handles=panels[0].lines, loc="outside lower center", frameon=False)
    return figure


def _waiting_over_steps(runs: Sequence[Run]) -> Figure:
    """How long workers wait at boundaries for the last to come: their mean, and from the least to the most."""
    figure, (panel,) = _panels(runs, ["waiting at boundaries (% of the time)"])
    for index, run in enumerate(runs):
        rows = [row for row in run.workers if row["seconds_waiting"] is not None]
        if not rows:
            continue
        steps = [row["step"] for row in rows]
        shares = [waiting_percent([row]) or [] for row in rows]
        curve = _curve(index, runs)
        panel.plot(steps, [statistics.mean(share) for share in shares], **curve)
        panel.fill_between(steps, list(map(min, shares)), list(map(max, shares)), color=curve["c"], alpha=0.15)
    panel.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


_NAMED = 32  # members that have a line of their own


def _members_over_steps(runs: Sequence[Run]) -> Figure:
    """How many members there were, and below, for each run that knows it, who was there; other events are dots."""
    known = [run for run in runs if run.events]
    figure, panels = _panels(known, ["members", *(f"{run.name}: who took part" for run in known)])
    for index, run in enumerate(known):
        points = counts(run.events, run.records[-1]["step"])
        panels[0].plot(*(zip(*points, strict=True) if points else ()), drawstyle="steps-post", **_curve(index, known))
    panels[0].set_ylim(bottom=0)
    panels[0].yaxis.get_major_locator().set_params(integer=True)
    for index, (run, panel) in enumerate(zip(known, panels[1:], strict=True)):
        taken = spans(run.events, run.records[-1]["step"])
        shown = dict(list(taken.items())[:_NAMED])
        for line, own in enumerate(shown.values()):
            panel.broken_barh(
                [(start, end - start) for start, end in own], (line - 0.35, 0.7), color=_COLOURS[index % len(_COLOURS)]
            )
        panel.set_yticks(range(len(shown)), labels=shown)
        panel.set_axisbelow(True)
        others = [event for event in run.events if event.event not in ("join", "leave", "data", "batch")]
        for event in others:
            line = list(shown).index(event.member) if event.member in shown else -1
            panel.plot(event.step, line, "ko", markersize=4)
            panel.annotate(event.event, (event.step, line), (6, 0), textcoords="offset points", va="center", fontsize=8)
        panel.set_ylim(len(shown) - 0.4, -1.6 if others else -0.6)
        if len(taken) > _NAMED:
            panel.set_title(f"the first {_NAMED} of {len(taken)}", fontsize="small")
    figure.legend(handles=panels[0].lines, loc="outside lower center", frameon=False)
    return figure


def _accuracy_over_communication(runs: Sequence[Run]) -> Figure:
    return _over_communication([run for run in runs if run.task == "images"], "accuracy_percent", "accuracy (%)")


def _loss_over_communication(runs: Sequence[Run]) -> Figure:
    return _over_communication([run for run in runs if run.task == "text"], "loss", "held-out loss")


def _over_communication(runs: Sequence[Run], reached: str, label_of_it: str) -> Figure:
    """A marker a run, hollow where it is unfinished, or a group, with its standard deviation as an error bar.

    The labels stand in a column, where none covers another.
    """
    found = groups(runs)
    grouped = {run.name for group in found for run in group.runs}
    shown: list[tuple[Any, Any, Any, str, bool]] = [
        (
            group.mean("averagings_percent"),
            group.mean(reached),
            group.deviation(reached),
            f"{group.name} ({group.strategy}, {len(group.runs)} runs)",
            True,
        )
        for group in found
    ]
    for run in runs:
        if run.name not in grouped:
            row = figures(run)
            shown.append((row["averagings_percent"], row[reached], None, _label(run), run.finished))
    points, (figure, (panel,)) = [], _panels(runs, [label_of_it], "averagings (% of steps)")
    for index, (x, y, deviation, label, finished) in enumerate(shown):
        if x is not None and y is not None:
            colour = _COLOURS[index % len(_COLOURS)]
            style = {"color": colour, "markerfacecolor": colour if finished else "white", "capsize": 4}
            panel.errorbar(x, y, yerr=deviation, fmt="o", markersize=8, **style)
            points.append((y, x, label))
    if points and max(xs := [x for _, x, _ in points]) > 10 * min(xs) > 0:
        panel.set_xscale("log")
        panel.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        panel.xaxis.set_major_formatter("{x:g}")
    bottom, top = panel.get_ylim()
    gap = min(0.075, 1 / max(1, len(points)))  # between two labels, as a fraction of the panel's height
    place, leader = -gap, {"arrowstyle": "-", "color": "0.75", "shrinkB": 5, "relpos": (0, 0.5)}
    for index, (y, x, label) in enumerate(sorted(points), start=1):
        place = min(max((y - bottom) / (top - bottom), place + gap), 1 - gap * (len(points) - index))
        panel.annotate(label, (x, y), (1.04, place), textcoords="axes fraction", va="center", arrowprops=leader)
    return figure
