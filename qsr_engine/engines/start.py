"""The start of a run, the same for both engines: ranks that a launcher started meet, and agree on what they run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.config.digest import digest
from qsr_engine.config.strict import ConfigError
from qsr_engine.membership.facts import check_agreement
from qsr_engine.membership.roll_call import roll_call
from qsr_engine.membership.versions import versions


def join_ranks(backend: str, start: Callable[[], Any], *, launched: Sequence[str], command: str) -> None:
    """Start the process group, unless somebody has; the roll is called before.

    Args:
        start: makes the process group; called too where there is one, if the framework wants to know of it.
        launched: variables of the environment, of which a launcher sets one at least.
        command: how a user starts it.
    Raises:
        ConfigError: no launcher started this process.
        HostError: on every rank, if the ranks cannot meet; see roll_call().
    """
    if not dist.is_initialized() and not any(name in os.environ for name in launched):
        raise ConfigError(f"this process was not started by a launcher (RANK is not set); start it with {command}")
    with contextlib.nullcontext() if dist.is_initialized() else roll_call(backend):
        start()


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What all ranks have in common, in short."""

    config: int  # digest
    model: int  # digest


def agree(config: Mapping[str, Any], model: nn.Module, device: torch.device) -> Agreed:
    """Compare configuration, model and versions between all ranks, first of all, so that what follows fails on every
    rank or on none. Raises AgreementError."""
    facts = {
        "config": config,
        "model": describe(model),
        "versions": versions(),  # again, for a process group that somebody else has made
    }
    check_agreement(facts, device)
    return Agreed(digest(facts["config"]), digest(facts["model"]))


def agree_on_optimizer(
    kind: str, groups: Sequence[Sequence[Tensor]], names: Mapping[Any, str], device: torch.device
) -> dict[str, dict[str, str]]:
    """Compare between all ranks which parameters are averaged, in which order.

    Args:
        kind: of the optimizer.
        groups: its parameters.
        names: of the parameters.
    Returns:
        The name of every parameter, by group and place.
    Raises:
        AgreementError: on every rank.
    """
    named = {
        f"group {number}": {f"parameter {place}": names.get(p, "?") for place, p in enumerate(group)}
        for number, group in enumerate(groups)
    }
    check_agreement({"optimizer": {"type": kind, **named}}, device)
    return named


def order_label(facts: Mapping[str, Any]) -> str:
    """Which parameters are in which group of the optimizer, in which order, in a few characters for a layout."""
    counts = [len(group) for group in facts.values() if isinstance(group, Mapping)]
    return f"groups of {counts} parameters, in the order {digest(facts):x}"


def describe(model: nn.Module) -> dict[str, str]:
    """Name, type and shape of every parameter and buffer; it must be the same on every rank."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: f"{str(t.dtype).removeprefix('torch.')} {list(getattr(t, 'ds_shape', t.shape))}" for name, t in tensors
    }
