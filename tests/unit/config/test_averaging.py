"""Which optimizer states are averaged at the end of a round."""

from __future__ import annotations

from typing import Any

import pytest

from qsr_engine.config.averaging import AveragingConfig


@pytest.mark.parametrize(
    ("state", "due"),
    [
        ([], [[]] * 6),
        (["exp_avg"], [["exp_avg"]] * 6),
        ({"exp_avg": 3, "exp_avg_sq": 6}, [[], [], ["exp_avg"], [], [], ["exp_avg", "exp_avg_sq"]]),
        ({"exp_avg": 1, "exp_avg_sq": 2}, [["exp_avg"], ["exp_avg", "exp_avg_sq"]] * 3),
    ],
)
def test_a_state_is_averaged_at_the_end_of_every_so_many_rounds(state: Any, due: list[list[str]]) -> None:
    """Round 0 is the first, so a period of 3 is due at the end of round 2; DES-LOC's clocks begin with the run."""
    averaging = AveragingConfig(state=state)
    assert [averaging.states_due(number) for number in range(6)] == due
