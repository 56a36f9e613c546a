"""The learning rate of a run and the parameter groups of an optimizer, each with a factor on it, `lr_scale`.

timm and others lower it with depth (layer-wise decay). What is recorded, and what sets H, is the rate without a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch

from qsr_engine.config.strict import ConfigError
from qsr_engine.local_steps.steps import LocalSteps


def base_rate(param_groups: Iterable[Mapping[str, Any]]) -> float:
    """The learning rate in the groups whose lr_scale is 1; of several the largest, which gives the smallest H.

    Where every group has another lr_scale, theirs is divided by it. A group of lr_scale 0 tells nothing.

    Raises:
        ConfigError: as scale_of().
    """
    rates = [(float(group["lr"]), scale_of(group)) for group in param_groups]
    whole = [rate for rate, scale in rates if scale == 1]
    return max(whole or [rate / scale for rate, scale in rates if scale], default=0.0)


def scale_of(group: Mapping[str, Any]) -> float:
    """A group's lr_scale; 1 without one. Raises ConfigError where it is no factor."""
    scale = group.get("lr_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= float(scale) < math.inf:
        raise ConfigError(
            f"a parameter group has the lr_scale {scale!r}, and it is a factor on the learning rate; write a number of "
            "0 or more, such as 0.75"
        )
    return float(scale)


class LearningRate:
    """Sets the learning rate of every parameter group at every step; without `qsr.lr` it does nothing.

    Args:
        optimizer: torch's; its `param_groups` are asked each time, since DeepSpeed makes new ones.
    Raises:
        ConfigError: the groups have different learning rates and no lr_scale.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, local_steps: LocalSteps) -> None:
        self._optimizer = optimizer
        self._state = local_steps
        self._given: list[float] = []  # to each group, last
        if local_steps.qsr.lr is not None:
            _check_one(optimizer.param_groups)
        self.set()

    def set(self) -> None:
        """Give every group the learning rate of the next step."""
        if self._state.qsr.lr is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._state.learning_rate * scale_of(group)
            self._given = [group["lr"] for group in self._optimizer.param_groups]

    def check(self) -> None:
        """A scheduler that the engine was not given, and that overwrote what qsr.lr says, goes unseen otherwise.

        Raises:
            RuntimeError: something else has set a learning rate.
        """
        for group, expected in zip(self._optimizer.param_groups, self._given, strict=False):
            if group["lr"] != expected:
                raise RuntimeError(
                    f"step {self._state.step} would have the learning rate {group['lr']}, and qsr.lr says "
                    f"{expected}: something else sets it, a scheduler perhaps; leave that out, or qsr.lr"
                )


def _check_one(param_groups: list[dict[str, Any]]) -> None:
    rates = {float(group["lr"]) for group in param_groups if "lr_scale" not in group}
    if len(rates) > 1:
        raise ConfigError(
            f"the parameter groups have the learning rates {sorted(rates)}, and qsr.lr sets one for all; give the "
            "groups an 'lr_scale' (a factor on qsr.lr), or leave qsr.lr out and use a scheduler of your own"
        )
