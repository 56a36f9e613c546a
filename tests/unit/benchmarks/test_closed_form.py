"""The closed form of the simulation: against cases worked by hand, and against Monte Carlo."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale.closed_form import Cost, CostModel, Network, StepTime
from qsr_engine.schedule import Round

GB = 1e9


def model(**changes: Any) -> CostModel:
    """Steps of 1 s; 4 workers with ports of 1 GB/s average 2 GB in 3 s and gradients of 1 GB in 1.5 s."""
    plain: dict[str, Any] = {
        "step": StepTime(1.0),
        "network": Network(GB),
        "workers": 4,
        "parameter_bytes": 2 * GB,
        "gradient_bytes": GB,
        "bucket_bytes": 0.1 * GB,
    }
    return CostModel(**{**plain, **changes})


# ------------------------------------------------------------------------------------------------- all-reduce


@pytest.mark.parametrize(
    ("network", "workers", "seconds", "port"),
    [
        # A ring of 4 hosts: 6 messages of a quarter of 1 GB, and 6 latencies.
        (Network(GB, latency=0.01), 4, 6 * 0.25 + 6 * 0.01, 1.5 * GB),
        (Network(GB, efficiency=0.5), 2, 2.0, GB),
        # 8 workers on 2 hosts in one ring: every link carries 14 eighths; with 14 latencies, of the slower link each.
        (Network(GB, 0.01, workers_per_host=4, local_bandwidth=10 * GB), 8, 1.75 + 14 * 0.01, 1.75 * GB),
        (Network(GB, workers_per_host=4, local_bandwidth=0.5 * GB), 8, 3.5, 1.75 * GB),
        # In two levels: inside the host 2 * 3 / 4 GB, between 2 hosts 1 GB, one after the other.
        (Network(GB, 0.01, 4, 10 * GB, two_level=True), 8, 0.15 + 1.0 + 2 * 0.01, GB),
        (Network(GB, 0.0, 4, 10 * GB, two_level=True, local_latency=0.1), 8, 0.15 + 1.0 + 6 * 0.1, GB),
        # One host: the port is not used, nor its latency.
        (Network(GB, 0.01, workers_per_host=4, local_bandwidth=2 * GB), 4, 0.75, 0.0),
        (Network(GB, workers_per_host=4, local_latency=0.1), 4, 0.6, 0.0),
        (Network(math.inf, latency=0.01), 4, 0.06, 1.5 * GB),
        (Network(GB, latency=0.01), 1, 0.0, 0.0),
        (Network(GB, latency=0.01, two_level=True), 1, 0.0, 0.0),
    ],
)
def test_an_all_reduce_of_1_gb_by_hand(network: Network, workers: int, seconds: float, port: float) -> None:
    assert network.all_reduce_seconds(GB, workers) == pytest.approx(seconds)
    assert network.port_bytes(GB, workers) == pytest.approx(port)
    assert network.bytes_sent(GB, workers) == pytest.approx(2 * (workers - 1) / workers * GB)


@given(
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 9),
    st.floats(1e5, 1e12),
    st.floats(1.01, 10),
)
def test_a_better_network_is_never_slower(
    two_level: bool, workers: int, per_host: int, rate: float, factor: float
) -> None:
    network = Network(rate, 1e-4, per_host, 10 * rate, two_level=two_level)
    seconds = network.all_reduce_seconds(1e8, workers)
    assert seconds >= 0
    assert network.all_reduce_seconds(1e8, workers) <= network.all_reduce_seconds(2e8, workers)
    for better in (
        replace(network, bandwidth=rate * factor),
        replace(network, latency=1e-5),
        replace(network, local_bandwidth=10 * rate * factor),
    ):
        assert better.all_reduce_seconds(1e8, workers) <= seconds * (1 + 1e-12)


# -------------------------------------------------------------------------------------------------- stragglers


@pytest.mark.parametrize(
    ("cv", "worker_cv", "workers", "steps"),
    [
        (0.05, 0.0, 16, 1),
        (0.3, 0.0, 16, 1),
        (0.3, 0.0, 16, 8),
        (0.3, 0.0, 2, 30),
        (1.0, 0.0, 8, 1),
        (1.0, 0.0, 8, 4),
        (0.1, 0.05, 64, 16),
        (0.0, 0.2, 5, 7),
    ],
)
def test_the_slowest_worker_against_monte_carlo(cv: float, worker_cv: float, workers: int, steps: int) -> None:
    """Sums of lognormal draws are not lognormal; that they are taken for it costs under 0.5 % here.

    The trials add four standard errors of their own mean.
    """
    random = np.random.default_rng(7)
    trials = 2_000_000 // (workers * steps)
    sigma, worker_sigma = math.sqrt(math.log1p(cv**2)), math.sqrt(math.log1p(worker_cv**2))
    draws = np.exp(random.normal(-(sigma**2) / 2, sigma, (trials, workers, steps))).sum(axis=2)
    slowest = (draws * np.exp(random.normal(-(worker_sigma**2) / 2, worker_sigma, (trials, workers)))).max(axis=1)
    expected, error = float(slowest.mean()), float(slowest.std()) / math.sqrt(trials)
    assert StepTime(1.0, cv, worker_cv).slowest(workers, steps) == pytest.approx(expected, rel=0.005, abs=4 * error)


def test_the_slowest_by_hand() -> None:
    """The larger of two normals of variance s^2 is s / sqrt(pi) above their mean; a small cv is as good as normal."""
    assert StepTime(2.0, 0.001).slowest(2, 1) == pytest.approx(2 * (1 + 0.001 / math.sqrt(math.pi)), rel=1e-6)
    assert StepTime(2.0, 0.001).slowest(2, 100) == pytest.approx(200 * (1 + 0.0001 / math.sqrt(math.pi)), rel=1e-6)
    # A slow machine is slow in every step, so its lead does not average out.
    assert StepTime(2.0, 0.0, 0.001).slowest(2, 100) == pytest.approx(200 * (1 + 0.001 / math.sqrt(math.pi)), rel=1e-6)
    assert StepTime(2.0, 0.5, 0.5).slowest(1, 3) == 6.0
    assert StepTime(2.0).slowest(99, 3) == 6.0
    assert StepTime(2.0, 0.5).slowest(4, 0) == 0.0


# ------------------------------------------------------------------------------------------------------ rounds


def test_a_round_of_local_steps_by_hand() -> None:
    four = Round(0, 4, "local")
    assert model().round(four) == Cost(4.0, 3.0, 0.0, 3 * GB)
    slow = model(step=StepTime(1.0, 0.5))
    assert slow.round(four).waiting == pytest.approx(slow.step.slowest(4, 4) - 4)


def test_a_step_of_parallel_by_hand() -> None:
    """1.5 s of gradients, 0.15 s of them the last bucket's."""
    step = Round(0, 1, "parallel")
    exposed = [model(backward_share=share).round(step).communication for share in (0.0, 0.5, 1.0)]
    assert exposed == pytest.approx([1.5, 1.0, 0.5])
    fast = model(network=Network(3 * GB), backward_share=1.0)
    assert fast.round(step).communication == pytest.approx(0.05), "the last bucket is never hidden"
    assert model().round(step).bytes == 1.5 * GB


def test_a_run_is_the_sum_of_its_rounds() -> None:
    costs = model(step=StepTime(1.0, 0.3, 0.1))
    rounds = [Round(0, 1, "parallel"), Round(1, 1, "parallel"), Round(2, 4, "local"), Round(6, 9, "local")]
    rounds += [Round(15, 4, "local"), Round(19, 4, "local")]
    expected, run = sum((costs.round(round_) for round_ in rounds), Cost()), costs.run(rounds)
    assert [run.compute, run.communication, run.waiting, run.bytes] == pytest.approx(
        [expected.compute, expected.communication, expected.waiting, expected.bytes]
    )
    assert expected.total == expected.compute + expected.communication + expected.waiting
    assert costs.run([]) == Cost()


def test_local_steps_wait_less_than_parallel() -> None:
    """Both by draws that average out within a round, and only there: H = 1 waits as parallel does."""
    costs = model(step=StepTime(1.0, 0.3))
    waiting = {h: costs.run([Round(0, h, "local")] * (64 // h)).waiting for h in (1, 4, 64)}
    assert waiting[1] == pytest.approx(costs.run([Round(0, 1, "parallel")] * 64).waiting)
    assert waiting[4] == pytest.approx(waiting[1] / 2, rel=0.1), "the spread of a mean of 4 is half of one draw's"
    assert waiting[64] < waiting[4] / 3
    lasting = model(step=StepTime(1.0, 0.0, 0.3))
    assert lasting.run([Round(0, 64, "local")]).waiting == pytest.approx(
        lasting.run([Round(0, 1, "parallel")] * 64).waiting
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Network(0.0), "bandwidth is 0.0; write bytes/s above 0"),
        (lambda: Network(math.nan), "bandwidth is nan"),
        (lambda: Network(1.0, latency=-1.0), "latency is -1.0"),
        (lambda: Network(1.0, workers_per_host=0), "workers_per_host is 0"),
        (lambda: Network(1.0, efficiency=0.0), "efficiency is 0.0"),
        (lambda: StepTime(0.0), "mean is 0.0"),
        (lambda: StepTime(1.0, cv=-0.1), "cv is -0.1"),
        (lambda: model(workers=0), "workers is 0"),
        (lambda: model(backward_share=1.5), "backward_share is 1.5"),
        (lambda: model(parameter_bytes=math.inf), "parameter_bytes is inf"),
    ],
)
def test_figures_that_cannot_be(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        make()
