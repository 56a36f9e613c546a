"""The learning rate that `qsr.lr` says, in the parameter groups of an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from qsr_engine.config.strict import ConfigError
from qsr_engine.local_steps.steps import LocalSteps


class LearningRate:
    """Sets the learning rate of every parameter group at every step; without `qsr.lr` it does nothing.

    A group's own factor is its `lr_scale`.

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
                group["lr"] = self._state.learning_rate * group.get("lr_scale", 1.0)
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
