"""Which alpha and h_base? A few of each around a recipe's, with what they cost and where their limits are.

docs/choosing-h.md says how to read it.
"""

from __future__ import annotations

import math
from typing import Any

from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import bytes_text, seconds_text
from qsr_engine.planning.cost import count
from qsr_engine.planning.forecast import HOUR, Forecast, spell
from qsr_engine.planning.plan import rounds_of
from qsr_engine.schedule import Round

FACTORS = (0.5, 1.0, 2.0)  # of the recipe's alpha and h_base


def choices(forecast: Forecast, failure_seconds: float | None = None) -> list[dict[str, Any]]:
    """One row for each alpha and h_base; what is not known is None.

    Args:
        failure_seconds: expected time between two failures of the whole run; None: nobody says.
    Raises:
        ConfigError: the recipe has no alpha or no learning rate to start from, or failures are asked for without hours.
    """
    plan, own = forecast.plan, forecast.plan.qsr
    if own.lr is None or not own.alpha:
        raise ConfigError(
            f"{plan.name}: --choose tries values around an alpha, beside a learning rate, and "
            f"{'there is no block qsr.lr' if own.lr is None else 'qsr.alpha is not given'}; write "
            "qsr.alpha (the paper's are 2.2 of the peak rate for ViT-B and 0.25 for ResNets) and the block qsr.lr"
        )
    if failure_seconds is not None and forecast.costs is None:
        raise ConfigError("--failures needs the hours of a round; write --step-seconds and the other costs")
    h_bases = sorted({max(1, round(factor * own.h_base)) for factor in FACTORS})
    return [
        _choice(forecast, factor * own.alpha, h_base, failure_seconds)
        for h_base in h_bases
        if own.h_max is None or h_base <= own.h_max
        for factor in FACTORS
    ]


def _choice(forecast: Forecast, alpha: float, h_base: int, failure_seconds: float | None) -> dict[str, Any]:
    plan, own = forecast.plan, forecast.plan.qsr
    assert own.lr is not None
    qsr = own.model_copy(update={"strategy": "qsr", "alpha": alpha, "h_base": h_base, "switch_step": None})
    rounds = list(rounds_of(qsr))
    longest, first = max(rounds, key=lambda round_: round_.length), _leaves(rounds, h_base, qsr.period_warmup_steps)
    run, costs = forecast.row(count("qsr", rounds)), forecast.costs
    seconds = None if costs is None else longest.length * costs.step_seconds + costs.averaging_seconds
    failing = None if seconds is None or failure_seconds is None else 100 * -math.expm1(-seconds / failure_seconds)
    return {
        "alpha": alpha,
        "alpha_over_peak": alpha / own.lr.peak,
        "h_base": h_base,
        "own": qsr == own,
        **{key: run[key] for key in ("averagings", "averagings_percent", "bytes_sent", "bytes_percent", "hours")},
        "leaves_h_base": None if first is None else {"step": first, "epoch": plan.epoch(first)},
        "longest_round": {
            "start_step": longest.start,
            "length": longest.length,
            "epochs": plan.epoch(longest.length),
            "hours": seconds and seconds / HOUR,
            "percent_of_run": 100 * longest.length / own.total_steps,
            "failure_percent": failing,
        },
    }


def _leaves(rounds: list[Round], h_base: int, warmup_steps: int) -> int | None:
    """The first step after the warm-up whose round is longer than h_base."""
    return next((r.start for r in rounds if r.length > h_base and r.start >= warmup_steps), None)


def choices_text(rows: list[dict[str, Any]], failure_seconds: float | None) -> str:
    """The rows as a table, with what its columns mean."""
    form = "{:1} {:>8} {:>10} {:>6} {:>12} {:>8} {:>9} {:>7} {:>14} {:>7} {:>6} {:>6} {:>8} {:>7}"
    names = ("", "alpha", "alpha/peak", "h_base", "averagings %", "bytes %", "sent", "hours", "H > h_base")
    lines = [f"{'':93}longest round", form.format(*names, "steps", "epochs", "hours", "of run %", "fails %")]
    for row in rows:
        longest, first = row["longest_round"], row["leaves_h_base"]
        start = "never" if first is None else str(first["step"])
        start += "" if first is None or first["epoch"] is None else f" ({first['epoch']:.0f})"
        sent = "-" if row["bytes_sent"] is None else bytes_text(row["bytes_sent"])
        lines.append(
            form.format(
                *("*" if row["own"] else " ", f"{row['alpha']:.4g}", f"{row['alpha_over_peak']:.3g}", row["h_base"]),
                *(f"{row['averagings_percent']:.2f}", spell(row["bytes_percent"], ".2f"), sent, spell(row["hours"])),
                *(start, longest["length"], spell(longest["epochs"], ".1f"), spell(longest["hours"], ".3g")),
                *(f"{longest['percent_of_run']:.1f}", spell(longest["failure_percent"], ".2g")),
            )
        )
    lines += ["", "* this recipe. H > h_base: from this step (and epoch) on, or at the first round after the warm-up."]
    if failure_seconds is not None:
        lines.append(
            f"fails %: chance of a failure within the longest round, at one in {seconds_text(failure_seconds)} of the "
            "whole run"
        )
    return "\n".join(lines)
