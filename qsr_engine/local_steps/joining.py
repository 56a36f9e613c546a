"""What members hand over to one that joins, or was late: outer state and buffers; and optimizer state to who joins.

All of it goes by collectives of everybody who is there, so that no single member sends to all who join.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging import Averager
from qsr_engine.averaging.tentative import give, give_mean
from qsr_engine.local_steps.averaged import Averaged

_COUNT = "step"  # that DeepSpeed's FusedAdam keeps in its groups, and torch's optimizers for every parameter


class Handover:
    """Of one rank, to or from those with its place on the other members.

    Args:
        on_other_workers: what becomes of the optimizer's state of who joins: "mean" of the members', or "fresh".
    """

    def __init__(self, replica: Averaged, averager: Averager, on_other_workers: str) -> None:
        self._replica, self._averager = replica, averager
        self._mean = on_other_workers == "mean"

    def run(self, group: dist.ProcessGroup, source: int, giving: int, *, gives: bool, late: bool, joining: int) -> None:
        """Every rank of the group calls it. What members hold is as it was.

        A member that is late keeps its optimizer's state, and the floating-point buffers that it has come with: these
        are averaged, or are each member's own.

        Args:
            source: the rank whose word counts where all members hold the same.
            giving: how many members give; this one `gives`, is `late`, or joins.
            joining: how many do.
        Raises:
            CollectiveError: a collective failed; who joins holds anything.
        """
        outer = self._averager.state_dict(inside_round=True).get("outer", {})
        same = [tensor for tensors in outer.values() for tensor in tensors]
        joins = not (gives or late)
        for tensor in (*same, *self._replica.frozen()):
            give(tensor, source, group, takes=not gives)
        for tensor in self._replica.all_buffers():
            give(tensor, source, group, takes=joins or (late and not tensor.is_floating_point()))
        if joining and self._mean:
            self._give_optimizer_state(group, source, giving, gives=gives, joins=joins)
        elif joins:
            self._start_anew()

    @torch.no_grad()
    def _give_optimizer_state(
        self, group: dist.ProcessGroup, source: int, giving: int, *, gives: bool, joins: bool
    ) -> None:
        """The mean of what has a master's shape; counts are those of one member: workers have counted the same steps,
        but for overflows."""
        described = json.loads(_from_one(json.dumps(self._described()), source, group))
        replica, masters = self._replica, self._replica.masters()
        for place, name, kind in described["state"]:
            value = replica.state(name)[place]
            if kind == "like":
                there = torch.zeros_like(masters[place]) if value is None else value
                give_mean([there], group, giving, gives=gives, takes=joins)
            elif isinstance(kind, list):
                there = torch.zeros(kind[1], dtype=getattr(torch, kind[0])) if value is None else value
                give(there, source, group, takes=joins)
            else:
                there = kind["value"]
            if joins:
                replica.put_state(place, name, there)
        if joins:
            for options, counts in zip(replica.groups(), described["groups"], strict=True):
                options.update(counts)

    def _described(self) -> dict[str, Any]:
        """Place, name and kind of all state: "like" its master, [type, shape] or {"value": a number}; and counts."""
        state: list[tuple[int, str, Any]] = []
        masters = self._replica.masters()
        for name in self._replica.state_names():
            for place, value in enumerate(self._replica.state(name)):
                if isinstance(value, Tensor):
                    alike = value.shape == masters[place].shape and value.is_floating_point() and value.dim() > 0
                    described = [str(value.dtype).removeprefix("torch."), list(value.shape)]
                    state.append((place, name, "like" if alike else described))
                elif value is not None:  # a number
                    state.append((place, name, {"value": value}))
        counts = [{_COUNT: g[_COUNT]} if isinstance(g.get(_COUNT), int) else {} for g in self._replica.groups()]
        return {"state": state, "groups": counts}

    @torch.no_grad()
    def _start_anew(self) -> None:
        """As an optimizer that has taken no step; one that has just been made is so."""
        for name in self._replica.state_names():
            for place, value in enumerate(self._replica.state(name)):
                if isinstance(value, Tensor):
                    value.zero_()
                elif value is not None:
                    self._replica.put_state(place, name, 0)
        for options in self._replica.groups():
            if isinstance(options.get(_COUNT), int):
                options[_COUNT] = 0


def _from_one(text: str, source: int, group: dist.ProcessGroup) -> str:
    """The text that one rank of a group says."""
    raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    size = torch.tensor([raw.numel()])
    give(size, source, group, takes=True)
    said = raw if group.rank() == source else torch.empty(int(size), dtype=torch.uint8)
    give(said, source, group, takes=True)
    return bytes(said.tolist()).decode()
