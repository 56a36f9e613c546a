"""The three figures and their sum, by hand, and the fit from two runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsr_engine.planning.cost import Cost, Costs, Counts, Observed, beyond_hidden, count, fit_two_runs
from qsr_engine.schedule import Round


def test_a_run_is_counted_and_summed() -> None:
    """Steps of 2 s, averagings of 5 s, gradients of 1 s."""
    costs = Costs(2.0, 5.0, 1.0)
    local = count("constant", [Round(4 * n, 4, "local") for n in range(25)])
    assert local == Counts("constant", 100, 0, 25, last=4)
    assert costs.of(local) == Cost(200.0, 125.0)
    parallel = [Round(n, 1, "parallel") for n in range(100)]
    assert costs.of(count("parallel", parallel)) == Cost(200.0, 100.0)
    switched = count("post_local", [*parallel[:10], Round(10, 30, "local")])
    assert switched.all_averagings == 11
    assert costs.of(switched).total == 80.0 + 10.0 + 5.0


def test_gradients_hide_but_for_their_last_bucket() -> None:
    assert beyond_hidden(3.0, 0.0, 0.1) == 3.0
    assert beyond_hidden(3.0, 2.0, 0.1) == 1.0
    assert beyond_hidden(3.0, 9.0, 0.1) == pytest.approx(0.3)


_COUNTS, _SECONDS = st.integers(1, 1000), st.floats(0.1, 10)


@given(_COUNTS, _COUNTS, _SECONDS, _SECONDS, _COUNTS, _COUNTS)
def test_a_fit_finds_the_truth(steps: int, others: int, step: float, averaging: float, one: int, two: int) -> None:
    """The rounding of the totals, 1e-16 of at most 2e4 s, grows as the two runs become alike; by less than 1e6 each."""
    if steps * two == others * one:
        return
    fit = fit_two_runs(*(Observed(s, a, s * step + a * averaging) for s, a in ((steps, one), (others, two))))
    assert (fit.step_seconds, fit.averaging_seconds) == pytest.approx((step, averaging), abs=1e-5)
    assert fit.gradient_seconds == fit.averaging_seconds


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (Observed(100, 25, 9.0), Observed(200, 50, 18.0), "25 averagings in 100 steps and 50 in 200 are one period"),
        (Observed(100, 50, 9.0), Observed(100, 25, 10.0), "give runs in which more averagings took more time"),
        (Observed(100, 100, 99.0), Observed(100, 1, 0.5), "give runs in which more averagings took more time"),
    ],
)
def test_runs_that_fit_nothing(one: Observed, other: Observed, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_two_runs(one, other)
