"""The facts with which ranks were started, compared before any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from qsr_engine.averaging import all_gather_flat
from qsr_engine.averaging.errors import Group
from qsr_engine.config.digest import digest, flatten
from qsr_engine.membership.spelling import first_lines, spell_ranks


class AgreementError(RuntimeError):
    """The ranks were started with different facts (configuration, data, model); every rank raises it."""


def check_agreement(facts: Mapping[str, Any], device: torch.device, group: Group = None) -> None:
    """Compare facts (nested mappings of plain values) between all ranks of the group.

    Digests are compared first, so that facts travel only where they differ.

    Raises:
        AgreementError: on every rank, naming each fact that differs, its values, and the ranks.
    """
    ranks = dist.get_world_size(group)
    digests = torch.empty(ranks, dtype=torch.int64, device=device)
    all_gather_flat(digests, torch.tensor([digest(facts)], device=device), group=group)
    if bool((digests == digests[0]).all()):
        return
    lines = different(dict(flatten(facts)), group)
    if lines:
        raise AgreementError(
            "the ranks were not started alike:\n"
            + first_lines(lines)
            + "\nStart every rank with the same configuration and the same versions."
        )


def different(facts: Mapping[str, Any], group: Group = None) -> list[str]:
    """Gather facts from all ranks of the group: one line for each that differs, with its values and the ranks."""
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, dict(facts), group=group)
    lines = []
    for key in sorted(set().union(*gathered)):
        found = ranks_by_value([repr(ranks_facts.get(key, "nothing")) for ranks_facts in gathered])
        if len(found) > 1:
            lines.append(f"  {key}: " + "; ".join(f"{value} on {spell_ranks(ranks)}" for value, ranks in found.items()))
    return lines


def ranks_by_value(values: Sequence[Any]) -> dict[Any, list[int]]:
    """Who has each value."""
    found: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return found
