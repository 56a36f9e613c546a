"""What an optimizer was told for each of its parameter groups (betas, weight decay, momentum, ...), beside the rates.

A checkpoint has the groups as they were then. A resumed run takes over what has changed in training (a scheduler may
move the momentum), and follows its own configuration where that says something else than the saved run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RATES = ("lr", "initial_lr")  # a scheduler keeps them in the groups, and goes on from them

Groups = Sequence[Mapping[str, Any]]


def options_of(param_groups: Groups) -> list[dict[str, Any]]:
    """The plain values of each group, among them its lr_scale, which is 1 where it has none."""
    left_out = ("params", "step", *RATES)  # DeepSpeed's FusedAdam counts its steps there
    return [
        {k: _listed(v) for k, v in {"lr_scale": 1.0, **group}.items() if k not in left_out and _is_plain(v)}
        for group in param_groups
    ]


def changed(then: Groups, now: Groups) -> dict[str, tuple[Any, Any]]:
    """Options that are others than those of the saved run, as (saved, now), by "parameter group N: NAME"."""
    return {
        f"parameter group {number}: {key}": (saved[key], own[key])
        for number, (saved, own) in enumerate(zip(then, now, strict=False))
        for key in own
        if key in saved and saved[key] != own[key]
    }


def follow(param_groups: Sequence[dict[str, Any]], then: Groups, now: Groups) -> None:
    """Give groups that were loaded the options that are others than those of the saved run."""
    for group, saved, own in zip(param_groups, then, now, strict=False):
        for key, value in own.items():
            if key in saved and saved[key] != value:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _listed(value: Any) -> Any:
    """Tuples and lists are one, as in a configuration."""
    return list(value) if isinstance(value, list | tuple) else value
