"""The learning rate of groups with an lr_scale: what H follows is the rate without it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qsr_engine.checkpoint.group_options import changed, follow, options_of
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.learning_rate import LearningRate, base_rate
from qsr_engine.engines.replica import Parameters
from qsr_engine.local_steps.rounds import Rounds

QSR: dict[str, Any] = {"strategy": "qsr", "h_base": 2, "alpha": 0.3, "total_steps": 1000}


@pytest.mark.parametrize(
    ("groups", "rate"),
    [
        ([{"lr": 0.1}, {"lr": 0.02}], 0.1),  # two rates of a user's own: the smaller H
        ([{"lr": 0.025, "lr_scale": 0.25}, {"lr": 0.1}], 0.1),
        ([{"lr": 0.4, "lr_scale": 4.0}, {"lr": 0.1, "lr_scale": 1}], 0.1),  # a head that learns faster
        ([{"lr": 0.1, "lr_scale": 0.25}, {"lr": 0.1}], 0.1),  # a scheduler that does not know lr_scale
        ([{"lr": 0.025, "lr_scale": 0.25}, {"lr": 0.05, "lr_scale": 0.5}], 0.1),  # the whole rate is in none
        ([{"lr": 0.0, "lr_scale": 0}, {"lr": 0.05, "lr_scale": np.float32(0.5)}], 0.1),
        ([{"lr": 0.0, "lr_scale": 0.0}], 0.0),
        ([], 0.0),
    ],
)
def test_the_rate_without_scales(groups: list[dict[str, Any]], rate: float) -> None:
    assert base_rate(groups) == pytest.approx(rate)


@pytest.mark.parametrize("scale", ["0.5", True, None, -0.1, math.nan, math.inf, [1.0]])
def test_scales_that_are_no_factor(scale: Any) -> None:
    with pytest.raises(ConfigError, match="and it is a factor on the learning rate; write a number of 0 or more"):
        base_rate([{"lr": 0.1, "lr_scale": scale}])


def layers(*scales: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.ModuleList(nn.Linear(2, 2) for _ in scales)
    groups = [{"params": list(p.parameters()), "lr_scale": s} for p, s in zip(model, scales, strict=True)]
    return model, torch.optim.SGD(groups, lr=0.1)


def test_h_follows_the_rate_without_scales_under_a_scheduler() -> None:
    """As timm's schedulers set the groups: value x lr_scale. (0.3 / 0.1)^2 is 9, whatever the order of the groups."""
    for scales in ((0.25, 0.5, 1.0), (1.0, 0.5), (4.0, 1.0), (0.25, 0.5)):
        model, optimizer = layers(*scales)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group["lr_scale"]
        rounds = Rounds(QSRConfig(**QSR, warmup_steps=0), Parameters(model, optimizer).largest_rate)
        assert rounds.learning_rate == pytest.approx(0.1)
        assert rounds.period == 9


class _Position:
    """What LearningRate asks of LocalSteps."""

    qsr = QSRConfig(**QSR | {"lr": {"schedule": "constant", "peak": 0.2}})
    step, learning_rate = 0, 0.2


def test_groups_get_their_share() -> None:
    _, optimizer = layers(0.25, 4.0, 1.0)
    rate = LearningRate(optimizer, _Position())  # type: ignore[arg-type]
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.8, 0.2]
    rate.check()
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(RuntimeError, match=r"would have the learning rate 0.2, and qsr.lr says 0.05"):
        rate.check()


@pytest.mark.parametrize(("saved", "own"), [({"lr_scale": 0.5}, {}), ({}, {"lr_scale": 0.5}), ({}, {})])
def test_a_resumed_run_has_the_scales_of_its_own_configuration(saved: dict[str, Any], own: dict[str, Any]) -> None:
    then, now = options_of([{"lr": 0.1, **saved}]), options_of([{"lr": 0.1, **own}])
    loaded = [{"lr": 0.1, **saved}]  # by torch, which takes the saved groups whole
    follow(loaded, then, now)
    assert base_rate(loaded) * own.get("lr_scale", 1) == pytest.approx(0.1)
    assert loaded[0].get("lr_scale", 1) == own.get("lr_scale", 1)
    assert bool(changed(then, now)) == (saved != own)
