"""Who is an outlier, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qsr_engine.config.qsr import OutlierConfig, QSRConfig
from qsr_engine.config.strict import ConfigError, validate
from qsr_engine.local_steps.outliers import Outliers

USUAL = [[1.0, 1.1, 0.9], [1.2, 1.0, 0.8], [1.0, 0.9, 1.1]]


def judge(outliers: Outliers, norms: list[float], without: Any = ()) -> dict[int, float]:
    return outliers.judge([norm**2 for norm in norms], without)


def taught(**more: Any) -> Outliers:
    outliers = Outliers(OutlierConfig(**{"z": 3.0, "after_averagings": 3, **more}))
    for norms in USUAL:
        assert judge(outliers, norms) == {}
    return outliers


def test_the_limit_by_hand() -> None:
    """Mean 1 of nine numbers, each by its round's median of 1; variances about the mean so far."""
    outliers = taught()
    variance = (0.02 / 3 + 0.08 / 3 + 0.02 / 3) / 3
    assert outliers.mean == pytest.approx(1.0, abs=1e-15)
    assert outliers.variance == pytest.approx(variance, rel=1e-12)
    limit = 1 + 3 * math.sqrt(variance)
    assert judge(outliers, [2.0, 2.0 * limit * 1.001, 1.9]) == {1: pytest.approx(1 / 1.001)}
    assert outliers.largest == pytest.approx((1.001 * limit - 1) / math.sqrt(variance))
    assert judge(taught(), [2.0, 2.0 * limit * 0.999, 1.9]) == {}


def test_an_outlier_is_not_learnt_from() -> None:
    with_one, without = taught(), taught()
    assert judge(with_one, [1.0, 50.0, 1.0])
    judge(without, [1.0, 1.0])
    assert with_one.state_dict() == without.state_dict()


def test_norms_that_grow_for_all_are_nobodys_fault() -> None:
    """As where QSR's period doubles; a z-test of the norm itself, over earlier rounds, would leave out everybody."""
    outliers, seen, largest = taught(), [norm for norms in USUAL for norm in norms], []
    for grown in (2.0, 4.0, 8.0):
        norms = [grown * norm for norm in USUAL[0]]
        largest.append((min(norms) - np.mean(seen)) / np.std(seen))
        seen += norms
        assert judge(outliers, norms) == {}
    assert largest[0] > 3


def test_the_first_averagings_are_learnt_from() -> None:
    outliers = Outliers(OutlierConfig(after_averagings=2))
    assert judge(outliers, [1.0, 1.1, 30.0]) == {}
    assert outliers.largest is None
    assert judge(outliers, [1.0, 1.1, 0.9]) == {}
    assert judge(outliers, [1.0, 1.1, 0.9]) == {}
    assert outliers.largest is not None


def test_who_is_left_out_already_counts_for_nothing() -> None:
    """Its norm is told as 0; the median is that of the others."""
    assert judge(taught(), [0.0, 5.0, 1.0, 1.1], [0]).keys() == {1}
    assert judge(taught(), [0.0, 0.0], [0, 1]) == {}


def test_old_averagings_are_forgotten() -> None:
    """Of 50 and more, the newest counts 0.02."""
    outliers = Outliers(OutlierConfig(after_averagings=1000))
    for _ in range(60):
        judge(outliers, [1.0, 1.0, 1.3])
    mean = outliers.mean
    judge(outliers, [1.0, 1.0, 4.0])
    assert outliers.mean == pytest.approx(mean + 0.02 * (2.0 - mean), rel=1e-12)


@pytest.mark.parametrize("norms", [[0.0, 0.0, 0.0], [0.0, 0.0, 5.0], [1.0]])
def test_nobody_is_far_where_nobody_moves_or_one_is_alone(norms: list[float]) -> None:
    assert judge(taught(), norms) == {}


def test_half_of_the_workers_always_stay() -> None:
    """With a z near 0 and a mean below the median, those at the median would all be outliers."""
    outliers = Outliers(OutlierConfig(z=0.01, after_averagings=1))
    judge(outliers, [0.1, 1.0, 1.0])
    assert judge(outliers, [1.0, 1.0, 1.0]) == {}
    assert judge(outliers, [1.0, 1.0, 2.0]).keys() == {2}


def test_its_state_goes_on() -> None:
    outliers, other = taught(), Outliers(OutlierConfig(after_averagings=3))
    other.load_state_dict(outliers.state_dict())
    assert judge(other, [1.0, 9.0, 1.0]) == judge(outliers, [1.0, 9.0, 1.0]) != {}
    other.load_state_dict(None)
    assert other.averagings == 0


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"strategy": "parallel", "total_steps": 5}, "in which no worker moves by itself; write null"),
        (
            {"strategy": "constant", "total_steps": 5, "averaging": {"overlap": "delayed", "delay_steps": 1}},
            "outlier is set and averaging.overlap is 'delayed'",
        ),
    ],
)
def test_where_it_is_refused(block: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(QSRConfig, {**block, "faults": {"outlier": {}}}, where="test")


@pytest.mark.parametrize("bad", [{"z": 0}, {"z": "3 sigma"}, {"then": "drop"}, {"after_averagings": 0}, {"sigma": 3}])
def test_bad_keys_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"faults.outlier.{next(iter(bad))}"):
        validate(QSRConfig, {"strategy": "constant", "total_steps": 5, "faults": {"outlier": bad}}, where="test")
