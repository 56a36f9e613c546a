"""`qsr plan --measure`: real steps and averagings on two ranks, by a real launch and inside a launcher's ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.planning.cost import Network
from qsr_engine.planning.measure import STEPS, _of_network, _of_steps, _relative_rate, measure
from tests.support.launch import qsr_job
from tests.support.pool import Processes


def measure_job(path: Path, overrides: list[str]) -> dict[str, Any]:
    recipe: Recipe = load_recipe(path, overrides)
    return measure(recipe).model_dump()


@pytest.mark.parametrize(
    ("overrides", "ranks", "workers"),
    [
        (["engine=fsdp", "qsr.strategy=parallel", "qsr.averaging={}", "qsr.alpha=null", "qsr.h_base=1"], 2, 2),
        (["qsr.worker_size=2", "precision={dtype: bf16, zero_stage: 2}", "qsr.averaging={}"], 4, 2),
        (["qsr.averaging.shared_memory=false", "qsr.averaging.wire_dtype=int8"], 2, 2),
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
    assert found[0]["measured"]["ranks"] == ranks
    assert found[0]["step_seconds"] > 0
    assert (found[0]["local_bandwidth"] is None) is (workers == 1)


def test_rank_0_prints_in_a_launchers_ranks(processes: Processes, recipe: Path) -> None:
    first, second = processes.run(qsr_job, ranks=2, argv=["plan", str(recipe), "--measure"])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "measured: " in first[1]
    assert "* qsr H>=2 alpha=0.006" in first[1]
    assert second[1] == ""


# --------------------------------------------------------------------------- what is made of the times, by hand


def test_variation_within_and_between_workers() -> None:
    """Two workers that alternate by 10 % about means of 1 s and 2 s; nothing of the difference is chance."""
    times = [[mean * (0.9, 1.1)[index % 2] for index in range(STEPS)] for mean in (1.0, 2.0)]
    found = _of_steps(times, worker_size=1)
    within = 0.1 * (STEPS / (STEPS - 1)) ** 0.5
    assert found["step_seconds"] == pytest.approx(1.5)
    assert found["step_cv"] == pytest.approx(within)
    assert found["worker_cv"] == pytest.approx((0.5 / 1.5**2 - within**2 / STEPS) ** 0.5)
    together = _of_steps(times, worker_size=2)
    assert (together["step_seconds"], together["worker_cv"]) == (pytest.approx(2.0), 0.0), "as slow as its slower rank"
    assert _of_steps([times[0], times[0]], worker_size=1)["worker_cv"] == 0.0, "chance explains more than there is"


@pytest.mark.parametrize(
    "truth",
    [
        Network(1e9, latency=1e-3),
        Network(1e9, latency=1e-3, workers_per_host=2),
        Network(float("inf"), workers_per_host=4, local_bandwidth=1e9, local_latency=1e-3),
    ],
)
def test_a_network_is_found_again(truth: Network) -> None:
    averaging, small = (truth.all_reduce_seconds(payload, 4) for payload in (1e8, 0.0))
    found = _of_network(1e8, averaging, small, 4, Network(float("inf"), workers_per_host=truth.workers_per_host))
    if found["bandwidth"] is None:
        assert found == pytest.approx({"bandwidth": None, "local_bandwidth": 1e9, "local_latency": 1e-3})
    else:
        assert found == pytest.approx({"bandwidth": 1e9, "latency": 1e-3})


def test_gradients_that_go_another_way() -> None:
    assert _relative_rate(0.5, averaging=1.1, reducing=1.1, small=0.1) == pytest.approx(0.5)
    assert _relative_rate(1.0, averaging=1.1, reducing=4.1, small=0.1) == pytest.approx(0.25)
    assert _relative_rate(0.0, averaging=1.0, reducing=1.0, small=0.1) == 1.0
