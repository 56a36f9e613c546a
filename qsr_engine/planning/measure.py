"""The three figures of a run, measured on the ranks that run this: `qsr plan RECIPE --measure`.

    local steps   some rounds of one step, whose boundaries tell an averaging, then steps timed one by one
    parallel      steps by the engine's own gradient averaging, timed likewise: what they take longer than local steps
                  is what their gradients cost beyond what is hidden

The recipe's own model, optimizer, engine and batch sizes, with random samples, so that no shards are needed; reading
data is not measured. A boundary that a slow link lets through in a burst tells too little; the first ones are not
counted. The models that come out are thrown away.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from qsr_engine.checkpoint.together import gathered
from qsr_engine.config.batch import Batch, check_world_size
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_batch import resolve_recipe_batch
from qsr_engine.planning.sizes import index_of
from qsr_engine.training.from_recipe import Engine, autocast, make_engine, share_cores
from qsr_engine.training.make_task import make_task

UNCOUNTED = 2  # steps at the beginning of each part
AVERAGINGS = 6
STEPS = 20
PARALLEL_STEPS = 10


def measure(recipe: Recipe) -> dict[str, Any]:
    """Measure in these ranks; every rank of a launcher must enter. Every rank gets the same figures.

    Returns:
        `step_seconds`, `averaging_seconds` and `gradient_seconds`, as Costs has them, and `workers`.
    Raises:
        ConfigError, AgreementError, BoundaryError: as initialize().
    """
    ranks, size = int(os.environ["WORLD_SIZE"]), recipe.qsr.worker_size
    workers = check_world_size(ranks, size)
    batch = resolve_recipe_batch(recipe, ranks)
    share_cores()
    step, averaging = _local_steps(recipe, batch)
    gc.collect()  # the first engine's memory, before there is a second
    parallel = _parallel(recipe, batch) if workers > 1 else step
    return {
        "step_seconds": step,
        "averaging_seconds": averaging,
        "gradient_seconds": max(0.0, parallel - step),
        "workers": workers,
    }


def _local_steps(recipe: Recipe, batch: Batch) -> tuple[float, float]:
    """Seconds of a step and of an averaging; the rank that waits least for others tells what an averaging takes."""
    boundaries = UNCOUNTED + AVERAGINGS
    schedule = {"strategy": "swap", "h_base": 1, "switch_step": boundaries}
    steps = _Steps(recipe, batch, schedule, boundaries + STEPS + 1)
    averagings = []
    for _ in range(boundaries):
        before = steps.engine.local_steps.costs.seconds_averaging
        steps.timed()
        averagings.append(steps.engine.local_steps.costs.seconds_averaging - before)
    averaging = statistics.median(min(row) for row in zip(*gathered(averagings[UNCOUNTED:]), strict=True))
    return steps.slowest(STEPS), averaging


def _parallel(recipe: Recipe, batch: Batch) -> float:
    steps = _Steps(recipe, batch, {"strategy": "parallel"}, UNCOUNTED + PARALLEL_STEPS + 1)
    for _ in range(UNCOUNTED):
        steps.timed()
    return steps.slowest(PARALLEL_STEPS)


class _Steps:
    """Optimizer steps of an engine of its own on random samples, which stay the same; its run never ends."""

    def __init__(self, recipe: Recipe, batch: Batch, schedule: dict[str, Any], total: int) -> None:
        self._recipe, self._accumulation = recipe, batch.accumulation
        index, _ = index_of(recipe)
        self._task = make_task(recipe.model_copy(update={"label_smoothing": 0.0}), index)
        torch.manual_seed(recipe.seed)
        model = self._task.create_model()
        self.engine: Engine = make_engine(_short_run(recipe, schedule, total), batch, model)
        generator = torch.Generator().manual_seed(recipe.seed + dist.get_rank())
        inputs, targets = self._task.random_batch(batch.micro, generator)
        self._inputs, self._targets = inputs.to(self.engine.device), targets.to(self.engine.device)

    def timed(self) -> float:
        """Seconds of one step on this rank."""
        started = _now(self.engine.device)
        for _ in range(self._accumulation):
            with autocast(self._recipe, self.engine.device):
                outputs = self.engine(self._inputs)
            self.engine.backward(self._task.loss(outputs, self._targets))
            self.engine.step()
        return _now(self.engine.device) - started

    def slowest(self, count: int) -> float:
        """Mean seconds of so many steps on the slowest rank, for which the others wait at the next boundary."""
        seconds: float = max(gathered(statistics.mean([self.timed() for _ in range(count)])))
        return seconds


def _short_run(recipe: Recipe, schedule: dict[str, Any], total: int) -> Recipe:
    """The recipe with another schedule, in which averagings hide behind nothing."""
    raw = recipe.model_dump(exclude_unset=True)
    raw.pop("epochs", None)
    own, rate = raw["qsr"], {"schedule": "constant", "peak": recipe.qsr.lr.peak}
    raw["qsr"] = {**schedule, "total_steps": total, "lr": rate, "worker_size": recipe.qsr.worker_size}
    if schedule["strategy"] != "parallel":
        averaging = {k: value for k, value in own.get("averaging", {}).items() if k not in ("overlap", "delay_steps")}
        raw["qsr"] |= {"averaging": averaging, "outer": own.get("outer")}
    return Recipe.model_validate(raw)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
