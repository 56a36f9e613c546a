"""The cost model: against cases worked by hand, against Monte Carlo, and the fit from two runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsr_engine.planning.cost import (
    Cost,
    CostModel,
    Fit,
    Network,
    Observed,
    StepTime,
    fit_two_runs,
    smallest_period,
    tally,
)
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
        # Two trees: as many bytes, and twice log2(4) latencies.
        (Network(GB, latency=0.01, algorithm="tree"), 4, 1.5 + 4 * 0.01, 1.5 * GB),
        (Network(GB, latency=0.01, algorithm="tree"), 5, 1.6 + 2 * 3 * 0.01, 1.6 * GB),
        (Network(GB, efficiency=0.5), 2, 2.0, GB),
        # 8 workers on 2 hosts in one ring: every link carries 14 eighths; with 14 latencies, of the slower link each.
        (Network(GB, 0.01, workers_per_host=4, local_bandwidth=10 * GB), 8, 1.75 + 14 * 0.01, 1.75 * GB),
        (Network(GB, workers_per_host=4, local_bandwidth=0.5 * GB), 8, 3.5, 1.75 * GB),
        # In two levels: inside the host 2 * 3 / 4 GB, between 2 hosts 1 GB, one after the other.
        (Network(GB, 0.01, 4, 10 * GB, two_level=True), 8, 0.15 + 1.0 + 2 * 0.01, GB),
        (Network(GB, 0.0, 4, 10 * GB, two_level=True, local_latency=0.1), 8, 0.15 + 1.0 + 6 * 0.1, GB),
        # A tree between hosts, a chain inside, pipelined.
        (Network(GB, 0.01, 4, 0.5 * GB, algorithm="tree"), 8, 3.0 + 2 * 0.01, GB),
        # One host: the port is not used, nor its latency.
        (Network(GB, 0.01, workers_per_host=4, local_bandwidth=2 * GB), 4, 0.75, 0.0),
        (Network(GB, workers_per_host=4, local_latency=0.1), 4, 0.6, 0.0),
        (Network(math.inf, latency=0.01), 4, 0.06, 1.5 * GB),
        (Network(GB, latency=0.01), 1, 0.0, 0.0),
        (Network(GB, latency=0.01, algorithm="tree", two_level=True), 1, 0.0, 0.0),
    ],
)
def test_an_all_reduce_of_1_gb_by_hand(network: Network, workers: int, seconds: float, port: float) -> None:
    assert network.all_reduce_seconds(GB, workers) == pytest.approx(seconds)
    assert network.port_bytes(GB, workers) == pytest.approx(port)
    assert network.bytes_sent(GB, workers) == pytest.approx(2 * (workers - 1) / workers * GB)


@given(
    st.sampled_from(["ring", "tree"]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 9),
    st.floats(1e5, 1e12),
    st.floats(1.01, 10),
)
def test_a_better_network_is_never_slower(
    algorithm: Any, two_level: bool, workers: int, per_host: int, rate: float, factor: float
) -> None:
    network = Network(rate, 1e-4, per_host, 10 * rate, algorithm, two_level=two_level)
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
    assert model(boundary_seconds=0.2).round(four).communication == 3.2
    overlapped = model(forward_share=0.25)
    assert overlapped.round(four).communication == 2.75
    assert overlapped.round(four, last=True).communication == 3.0, "nothing runs after the last averaging"
    assert model(forward_share=9.0).round(four).communication == 0.0
    assert model(forward_share=9.0).round(Round(0, 1, "local")).communication == 2.0, "a round hides its own length"
    slow = model(step=StepTime(1.0, 0.5))
    assert slow.round(four).waiting == pytest.approx(slow.step.slowest(4, 4) - 4)


def test_a_step_of_parallel_by_hand() -> None:
    """1.5 s of gradients, 0.15 s of them the last bucket's."""
    step = Round(0, 1, "parallel")
    exposed = [model(backward_share=share).round(step).communication for share in (0.0, 0.5, 1.0)]
    assert exposed == pytest.approx([1.5, 1.0, 0.5])
    fast = model(network=Network(3 * GB), backward_share=1.0)
    assert fast.round(step).communication == pytest.approx(0.05), "the last bucket is never hidden"
    assert model(backward_share=0.0, gradient_efficiency=0.5).round(step).communication == 3.0
    assert model().round(step).bytes == 1.5 * GB


def test_a_run_is_the_sum_of_its_rounds() -> None:
    costs = model(step=StepTime(1.0, 0.3, 0.1), forward_share=0.5, boundary_seconds=0.1)
    rounds = [Round(0, 1, "parallel"), Round(1, 1, "parallel"), Round(2, 4, "local"), Round(6, 9, "local")]
    rounds += [Round(15, 4, "local"), Round(19, 4, "local")]
    expected = sum((costs.round(round_) for round_ in rounds[:-1]), Cost()) + costs.round(rounds[-1], last=True)
    for run in (costs.run(rounds), costs.run(tally(rounds)), costs.run(iter(rounds))):
        assert [run.compute, run.communication, run.waiting, run.bytes] == pytest.approx(
            [expected.compute, expected.communication, expected.waiting, expected.bytes]
        )
    assert (tally(rounds).rounds, tally(rounds).steps) == (6, 23)
    assert expected.total == expected.compute + expected.communication + expected.waiting
    assert costs.run([]) == Cost()
    assert Cost().communication_share == 0.0


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
        (lambda: Network(1.0, algorithm="star"), "algorithm is 'star'"),  # type: ignore[arg-type]
        (lambda: StepTime(0.0), "mean is 0.0"),
        (lambda: StepTime(1.0, cv=-0.1), "cv is -0.1"),
        (lambda: model(workers=0), "workers is 0"),
        (lambda: model(backward_share=1.5), "backward_share is 1.5"),
        (lambda: model(parameter_bytes=math.inf), "parameter_bytes is inf"),
        (lambda: model(gradient_efficiency=0), "gradient_efficiency is 0"),
    ],
)
def test_figures_that_cannot_be(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        make()


# --------------------------------------------------------------------------------------------------------- fit


_COUNTS, _SECONDS = st.integers(1, 1000), st.floats(0.1, 10)


@given(_COUNTS, _COUNTS, _SECONDS, _SECONDS, _COUNTS, _COUNTS)
def test_a_fit_finds_the_truth(steps: int, others: int, step: float, averaging: float, one: int, two: int) -> None:
    """The rounding of the totals, 1e-16 of at most 2e4 s, grows as the two runs become alike; by less than 1e6 each."""
    if steps * two == others * one:
        return
    runs = [Observed(s, a, s * step + a * averaging) for s, a in ((steps, one), (others, two))]
    fit = fit_two_runs(*runs)
    assert (fit.step_seconds, fit.averaging_seconds) == pytest.approx((step, averaging), abs=1e-5)


def test_a_fit_foretells_a_third_run() -> None:
    """Appendix F: total = steps c + averagings a. Here c = 2 s and a = 5 s."""
    fit = fit_two_runs(Observed(100, 50, 450.0), Observed(100, 10, 250.0))
    assert fit == Fit(2.0, 5.0)
    assert fit.run([Round(0, 25, "local")] * 4) == Cost(200.0, 20.0)
    assert fit.run([Round(0, 1, "parallel")] * 100).total == 700.0


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (Observed(100, 25, 9.0), Observed(100, 25, 8.0), "both runs average 25 times in 100 steps"),
        (Observed(100, 25, 9.0), Observed(200, 50, 18.0), "nothing tells compute from averaging"),
        (Observed(100, 50, 9.0), Observed(100, 25, 10.0), "give runs in which more averagings took more time"),
        (Observed(100, 100, 99.0), Observed(100, 1, 0.5), "give runs in which more averagings took more time"),
    ],
)
def test_runs_that_fit_nothing(one: Observed, other: Observed, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_two_runs(one, other)


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_smallest_period(answer: int, largest: int) -> None:
    """For a share that falls as 1 / h, which is under the limit from `answer` on."""
    found = smallest_period(lambda h: 1 / h, 1 / answer, largest)
    assert found == (answer if answer <= largest else None)
