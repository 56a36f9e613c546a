"""Measured runs, simulated.

`--validate FILE` reads a JSON object with `runs`, a list of objects with

    model, strategy    words, for the table; strategy is one of the block's, and `parallel` means gradients each step
    workers            2 or more; each has a host of its own
    bandwidth          bytes/s of a host's port, or null for no limit, where an all-reduce is taken to cost nothing
    steps              optimizer steps
    rounds             a list of lengths that add up to steps, or a "qsr" block (an object with an lr block)
    parameter_bytes    payload of an averaging, and of parallel's gradients unless gradient_bytes is there too
    step_seconds       mean seconds of one step's compute
    step_cv            its standard deviation over its mean
    seconds            measured, of the whole training

and prints simulated : measured. Latency is 0 and efficiency 1, no failure happens and nothing is saved: nothing is
calibrated but step_seconds and step_cv, which are measured in the same run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import table
from benchmarks.scale.closed_form import CostModel, Network
from benchmarks.scale.simulation import NO_FAILURES, Simulation
from benchmarks.scale.step_times import Sampler, Steps
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError, validate
from qsr_engine.schedule import Round, rounds


@dataclass(frozen=True)
class Measured:
    """One run of --validate; see the text at the top."""

    model: str
    strategy: str
    workers: int
    bandwidth: float | None
    steps: int
    schedule: tuple[Round, ...]
    parameter_bytes: float
    gradient_bytes: float
    step_seconds: float
    step_cv: float
    seconds: float


def read_measured(path: str | Path) -> list[Measured]:
    """Raises: ConfigError: it is not a file as the text at the top says."""
    try:
        runs = json.loads(Path(path).read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{path}: cannot be read as a JSON object with "runs": {error}') from error
    return [_measured(f"{path}: runs[{number}]", run) for number, run in enumerate(runs)]


def _measured(where: str, run: Mapping[str, Any]) -> Measured:
    keys = set(Measured.__dataclass_fields__) - {"schedule", "gradient_bytes"} | {"rounds"}
    if missing := sorted(keys - set(run)):
        raise ConfigError(f"{where}: {', '.join(missing)} missing; write what the text of this script says")
    schedule = tuple(_schedule(where, run))
    covered = sum(r.length for r in schedule)
    if covered != run["steps"]:
        raise ConfigError(f"{where}: rounds cover {covered} steps, and steps is {run['steps']}; write all rounds")
    kept = {key: run[key] for key in keys - {"rounds"}}
    return Measured(**kept, gradient_bytes=run.get("gradient_bytes", run["parameter_bytes"]), schedule=schedule)


def _schedule(where: str, run: Mapping[str, Any]) -> Iterator[Round]:
    if isinstance(run["rounds"], Mapping):
        yield from rounds(validate(QSRConfig, run["rounds"], where=where, prefix="rounds."))
        return
    if run["strategy"] == "post_local":
        raise ConfigError(f"{where}: rounds is a list, which does not say where post_local switches; write the block")
    step = 0
    for length in run["rounds"]:
        yield Round(step, length, "parallel" if run["strategy"] == "parallel" else "local")
        step += length


def simulate_measured(run: Measured, backward_share: float, runs: int, seed: int) -> float:
    """Mean simulated seconds of a measured run."""
    steps = Steps(run.step_seconds, run.step_cv)
    network = Network(math.inf if run.bandwidth is None else run.bandwidth)
    payloads = (run.parameter_bytes, run.gradient_bytes)
    model = CostModel(steps.closed_form(run.workers), network, run.workers, *payloads, backward_share=backward_share)
    sampler = Sampler(steps, run.workers, None, one_by_one=True)
    simulations = (Simulation(run.schedule, model, sampler, NO_FAILURES, [seed, number]) for number in range(runs))
    return sum(simulation.run().total for simulation in simulations) / runs


def validation(runs: Sequence[Measured], backward_share: float, repeats: int, seed: int) -> str:
    columns = ["model", "strategy", "workers", "Mbit/s", "steps", "averagings", "measured, s", "simulated, s"]
    lines = []
    for run in runs:
        seconds = simulate_measured(run, backward_share, repeats, seed)
        rate = "no limit" if run.bandwidth is None else f"{run.bandwidth * 8 / 1e6:g}"
        cells = [run.model, run.strategy, str(run.workers), rate, str(run.steps), str(len(run.schedule))]
        lines.append([*cells, f"{run.seconds:.2f}", f"{seconds:.2f}", f"{seconds / run.seconds:.3f}"])
    return table([*columns, "simulated : measured"], lines)
