"""`qsr plan --measure` inside a launcher's ranks: real steps, averagings and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.planning import measure as measuring
from tests.support.launch import qsr_job
from tests.support.pool import Processes

SHORTER = {"STEPS": 4, "AVERAGINGS": 3, "PARALLEL_STEPS": 4}


def measure_job(path: Path, overrides: list[str]) -> dict[str, Any]:
    for name, value in SHORTER.items():
        setattr(measuring, name, value)
    return measuring.measure(load_recipe(path, overrides))


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    ("overrides", "ranks", "workers"),
    [
        (["engine=fsdp", "qsr.strategy=parallel", "qsr.averaging={}", "qsr.alpha=null", "qsr.h_base=1"], 2, 2),
        (["qsr.worker_size=2", "precision={dtype: bf16, zero_stage: 2}", "qsr.averaging={}"], 4, 2),
        (["qsr.worker_size=2", "engine=fsdp"], 2, 1),
    ],
)
def test_engines_and_workers(
    processes: Processes, recipe: Path, overrides: list[str], ranks: int, workers: int
) -> None:
    """The schedule of the measuring is its own, whatever the recipe's is; every rank has the same figures."""
    found = processes.run(measure_job, ranks=ranks, path=recipe, overrides=overrides)
    assert all(figures == found[0] for figures in found)
    assert found[0]["workers"] == workers
    assert found[0]["step_seconds"] > 0
    assert found[0]["averaging_seconds"] > 0
    assert (found[0]["gradient_seconds"] == 0) or workers > 1


def slow_job(path: Path, delays: dict[str, float]) -> dict[str, Any]:
    """Measured with averagings and steps of `parallel` that take so many seconds more."""
    import time

    from qsr_engine.averaging.averager import Averager

    average, timed = Averager.average, measuring._Steps.timed

    def slow_average(self: Averager, *given: Any, **more: Any) -> Any:
        time.sleep(delays["averaging"])
        return average(self, *given, **more)

    def slow_step(self: Any) -> float:
        parallel = self.engine.local_steps.qsr.strategy == "parallel"
        return float(timed(self) + delays["gradients"] * parallel)

    Averager.average, measuring._Steps.timed = slow_average, slow_step  # type: ignore[method-assign]
    try:
        return measure_job(path, ["qsr.averaging.shared_memory=false", "qsr.averaging.wire_dtype=int8"])
    finally:
        Averager.average, measuring._Steps.timed = average, timed  # type: ignore[method-assign]


def test_each_second_is_counted_where_it_belongs(processes: Processes, recipe: Path) -> None:
    found = processes.run(slow_job, ranks=2, path=recipe, delays={"averaging": 0.1, "gradients": 0.05})[0]
    assert found["averaging_seconds"] >= 0.1
    assert found["step_seconds"] < 0.1, "no averaging is in it"
    assert 0.03 < found["gradient_seconds"] < 0.1


def plan_job(path: Path) -> tuple[int, str, str]:
    for name, value in SHORTER.items():
        setattr(measuring, name, value)
    return qsr_job(["plan", str(path), "--measure"])


def test_rank_0_prints_in_a_launchers_ranks(processes: Processes, recipe: Path) -> None:
    first, second = processes.run(plan_job, ranks=2, path=recipe)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "of compute a step, " in first[1]
    assert "* qsr H>=2 alpha=0.006" in first[1]
    assert second[1] == ""
