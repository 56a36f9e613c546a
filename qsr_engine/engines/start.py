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
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.groups import OwnGroups
from qsr_engine.membership.facts import check_agreement
from qsr_engine.membership.quorum import Members
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


def check_scheduler(scheduler: Any) -> None:
    """Raises ConfigError for a scheduler that would not know what to do at a step."""
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(
            "ReduceLROnPlateau needs a metric at every step, which the engine does not have; write a schedule of the "
            "step, or set the learning rate yourself after engine.step() and give no lr_scheduler"
        )


def with_sparse_gradients(model: nn.Module) -> str | None:
    """The module whose parameters get sparse gradients, in words; None where none does."""
    found = next((name for name, module in model.named_modules() if getattr(module, "sparse", None) is True), None)
    return None if found is None else f"the module {found!r}" if found else "the model"


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
    kind: str,
    groups: Sequence[Sequence[Tensor]],
    names: Mapping[Any, str],
    options: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> dict[str, dict[str, str]]:
    """Compare between all ranks which parameters are averaged, in which order, and how they are trained.

    Args:
        kind: of the optimizer.
        groups: its parameters.
        names: of the parameters.
        options: its param_groups. Learning rates are left out: they may differ by rounding, and a boundary compares
            them.
    Returns:
        The name of every parameter, by group and place.
    Raises:
        AgreementError: on every rank.
    """
    named = {
        f"group {number}": {f"parameter {place}": names.get(p, "?") for place, p in enumerate(group)}
        for number, group in enumerate(groups)
    }
    told = {f"group {number}": _plain(group) for number, group in enumerate(options)}
    check_agreement({"optimizer": {"type": kind, **named}, "options": told}, device)
    return named


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that are numbers, words or tuples of such."""
    given = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
    return {key: value for key, value in given.items() if isinstance(value, (bool, int, float, str, tuple))}


def members_of(qsr: QSRConfig, own: OwnGroups, agreed: Agreed, **facts: Any) -> Members | None:
    """The other workers, where they come and go; None where all are in this process group.

    Args:
        facts: more of what must be the same on all members.
    Raises:
        ConfigError: there is no torchft, no lighthouse, or more than one worker in this process group.
    """
    if not qsr.membership.elastic:
        return None
    ranks = dist.get_world_size()
    if ranks != qsr.worker_size:
        raise ConfigError(
            "qsr.membership is 'torchft', where every worker is a job of its own, of qsr.worker_size "
            f"({qsr.worker_size}) ranks, and this one has {ranks}; start `qsr train RECIPE --elastic --ranks {ranks}`, "
            f"or a launcher of {qsr.worker_size} ranks for every worker"
        )
    told = {"configuration": agreed.config, "model": agreed.model, "worker_size": qsr.worker_size, **facts}
    return Members(qsr.membership, own.inside, {key: str(value) for key, value in {**told, **versions()}.items()})


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
