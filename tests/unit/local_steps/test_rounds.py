"""The position in a run: what ranks agree on, and a state that is loaded into another run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.local_steps.header import BoundaryError, Header, _check_headers
from qsr_engine.local_steps.rounds import Rounds, with_a_new_round


def rounds(rate: float = 0.1, **more: Any) -> Rounds:
    block = {"strategy": "qsr", "alpha": 0.3, "power": 4, "h_base": 2, "total_steps": 1000, "warmup_steps": 0, **more}
    return Rounds(QSRConfig(**block), lambda: rate)


@pytest.mark.parametrize("rate", [0.1, 0.1 * (1 + 5e-13), math.nextafter(0.1, 1)])
def test_where_rates_differ_by_rounding_the_agreed_one_sets_the_period(rate: float) -> None:
    """Two hosts may round a cosine in two ways; (0.3 / 0.1)^4 is 81, and the second rate alone would give 80."""
    mine = rounds(rate)
    assert mine.period == (80 if rate > 0.1000000000000001 else 81)
    mine.agree(0.1)
    mine.begin_again()
    assert mine.period == 81
    mine.agree(0.2)  # that of another step
    mine.begin_again()
    assert mine.period == rounds(rate).period


def header(**more: Any) -> Header:
    return Header(**{"step": 4, "period": 2, "lr": 0.1, "digest": 7, "sum_of_squares": 1.0, **more})


def test_rates_that_differ_by_rounding_are_no_disagreement() -> None:
    _check_headers([header(), header(lr=math.nextafter(0.1, 1))])
    for other in (0.1 * (1 + 1e-11), math.nan):
        with pytest.raises(BoundaryError, match="learning rate"):
            _check_headers([header(), header(lr=other)])


def test_a_round_under_way_keeps_its_end_or_ends_with_the_run() -> None:
    state = {**rounds().state_dict(), "step": 90, "round": 1, "round_start": 81, "period": 81}
    for total, period in ((1000, 81), (100, 19)):
        mine = rounds(total_steps=total)
        mine.load_state_dict(state)
        assert (mine.step, mine.period, mine.at_start, mine.at_end) == (90, period, False, False)
    with pytest.raises(ValueError, match="inside a round, at step 90, with which this run ends"):
        rounds(total_steps=90).load_state_dict(state)


def test_the_average_begins_a_round_where_it_was_saved() -> None:
    mine = rounds(rate=0.3)  # H is 2 now
    mine.load_state_dict(with_a_new_round({**mine.state_dict(), "step": 90, "round_start": 81, "period": 81}))
    assert (mine.step, mine.period, mine.at_start, mine.round) == (90, 2, True, 1)
