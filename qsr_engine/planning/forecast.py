"""What a plan costs under every strategy: hours, bytes, the share of communication, and the questions of a planner.

    which h_base keeps communication under 10 % of the time?
    what does alpha do to the number of averagings?
    from which bandwidth on does a strategy gain anything?      (a plot)

Nothing here imports torch, nor pyplot with its global state.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import bytes_text, counted, rate_text, seconds_text
from qsr_engine.planning.calibration import cost_model, count_parameters, payload_of_averaging
from qsr_engine.planning.cost import Cost, CostModel, Network, Tally, smallest_period, tally
from qsr_engine.planning.fitting import fit_runs
from qsr_engine.planning.plan import Plan, label_of, rounds_of
from qsr_engine.planning.settings import CostSettings, cost_settings, read_costs

HOUR = 3600.0
LIMIT_PERCENT = 10.0  # of the time, that communication should stay under
H_BASE = 4  # of the constant period beside a recipe that names none
_ALPHA_FACTORS = (0.5, 1.0, 2.0)
_BANDWIDTHS = (10e6 / 8, 400e9 / 8)  # bytes/s, the ends of the plot
_POINTS = 60
PLOTS = (".png", ".svg", ".pdf")


class Costs(Protocol):
    """CostModel or Fit."""

    def run(self, rounds: Tally) -> Cost: ...


@dataclass(frozen=True)
class Strategy:
    """One row of the table.

    Args:
        own: it is the recipe's own.
    """

    label: str
    qsr: QSRConfig
    tally: Tally
    own: bool


def strategies(plan: Plan) -> list[Strategy]:
    """`parallel`, a constant period, QSR where alpha is known, and the recipe's own if it is another one."""
    own = plan.qsr
    h_base = H_BASE if own.strategy == "parallel" else own.h_base
    found = [plan.qsr.model_copy(update={"strategy": "parallel", "switch_step": None, "outer": None})]
    found.append(own.model_copy(update={"strategy": "constant", "h_base": h_base, "switch_step": None}))
    if own.alpha and own.lr is not None:
        found.append(own.model_copy(update={"strategy": "qsr", "h_base": h_base, "switch_step": None}))
    labels, mine = list(map(label_of, found)), label_of(own)
    if mine not in labels:
        found.append(own)
        labels.append(mine)
    return [
        Strategy(label, qsr, tally(plan.rounds if label == mine else rounds_of(qsr)), label == mine)
        for label, qsr in zip(labels, found, strict=True)
    ]


@dataclass(frozen=True)
class Forecast:
    """A plan with its costs.

    Args:
        costs: what rounds cost.
        assumptions: that this rests on, a line each.
        limit: the share of the time that communication should stay under, from 0 to 1.
    """

    plan: Plan
    costs: Costs
    assumptions: Sequence[str]
    strategies: Sequence[Strategy]
    limit: float = LIMIT_PERCENT / 100
    settings: dict[str, Any] = field(default_factory=dict)  # that --json prints

    def rows(self) -> list[dict[str, Any]]:
        """The strategies' costs, in hours; bytes are what one worker sends."""
        rows = []
        for strategy in self.strategies:
            cost = self.costs.run(strategy.tally)
            row = {
                "strategy": strategy.label,
                "own": strategy.own,
                "averagings": strategy.tally.rounds,
                "hours_compute": cost.compute / HOUR,
                "hours_communication": cost.communication / HOUR,
                "hours_waiting": cost.waiting / HOUR,
                "hours": cost.total / HOUR,
                "bytes_sent": cost.bytes,
                "communication_percent_of_time": 100 * cost.communication_share,
            }
            rows.append(row)
        return rows

    def smallest_h_base(self) -> dict[str, int | None]:
        """The smallest h_base that keeps communication under the limit, for a constant period and for the own QSR.

        None where no period does. Without a learning rate, or alpha, there is no answer for QSR.
        """
        own = self.plan.qsr
        wanted = {"constant": own.model_copy(update={"strategy": "constant", "switch_step": None})}
        if own.alpha and own.lr is not None:
            wanted["qsr"] = own.model_copy(update={"strategy": "qsr", "switch_step": None})
        return {
            name: smallest_period(partial(self._share, qsr), self.limit, own.total_steps)
            for name, qsr in wanted.items()
        }

    def _share(self, qsr: QSRConfig, h_base: int) -> float:
        return self.costs.run(tally(rounds_of(qsr.model_copy(update={"h_base": h_base})))).communication_share

    def alphas(self) -> list[dict[str, Any]]:
        """What alpha does to the averagings: half of the recipe's, itself, and twice; empty where it has none."""
        own, rows = self.plan.qsr, []
        if own.strategy == "qsr" and own.alpha and own.lr is not None:
            for factor in _ALPHA_FACTORS:
                counted = tally(rounds_of(own.model_copy(update={"alpha": factor * own.alpha})))
                cost = self.costs.run(counted)
                row = {"alpha": factor * own.alpha, "factor": factor, "averagings": counted.rounds}
                rows.append(
                    {**row, "percent_of_parallel": 100 * counted.rounds / counted.steps, "hours": cost.total / HOUR}
                )
        return rows

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            **self.plan.as_dict(),
            "costs": self.settings,
            "assumptions": list(self.assumptions),
            "strategies": self.rows(),
            "communication_limit_percent": 100 * self.limit,
            "smallest_h_base": self.smallest_h_base(),
            "alphas": self.alphas(),
        }

    def text(self) -> str:
        """What is printed below the plan."""
        lines = [f"{'':1} {'strategy':<28} {'averagings':>10} {'compute h':>10} {'commun. h':>10} {'waiting h':>10} "]
        lines[0] += f"{'hours':>9} {'sent':>9} {'commun. %':>9}"
        for row in self.rows():
            hours = (row["hours_compute"], row["hours_communication"], row["hours_waiting"])
            lines.append(
                f"{'*' if row['own'] else ' '} {row['strategy']:<28} {row['averagings']:>10} "
                + " ".join(f"{value:>10.3g}" for value in hours)
                + f" {row['hours']:>9.4g} {bytes_text(row['bytes_sent']) if row['bytes_sent'] else '-':>9} "
                f"{row['communication_percent_of_time']:>9.2f}"
            )
        lines += ["", "* this recipe; sent: by one worker; commun. %: of the time, beyond what is hidden", ""]
        lines += [self._spell(name, h_base) for name, h_base in self.smallest_h_base().items()]
        if alphas := self.alphas():
            lines += ["", f"{'alpha':>10} {'averagings':>10} {'% of parallel':>13} {'hours':>9}"]
        for row in alphas:
            percent, hours = row["percent_of_parallel"], row["hours"]
            lines.append(f"{row['alpha']:>10.4g} {row['averagings']:>10} {percent:>13.2f} {hours:>9.4g}")
        return "\n".join([*lines, "", "assumed:", *(f"  {line}" for line in self.assumptions)])

    def _spell(self, name: str, h_base: int | None) -> str:
        what = "a constant H" if name == "constant" else f"QSR with alpha {self.plan.qsr.alpha:g}, h_base"
        answer = "no period does" if h_base is None else f"{what} >= {h_base}"
        return f"communication under {100 * self.limit:g} % of the time: {answer}" + (
            f" ({name})" if h_base is None else ""
        )

    def plot(self, path: str | Path) -> None:
        """Draw hours over the bandwidth between hosts, a curve for each strategy.

        Raises:
            ConfigError: the costs come from a fit, which knows no bandwidth, or the file cannot be written.
        """
        if not isinstance(self.costs, CostModel):
            raise ConfigError(f"--plot {path}: two runs tell no bandwidth; give --bandwidth and the other costs")
        if self.costs.network.hosts(self.costs.workers) == 1:
            raise ConfigError(f"--plot {path}: all workers are on one host; give --workers-per-host for several hosts")
        check_plot(path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        panel = figure.add_subplot()
        for strategy in self.strategies:
            panel.plot(*self.curve(self.costs, strategy), label=strategy.label + (" (this recipe)" * strategy.own))
        compute = self.costs.run(self.strategies[0].tally).compute / HOUR
        panel.axhline(compute, color="grey", linestyle=":", label="compute alone")
        now = self.costs.network.bandwidth * 8
        if _BANDWIDTHS[0] * 8 <= now <= _BANDWIDTHS[1] * 8:
            panel.axvline(now, color="grey", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("bandwidth of a host's port (bit/s)")
        panel.set_ylabel("hours")
        panel.legend(frameon=False)
        try:
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"--plot {path}: cannot be written: {error}; write for example plan.png") from error

    @staticmethod
    def curve(model: CostModel, strategy: Strategy) -> tuple[list[float], list[float]]:
        """(bandwidth in bit/s, hours) from 10 Mbit/s to 400 Gbit/s."""
        low, high = _BANDWIDTHS
        rates = [low * (high / low) ** (index / (_POINTS - 1)) for index in range(_POINTS)]
        hours = [_with_bandwidth(model, rate).run(strategy.tally).total / HOUR for rate in rates]
        return [8 * rate for rate in rates], hours


def check_plot(path: str | Path) -> None:
    """Raise ConfigError for a file of a kind that is not drawn, or a place that is none."""
    if Path(path).suffix.lower() not in PLOTS:
        raise ConfigError(f"--plot {path}: found no kind of plot that is drawn; write a file in {', '.join(PLOTS)}")
    check_place("--plot", path)


def check_place(option: str, path: str | Path) -> None:
    """Raise ConfigError where a file cannot be written, as far as can be known without writing it."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{option} {path}: this is a folder; write the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: cannot be written: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path}: cannot be written: you may not write there; write another place")


def _with_bandwidth(model: CostModel, rate: float) -> CostModel:
    network: Network = replace(model.network, bandwidth=rate)
    return replace(model, network=network)


def make_forecast(
    plan: Plan,
    given: dict[str, Any],
    *,
    costs: CostSettings | str | Path | None = None,
    fit: Sequence[str | Path] | None = None,
    limit: float = LIMIT_PERCENT / 100,
) -> Forecast:
    """Costs of a plan.

    Args:
        given: settings from the command line, by their names in CostSettings.
        costs: a file of them, or what was measured; given goes before.
        fit: two finished runs, instead of any settings.
    Raises:
        ConfigError, ReportError: as cost_settings(), cost_model() and fit_runs().
    """
    if fit is not None:
        if given or costs is not None:
            raise ConfigError("--fit finds its costs in two runs; leave --costs and the options of the cost model out")
        found, assumptions = fit_runs(fit, plan.recipe)
        return Forecast(plan, found, assumptions, strategies(plan), limit, asdict(found))
    base = costs if costs is None or isinstance(costs, CostSettings) else read_costs(costs)
    settings = cost_settings(given, base)
    model, assumptions = cost_model(settings, plan.qsr, plan.recipe, plan.deepspeed)
    if base is not None and base.measured:
        assumptions = [measured_line(base), *assumptions]
    return Forecast(plan, model, assumptions, strategies(plan), limit, settings.model_dump())


def bytes_of(plan: Plan, parameters: int | None, workers: int | None) -> dict[str, Any]:
    """What is known of the bytes without times: those of one averaging, and what a worker sends in the whole run.

    Args:
        parameters: of the model; None: those of the recipe's model, which is made for that.
        workers: None where their number is not known; then a worker sends less than twice the payload each time.
    Raises:
        ConfigError: nobody says how large the model is.
    """
    if parameters is None:
        if plan.recipe is None:
            raise ConfigError(f"{plan.name}: it does not say how large the model is; write --parameters N")
        parameters, _ = count_parameters(plan.recipe)
    settings = CostSettings(step_seconds=1.0, bandwidth=None, workers=workers or 1, parameters=parameters)
    model, _ = cost_model(settings, plan.qsr, plan.recipe, plan.deepspeed)
    known: dict[str, Any] = {"parameters": parameters, "averaging_bytes": payload_of_averaging(plan.qsr, parameters)}
    if workers is not None:
        known |= {"workers": workers, "bytes_sent": model.run(tally(plan.rounds)).bytes}
    return known


def bytes_line(known: dict[str, Any]) -> str:
    line = f"an averaging: {bytes_text(known['averaging_bytes'])} ({known['parameters']} parameters)"
    if "bytes_sent" in known:
        return f"{line}; each of {known['workers']} workers sends {bytes_text(known['bytes_sent'])} in the run"
    return line


def print_plan(plan: Plan, forecast: Forecast | None, known: dict[str, Any] | None, *, as_json: bool) -> str:
    """What `qsr plan` prints."""
    more = known or {}
    if as_json:
        return json.dumps({**(forecast or plan).as_dict(), **more}, indent=2)
    parts = [plan.text(), *([bytes_line(more)] if more else []), *([forecast.text()] if forecast else [])]
    return "\n\n".join(parts)


def measured_line(settings: CostSettings) -> str:
    """The measured figures in one line.

    Args:
        settings: as they were measured, before options go before them.
    """
    workers, network = settings.workers, settings.network
    hosts = network.hosts(workers)
    between = settings.bandwidth is not None
    rate = network.bandwidth if between else network.local_bandwidth
    parts = [
        f"measured: {seconds_text(settings.step_seconds)} a step, cv {settings.step_cv:.3g} from step to step"
        + (f" and {settings.worker_cv:.3g} from worker to worker" if workers > 1 else "")
        + f", with {counted(workers, 'worker')} on {counted(hosts, 'host')}"
    ]
    if math.isfinite(rate):
        latency = settings.latency if between else settings.local_latency
        where = "between hosts" if between else "inside the host"
        parts.append(f"{rate_text(rate)} {where}, latency {seconds_text(latency)}")
    parts.append(f"{seconds_text(settings.boundary_seconds)} for a boundary beside its averaging")
    return "; ".join(parts)
