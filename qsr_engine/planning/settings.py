"""Figures of the cost model as they are given: options of the command line over a file, or over what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qsr_engine.config.strict import ConfigError, NonNegative, Positive, PositiveInt, StrictModel, validate
from qsr_engine.planning.cost import LARGEST_CV, Network

Variation = Annotated[float, Field(ge=0, le=LARGEST_CV)]


class CostSettings(StrictModel):
    """Figures of the cost model, in seconds and bytes; what `--measure --save` writes and `--costs` reads.

    Rates are bytes/s, and null is no limit. A share that is null follows from the recipe.
    """

    step_seconds: Positive
    step_cv: Variation = 0.0
    worker_cv: Variation = 0.0
    workers: PositiveInt
    workers_per_host: PositiveInt = 1
    bandwidth: Positive | None
    latency: NonNegative = 0.0
    local_bandwidth: Positive | None = None
    local_latency: NonNegative = 0.0
    algorithm: Literal["ring", "tree"] = "ring"
    two_level: bool | None = None  # None: the recipe's qsr.averaging.two_level, where that is true
    efficiency: Annotated[float, Field(gt=0, le=1)] = 1.0
    parameters: PositiveInt | None = None
    gradient_efficiency: Positive = 1.0
    boundary_seconds: NonNegative = 0.0
    backward_share: Annotated[float, Field(ge=0, le=1)] | None = None
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


_NEEDED = ("step_seconds", "bandwidth", "workers")  # settings that must be there
_OPTIONS = {"algorithm": "--tree", "backward_share": "--parallel-overlap"}  # whose names are not the settings'


def _option(name: str) -> str:
    """A setting as the command line calls it."""
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def cost_settings(given: Mapping[str, Any], base: CostSettings | None = None) -> CostSettings:
    """Settings from a file or a measurement, and from the command line, which goes before.

    Args:
        given: names of CostSettings; those that were not given are left out.
        base: as it was read or measured.
    Raises:
        ConfigError: something is missing or wrong, or was measured on fewer hosts or workers than are asked for.
    """
    raw = {**({} if base is None else base.model_dump()), **given}
    missing = [_option(name) for name in _NEEDED if name not in raw]
    if missing:
        found = ", ".join(map(_option, given)) or "none of them"
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise ConfigError(
            f"hours need {', '.join(map(_option, _NEEDED))} together; found {found}, and {' and '.join(missing)} "
            f"{verb} missing: write {them}, or --measure, --costs FILE or --fit RUN RUN in place of all"
        )
    for name in ("bandwidth", "local_bandwidth"):
        if raw.get(name) == math.inf:
            raw[name] = None
    settings = validate(CostSettings, raw, where="costs")
    if base is not None and base.measured:
        _check_links(settings, base, given)
    return settings


def _check_links(settings: CostSettings, base: CostSettings, given: Mapping[str, Any]) -> None:
    """Refuse links that nobody measured: null is no limit where a person wrote it, and not where none was there."""
    if base.bandwidth is not None:
        return
    hosts, local = settings.network.hosts(settings.workers), min(settings.workers, settings.workers_per_host)
    if hosts > 1 and "bandwidth" not in given:
        raise ConfigError(
            f"{settings.workers} workers with {settings.workers_per_host} on a host are on {hosts} hosts, and the "
            "costs were measured inside one host, which tells nothing of the links between hosts; write "
            "--bandwidth RATE, or --workers-per-host for fewer hosts"
        )
    if local > 1 and base.local_bandwidth is None and "local_bandwidth" not in given:
        raise ConfigError(
            f"{local} workers share a host, and the costs were measured with one worker, which tells nothing of the "
            "links inside a host; write --local-bandwidth RATE"
        )


def read_costs(path: str | Path) -> CostSettings:
    """What `--save` wrote.

    Raises:
        ConfigError: the file cannot be read, or something in it is missing or wrong.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--costs {path}: cannot read this file: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--costs {path}: not a JSON file that can be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"--costs {path}: found {type(raw).__name__}; write a file of `qsr plan --measure --save FILE`"
        )
    return validate(CostSettings, raw, where=str(path))


def save_costs(settings: CostSettings, path: str | Path) -> None:
    """Write what `--costs` reads. Raises ConfigError if the file cannot be written."""
    try:
        Path(path).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save {path}: cannot be written: {error.strerror or error}") from error
