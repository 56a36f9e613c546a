"""The speed at which sharpness falls: the slow SDEs of the paper's Section 3, measured by benchmarks/slow_sde.

A boundary that averages nothing, gradients that are averaged in a local round, or a period that does not follow the
learning rate move one of these speeds by more than its interval.
"""

from __future__ import annotations

import math

import pytest
import torch.distributed as dist

from benchmarks.slow_sde.measurement import Outcome, Pair, measure
from benchmarks.slow_sde.theory import Case, predicted_speed, psi
from tests.support.pool import Processes

WORKERS = 4
CASES = {
    "parallel": Case("parallel", WORKERS, lr=0.02, trials=400, slow_time=0.1),  # 250 steps; each is an all-reduce
    "constant H": Case("constant H", WORKERS, lr=0.02, trials=400, slow_time=0.2, period=4),
    "QSR": Case("QSR", WORKERS, lr=0.02, trials=400, slow_time=0.2, period=25),
}


def speeds_job() -> dict[str, Outcome]:
    dist.init_process_group("gloo")
    return {name: measure(case, number) for number, (name, case) in enumerate(CASES.items())}


def agrees(measured: Pair, predicted: float) -> bool:
    """Within four standard errors, and what the prediction leaves out: terms of the order lr^2, less than 1 %."""
    return abs(measured[0] - predicted) < 4 * measured[1] + 0.01 * predicted


def test_every_strategy_drifts_as_fast_as_the_slow_sde_says(processes: Processes) -> None:
    found: dict[str, Outcome] = processes.run(speeds_job, ranks=WORKERS)[0]
    for name, outcome in found.items():
        assert agrees(outcome.speed, predicted_speed(CASES[name], finite=True)), name
    parallel, constant, qsr = (outcome.speed for outcome in found.values())
    assert qsr[0] - 4 * qsr[1] > 0.9 * WORKERS * (parallel[0] + 4 * parallel[1])
    assert constant[0] + 4 * constant[1] < 0.5 * WORKERS * (parallel[0] - 4 * parallel[1])
    assert found["QSR"].longest == 100  # (alpha / lr)^2: twice the learning rate would have given 25
    assert found["constant H"].longest == 4


def test_psi_grows_from_nothing_to_one() -> None:
    assert psi(0.0) == 0
    assert psi(1e-5) == pytest.approx(0.5e-5, rel=1e-4)
    assert psi(1e-4) == pytest.approx(psi(1.0001e-4), rel=1e-3)  # where its two formulas meet
    assert psi(1e6) == pytest.approx(1, abs=2e-6)
    values = [psi(x) for x in (0.0, 0.1, 1.0, 10.0, 100.0)]
    assert values == sorted(values)


def test_both_predictions_agree_as_the_learning_rate_falls() -> None:
    for name, slow_time in (("parallel", 0.01), ("H ~ 1/lr", 0.04)):
        case = Case(name, 8, lr=0.002, trials=1, slow_time=slow_time)
        assert predicted_speed(case, finite=True) == pytest.approx(predicted_speed(case, finite=False), rel=0.01)


def test_rounds_of_one_step_are_parallel() -> None:
    local, parallel = (Case(name, 8, lr=0.02, trials=1, period=1) for name in ("constant H", "parallel"))
    assert predicted_speed(local, finite=True) == pytest.approx(predicted_speed(parallel, finite=True), rel=0.005)


def test_the_prediction_has_the_limits_that_the_paper_names() -> None:
    def predicted(name: str, lr: float) -> float:
        return predicted_speed(Case(name, 8, lr, trials=1, slow_time=0.02), finite=False)

    assert predicted("parallel", 0.01) == pytest.approx(1)
    assert predicted("constant H", 0.04) == pytest.approx(predicted("QSR", 0.04))  # the same period there
    assert predicted("constant H", 0.002) < 1.6 < predicted("constant H", 0.01)  # falls to 1
    assert predicted("H ~ 1/lr", 0.01) == pytest.approx(predicted("H ~ 1/lr", 0.002), rel=0.01)  # stays
    assert 7.8 < predicted("QSR", 0.002) < predicted("power 3", 0.002) < 8  # rise to K
    assert math.isclose(predicted("QSR", 0.02), 1 + 7 * psi(2 * 4.25 * 0.02 * 32), rel_tol=0.01)
