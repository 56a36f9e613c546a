"""Where the figures of the cost model come from: the command line, a file of measured costs, or two finished runs.

Nothing here imports torch, but for the number of a model's parameters where nobody says it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qsr_engine.config import (
    ConfigError,
    NonNegative,
    Positive,
    PositiveInt,
    QSRConfig,
    Recipe,
    StrictModel,
    flatten,
    validate,
)
from qsr_engine.cost import (
    HIDDEN_BY_BACKWARD,
    HIDDEN_BY_FORWARD,
    CostModel,
    Fit,
    Network,
    Observed,
    StepTime,
    fit_two_runs,
)
from qsr_engine.data.index import DataError, read_index
from qsr_engine.monitor import SUMMARY
from qsr_engine.quantities import bytes_text, rate_text, seconds_text
from qsr_engine.report import ReportError, Run, read_run

_ELEMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0}
_BLOCK = 512  # elements of fp16 and int8 that share one scale of 4 bytes on the wire, as in averaging/wire.py
CLASSES = 1000  # of a model whose data nobody has seen: ImageNet's


class CostSettings(StrictModel):
    """Figures of the cost model, in seconds and bytes; what `--measure --save` writes and `--costs` reads.

    Rates are bytes/s, and null is no limit. A payload or a share that is null follows from the recipe.
    """

    step_seconds: Positive
    step_cv: NonNegative = 0.0
    worker_cv: NonNegative = 0.0
    workers: PositiveInt
    workers_per_host: PositiveInt = 1
    bandwidth: Positive | None
    latency: NonNegative = 0.0
    local_bandwidth: Positive | None = None
    local_latency: NonNegative = 0.0
    algorithm: Literal["ring", "tree"] = "ring"
    two_level: bool | None = None  # None: the recipe's qsr.averaging.two_level, where that is true
    efficiency: Positive = 1.0
    parameters: PositiveInt | None = None
    parameter_bytes: Positive | None = None
    gradient_bytes: Positive | None = None
    gradient_efficiency: Positive = 1.0
    boundary_seconds: NonNegative = 0.0
    backward_share: Annotated[float, Field(ge=0, le=1)] | None = None
    forward_share: NonNegative | None = None
    overlap: Literal["none", "next_forward", "delayed"] | None = None  # None: the recipe's
    measured: dict[str, Any] = {}  # how and where; read by people

    @property
    def network(self) -> Network:
        return Network(
            bandwidth=self.bandwidth or math.inf,
            latency=self.latency,
            workers_per_host=self.workers_per_host,
            local_bandwidth=self.local_bandwidth or math.inf,
            algorithm=self.algorithm,
            efficiency=self.efficiency,
            two_level=bool(self.two_level),
            local_latency=self.local_latency,
        )


OPTIONS = {  # of a setting that must be there, as the command line calls it
    "step_seconds": "--step-seconds",
    "bandwidth": "--bandwidth",
    "workers": "--workers",
}


def cost_settings(given: Mapping[str, Any], costs: str | Path | None = None) -> CostSettings:
    """Settings from a file and from the command line, which goes before.

    Args:
        given: names of CostSettings; those that were not given are left out.
    Raises:
        ConfigError: the file cannot be read, or something is missing or wrong.
    """
    raw = {**({} if costs is None else _read_costs(Path(costs))), **given}
    missing = [option for name, option in OPTIONS.items() if name not in raw]
    if missing:
        found = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "none of them"
        raise ConfigError(
            f"hours need {', '.join(OPTIONS.values())} together; found {found}, and {' and '.join(missing)} is "
            "missing: write it, or --measure, --costs FILE or --fit RUN RUN in place of all"
        )
    for name in ("bandwidth", "local_bandwidth"):
        if raw.get(name) == math.inf:
            raw[name] = None
    return validate(CostSettings, raw, where=str(costs or "costs"))


def _read_costs(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--costs {path}: cannot read this file: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--costs {path}: not a JSON file that can be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"--costs {path}: found {type(raw).__name__}; write a file of `qsr plan --measure --save FILE`"
        )
    validate(CostSettings, raw, where=str(path))
    return raw


def save_costs(settings: CostSettings, path: str | Path) -> None:
    """Write what `--costs` reads. Raises ConfigError if the file cannot be written."""
    try:
        Path(path).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save {path}: cannot be written: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------------- the model


def cost_model(settings: CostSettings, qsr: QSRConfig, recipe: Recipe | None) -> tuple[CostModel, list[str]]:
    """The cost model of a run, and what it assumes, a line each.

    Args:
        recipe: None for a DeepSpeed configuration, which does not say the model.
    Raises:
        ConfigError: the size of the model is not known.
    """
    if settings.two_level is None and qsr.averaging.two_level is True:
        settings = settings.model_copy(update={"two_level": True})
    parameters, counted = _parameters(settings, recipe)
    averaged = settings.parameter_bytes or payload_of_averaging(qsr, parameters)
    gradients = settings.gradient_bytes or parameters * _gradient_element_bytes(recipe)
    forward = _forward_share(settings.overlap, qsr) if settings.forward_share is None else settings.forward_share
    backward = _backward_share(recipe) if settings.backward_share is None else settings.backward_share
    model = CostModel(
        step=StepTime(settings.step_seconds, settings.step_cv, settings.worker_cv),
        network=settings.network,
        workers=settings.workers,
        parameter_bytes=averaged,
        gradient_bytes=gradients,
        backward_share=backward,
        forward_share=forward,
        boundary_seconds=settings.boundary_seconds,
        gradient_efficiency=settings.gradient_efficiency,
    )
    return model, [*_assumptions(settings, model), *counted]


def _assumptions(settings: CostSettings, model: CostModel) -> list[str]:
    network, hosts = model.network, model.network.hosts(model.workers)
    way = {"ring": "one ring", "tree": "two trees"}[network.algorithm] + (
        " between hosts, after a reduction inside each" if network.two_level else " over all workers"
    )
    hidden = "behind nothing" if not model.forward_share else f"behind {model.forward_share:.2g} of the next step"
    return [
        f"step: {seconds_text(settings.step_seconds)} of compute, cv {settings.step_cv:.3g} from step to step and "
        f"{settings.worker_cv:.3g} from worker to worker, lognormal and independent",
        f"network: {model.workers} workers on {hosts} host{'s' * (hosts > 1)}; a host's port has "
        f"{rate_text(network.bandwidth)} each way, {seconds_text(network.latency)} latency; inside a host "
        f"{rate_text(network.local_bandwidth)}; {way} reaches {100 * network.efficiency:.3g} % of it",
        f"an averaging: {bytes_text(model.parameter_bytes)}, {seconds_text(model.averaging_seconds())}, {hidden}, "
        f"and {seconds_text(model.boundary_seconds)} for each boundary",
        f"a step of parallel: {bytes_text(model.gradient_bytes)} of gradients, "
        + (f"behind {model.backward_share:.2g} of the step" if model.backward_share else "after the backward pass")
        + (f", at {model.gradient_efficiency:.3g} of an averaging's rate" if model.gradient_efficiency != 1 else ""),
        "data, evaluation and checkpoints cost nothing, and nobody else uses the network",
    ]


def payload_of_averaging(qsr: QSRConfig, parameters: int) -> float:
    """Bytes of one averaging: fp32 masters, or their differences in fewer bits, and fp32 optimizer state."""
    wire = qsr.averaging.wire_dtype
    scales = 4.0 / _BLOCK if wire in ("fp16", "int8") else 0.0
    return parameters * (_ELEMENT_BYTES[wire] + scales + 4.0 * len(qsr.averaging.state))


def _gradient_element_bytes(recipe: Recipe | None) -> float:
    """FSDP reduces gradients in fp32, DeepSpeed in the type of the model's copy."""
    if recipe is None or recipe.engine == "fsdp":
        return 4.0
    return _ELEMENT_BYTES[recipe.precision.dtype]


def _backward_share(recipe: Recipe | None) -> float:
    """DeepSpeed reduces gradients after the backward pass (stage 0) or in it, without overlap (1 and 2)."""
    after = recipe is not None and recipe.engine == "deepspeed" and recipe.precision.zero_stage < 3
    return 0.0 if after else HIDDEN_BY_BACKWARD


def _forward_share(overlap: str | None, qsr: QSRConfig) -> float:
    overlap = overlap or qsr.averaging.overlap
    if overlap == "delayed":
        return float(qsr.averaging.delay_steps or 1)
    return HIDDEN_BY_FORWARD if overlap == "next_forward" else 0.0


def _parameters(settings: CostSettings, recipe: Recipe | None) -> tuple[int, list[str]]:
    """Number of parameters, and what was assumed about it."""
    if settings.parameters is not None:
        return settings.parameters, []
    if settings.parameter_bytes is not None and settings.gradient_bytes is not None:
        return 1, []  # which nobody reads
    if recipe is None:
        raise ConfigError("a DeepSpeed configuration does not say how large the model is; write --parameters N")
    return count_parameters(recipe)


def count_parameters(recipe: Recipe) -> tuple[int, list[str]]:
    """Number of trained parameters of a recipe's model, which is made for that, and what was assumed about it.

    Raises:
        ConfigError: no such model.
    """
    from qsr_engine.models import create_model

    classes, assumed = class_count(recipe)
    model = create_model(recipe.model, classes, recipe.data.image_size)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), assumed


def class_count(recipe: Recipe) -> tuple[int | None, list[str]]:
    """Classes of a recipe's data, and what was assumed where neither recipe nor shards say it."""
    if "num_classes" in recipe.model.kwargs:
        return None, []
    try:
        found = read_index(recipe.data.shards).class_count
    except DataError:
        found = None
    if found is not None:
        return found, []
    return CLASSES, [f"{CLASSES} classes, since neither shards nor model.kwargs.num_classes say how many"]


# --------------------------------------------------------------------------------------- two finished runs

# Keys of a resolved recipe that do not change what a step or an averaging costs.
_MAY_DIFFER = (
    "data.shards",
    "data.train_samples",
    "data.eval",
    "data.cache_",
    "data.shuffle_buffer",
    "data.max_bad_samples",
    "data.mixup",
    "logging.",
    "seed",
    "epochs",
    "label_smoothing",
    "batch_norm.",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.momentum",
    "qsr.strategy",
    "qsr.h_base",
    "qsr.alpha",
    "qsr.power",
    "qsr.switch_",
    "qsr.total_steps",
    "qsr.on_other_workers",
    "qsr.lr.",
)
_OF_THE_MACHINES = ("ranks", "worker_size", "engine", "device", "torch")


def fit_runs(paths: Sequence[str | Path], recipe: Recipe | None) -> tuple[Fit, list[str]]:
    """Fit compute and averaging from two finished runs, for a third recipe; and what that assumes.

    Raises:
        ConfigError, ReportError: a run cannot be read or is unfinished, they differ in something that matters, or the
            times of these two fit no costs.
    """
    runs = [_finished(Path(path)) for path in paths]
    (first, one), (second, other) = runs
    _check_same(f"{first.path} and {second.path}", _matters(first.recipe), _matters(second.recipe))
    machines = [{key: summary.get(key) for key in _OF_THE_MACHINES} for _, summary in runs]
    _check_same(f"{first.path} and {second.path}", *machines)
    if recipe is not None:
        mine = recipe.model_dump(exclude_none=True, mode="json")
        _check_same(f"the recipe and {first.path}", _matters(mine), _matters(first.recipe))
    observed = [
        Observed(summary["steps"], summary["averagings"], summary["seconds_training"]) for summary in (one, other)
    ]
    try:
        fit = fit_two_runs(*observed)
    except ValueError as error:
        raise ConfigError(f"--fit {first.path} {second.path}: {error}") from error
    per_averaging = [summary["bytes_sent"] / max(1, summary["averagings"]) for summary in (one, other)]
    fit = Fit(fit.step_seconds, fit.averaging_seconds, sum(per_averaging) / 2)
    return fit, _what_a_fit_assumes(runs, fit)


def _what_a_fit_assumes(runs: Sequence[tuple[Run, dict[str, Any]]], fit: Fit) -> list[str]:
    lines = [
        f"{run.path.name}: {run.strategy}, {summary['steps']} steps and {summary['averagings']} averagings in "
        f"{seconds_text(summary['seconds_training'])}"
        for run, summary in runs
    ]
    lines.append(
        f"fit: {seconds_text(fit.step_seconds)} a step, with data and all that comes with steps, and "
        f"{seconds_text(fit.averaging_seconds)} an averaging, with the waiting for the slowest worker; the same for "
        "every run on these ranks, whatever its periods"
    )
    if any(run.recipe["qsr"]["strategy"] in ("parallel", "post_local") for run, _ in runs):
        lines.append(
            "one run averaged gradients: what of that was hidden behind the backward pass is not in the fit, and an "
            "averaging of parameters is taken for as long as what was not hidden; two runs of local steps fit better"
        )
    else:
        lines.append("both runs took local steps; parallel is foretold with averagings that hide behind nothing")
    return lines


def _finished(path: Path) -> tuple[Run, dict[str, Any]]:
    run = read_run(path)
    if not run.finished:
        raise ConfigError(
            f"--fit {path}: the run is unfinished ({SUMMARY} is missing); finish it with qsr train --resume"
        )
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path / SUMMARY}: cannot be read: {error}") from error
    for key in ("steps", "averagings", "seconds_training", "bytes_sent"):
        value = summary.get(key) if isinstance(summary, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise ReportError(
                f"{path / SUMMARY}: {key} is {value!r}; needed is a number from 0 on, as qsr train writes"
            )
    return run, summary


def _matters(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(recipe) if not key.startswith(_MAY_DIFFER)}


def _check_same(names: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    lines = [
        f"  {key}: {one.get(key)!r} and {other.get(key)!r}"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]
    if lines:
        raise ConfigError(
            f"--fit: {names} differ in what a step or an averaging costs:\n" + "\n".join(lines) + "\n"
            "Give runs that differ in their strategy and periods only"
        )
