"""What a plan costs under every strategy: averagings, bytes and hours, as far as they are known.

Nothing here imports torch, but for the size of a model where nobody says it, nor pyplot with its global state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsr_engine.config.extras import check_extra
from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import bytes_text, counted, rate_text, seconds_text
from qsr_engine.planning.cost import Costs, Counts, beyond_hidden, count
from qsr_engine.planning.fitting import fit_runs
from qsr_engine.planning.plan import Plan, label_of, rounds_of
from qsr_engine.planning.sizes import Size, Sizes, deepspeed_sizes, model_size, recipe_sizes

HOUR = 3600.0
H_BASE = 4  # of the constant period beside a recipe that names none
_BANDWIDTHS = (10e6 / 8, 400e9 / 8)  # bytes/s, the ends of the plot
_POINTS = 60
PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Forecast:
    """A plan with what is known of its costs.

    Args:
        sizes: None where nobody says how many workers there are.
        costs: None where nobody says how long things take.
        assumptions: that this rests on, a line each.
    """

    plan: Plan
    sizes: Sizes | None
    costs: Costs | None
    assumptions: Sequence[str]

    def row(self, counts: Counts) -> dict[str, Any]:
        """What a run costs; bytes are those that leave a worker, and what is not known is None."""
        cost, sizes = self.costs and self.costs.of(counts), self.sizes
        return {
            "averagings": counts.all_averagings,
            "averagings_percent": 100 * counts.all_averagings / counts.steps,
            "bytes_sent": sizes and sizes.of(counts),
            "bytes_percent": sizes and sizes.percent(counts),
            "hours_compute": cost and cost.compute / HOUR,
            "hours_communication": cost and cost.communication / HOUR,
            "hours": cost and cost.total / HOUR,
            "communication_percent_of_time": cost and 100 * cost.communication / cost.total,
        }

    def rows(self) -> list[dict[str, Any]]:
        """`parallel`, a constant period, QSR where alpha is known, and the recipe's own if it is another one."""
        mine = label_of(self.plan.qsr)
        return [
            {"strategy": label, "own": label == mine, **self.row(counts)}
            for label, counts in compared(self.plan).items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        own, sizes = count(self.plan.qsr.strategy, self.plan.rounds), self.sizes
        known = {} if sizes is None else {"workers": sizes.workers, "parameters": sizes.parameters}
        known |= {} if sizes is None else {"averaging_bytes": sizes.averaging, "gradient_bytes": sizes.gradients}
        known |= {} if sizes is None else {"fragments": sizes.fragments, "averaging_bytes_at_once": sizes.at_once}
        said = {"costs": asdict(self.costs)} if self.costs else {}
        rows = {"strategies": self.rows(), "assumptions": list(self.assumptions)} if sizes or self.costs else {}
        return {**self.plan.as_dict(), "bytes_percent": self.row(own)["bytes_percent"], **known, **said, **rows}

    def text(self) -> str:
        """What is printed without `--json`."""
        if not (self.sizes or self.costs):
            return self.plan.text()
        names = ["strategy", "averagings", "averagings %", "compute h", "commun. h", "hours", "sent", "bytes %"]
        lines = ["  {:<28} {:>10} {:>12} {:>10} {:>10} {:>10} {:>9} {:>7}".format(*names)]
        for row in self.rows():
            lines.append(
                f"{'*' if row['own'] else ' '} {row['strategy']:<28} {row['averagings']:>10} "
                f"{row['averagings_percent']:>12.2f} {spell(row['hours_compute']):>10} "
                f"{spell(row['hours_communication']):>10} {spell(row['hours']):>10} "
                f"{bytes_text(row['bytes_sent']) if self.sizes else '-':>9} {spell(row['bytes_percent'], '.2f'):>7}"
            )
        lines += ["", "* this recipe. Averagings %: over steps. Sent: bytes that leave one worker; bytes %: of what"]
        lines += ["  parallel sends in as many steps.", "", "assumed:"]
        return "\n".join([self.plan.text(), "", *lines, *(f"  {line}" for line in self.assumptions)])

    def plot(self, path: str | Path) -> None:
        """Draw hours over the bandwidth of a worker's link, a curve for each strategy.

        Raises:
            ConfigError: step times or bytes are not known, there is one worker, or the file cannot be written.
        """
        if self.sizes is None or self.costs is None or self.sizes.workers == 1:
            raise ConfigError(f"--plot {path}: it needs the time of a step and several workers; write --workers N")
        from matplotlib.figure import Figure

        step, mine = self.costs.step_seconds, label_of(self.plan.qsr)
        low, high = _BANDWIDTHS
        rates = [low * (high / low) ** (index / (_POINTS - 1)) for index in range(_POINTS)]
        figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
        panel = figure.add_subplot()
        for label, counts in compared(self.plan).items():
            hours = [by_bandwidth(self.sizes, step, rate).of(counts).total / HOUR for rate in rates]
            panel.plot([8 * rate for rate in rates], hours, label=label + (" (this recipe)" if label == mine else ""))
        compute = self.plan.qsr.total_steps * step / HOUR
        panel.axhline(compute, color="grey", linestyle=":", label="compute alone")
        panel.set(xscale="log", yscale="log", xlabel="bandwidth of a worker's link (bit/s)", ylabel="hours")
        panel.legend(frameon=False)
        try:
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"--plot {path}: cannot be written: {error}; write for example plan.png") from error


def check_plot(path: str | Path) -> None:
    """Raise ConfigError for a file of a kind that is not drawn, a place that is none, and without matplotlib."""
    check_extra("report", "matplotlib", f"--plot {path}")
    path = Path(path)
    if path.suffix.lower() not in PLOTS:
        raise ConfigError(f"--plot {path}: found no kind of plot that is drawn; write a file in {', '.join(PLOTS)}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--plot {path}: cannot be written; write the name of a file in a folder that you may write")


def spell(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else f"{value:{form}}"


def compared(plan: Plan) -> dict[str, Counts]:
    """Counts of the strategies that a plan is compared with, and of its own, by their labels."""
    own = plan.qsr
    h_base = H_BASE if own.strategy == "parallel" and own.h_base == 1 else own.h_base  # 1 where it names none
    found = [own.model_copy(update={"strategy": "parallel", "switch_step": None, "outer": None})]
    found.append(own.model_copy(update={"strategy": "constant", "h_base": h_base, "switch_step": None}))
    if own.alpha and own.lr is not None:
        found.append(own.model_copy(update={"strategy": "qsr", "h_base": h_base, "switch_step": None}))
    counts = {label_of(qsr): qsr for qsr in found} | {label_of(own): own}
    return {label: count(qsr.strategy, plan.rounds if qsr is own else rounds_of(qsr)) for label, qsr in counts.items()}


def by_bandwidth(sizes: Sizes, step_seconds: float, bandwidth: float) -> Costs:
    """The figures by bytes over bandwidth, which is in bytes/s of what a worker sends."""
    hidden = sizes.hidden_share * step_seconds
    gradients = beyond_hidden(sizes.gradients / bandwidth, hidden, sizes.last_bucket)
    return Costs(step_seconds, sizes.averaging / bandwidth, gradients)


def make_forecast(
    plan: Plan,
    given: Mapping[str, Any],
    *,
    measured: Mapping[str, Any] | None = None,
    fit: Sequence[str | Path] | None = None,
) -> Forecast:
    """What is known of a plan's costs.

    Args:
        given: by the command line: workers, parameters, bandwidth (bytes/s), and seconds by their names in Costs.
        measured: as measure() returns it; what is given goes before.
        fit: two finished runs, instead of any of these but parameters.
    Raises:
        ConfigError, ReportError: figures are missing or do not go together, or as fit_runs().
    """
    lines: list[str] = []
    if fit is not None:
        if set(given) - {"parameters"} or measured:
            raise ConfigError("--fit finds its costs in two runs; leave --measure and the options of the costs out")
        costs, workers, lines = fit_runs(fit, plan.recipe)
        sizes, assumed = _sizes(plan, given.get("parameters"), workers)
        return Forecast(plan, sizes, costs, [*lines, *_figures(costs), *assumed])
    known = {**(measured or {}), **given}
    if measured and known["workers"] != measured["workers"]:
        lines.append(f"measured with {counted(measured['workers'], 'worker')}, and taken for {known['workers']}")
    if "parameters" in given and "workers" not in known:
        raise ConfigError("--parameters: what a worker sends depends on how many there are; write --workers N too")
    sizes, assumed = _sizes(plan, given.get("parameters"), known.get("workers"))
    if set(known) <= {"workers", "parameters"}:
        return Forecast(plan, sizes, None, assumed)
    costs = _costs(known, given, sizes)
    if "bandwidth" in given and sizes is not None:
        hidden = f"beside {sizes.hidden_share:.2g} of a step" if sizes.hidden_share else "after the backward pass"
        rate = rate_text(given["bandwidth"])
        lines.append(f"{rate} for what leaves a worker, or a host of workers in one ring; gradients travel {hidden}")
    return Forecast(plan, sizes, costs, [*lines, *_figures(costs), *assumed])


def _costs(known: Mapping[str, Any], given: Mapping[str, Any], sizes: Sizes | None) -> Costs:
    """Seconds that are given go before a bandwidth, and that before what was measured."""
    found = dict(known)
    if "bandwidth" in given and "step_seconds" in known and sizes is not None:
        computed = asdict(by_bandwidth(sizes, known["step_seconds"], given["bandwidth"]))
        found |= {name: given.get(name, value) for name, value in computed.items()}
    if "step_seconds" not in found or "averaging_seconds" not in found:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            "hours need --step-seconds, and --averaging-seconds or both --bandwidth and --workers; found only "
            f"{options}: write the others, or --measure or --fit RUN RUN in place of all"
        )
    averaging = found["averaging_seconds"]
    return Costs(found["step_seconds"], averaging, found.get("gradient_seconds", averaging))


def _figures(costs: Costs) -> list[str]:
    return [
        f"{seconds_text(costs.step_seconds)} of compute a step, {seconds_text(costs.averaging_seconds)} an averaging, "
        f"and {seconds_text(costs.gradient_seconds)} that a step of parallel takes longer for its gradients",
        "all workers take the same time, and data, evaluation, checkpoints and failures cost nothing",
    ]


def _sizes(plan: Plan, parameters: int | None, workers: int | None) -> tuple[Sizes | None, list[str]]:
    """What leaves a worker, and what was assumed for it; None where the workers or the model are not known."""
    if workers is None or (parameters is None and plan.recipe is None):
        return None, []
    size, lines = Size(parameters or 0), list[str]()
    if plan.recipe is None:
        sizes = deepspeed_sizes(plan.deepspeed or {}, plan.qsr, size, workers)
    else:
        if parameters is None:
            size, lines = model_size(plan.recipe)
        sizes = recipe_sizes(plan.recipe, plan.qsr, size, workers)
    return sizes, [
        f"{counted(workers, 'worker')} of {counted(plan.qsr.worker_size, 'rank')}, {size.parameters} parameters: "
        f"{bytes_text(sizes.averaging)} leave a worker at an averaging, {bytes_text(sizes.gradients)} at a step of "
        "parallel",
        *_fragments(sizes),
        *lines,
    ]


def _fragments(sizes: Sizes) -> list[str]:
    if sizes.fragments == 1:
        return []
    count, nbytes = sizes.fragments, bytes_text(sizes.at_once)
    return [
        f"averaged in {count} fragments of about equal bytes, at steps of their own: {nbytes} leave a worker at once "
        f"where a round has {count} steps or more, and all of it at the run's end",
    ]
