"""Which buffers have diverged, and in what parts they are averaged; tests/ranks/test_buffers.py has real ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qsr_engine.local_steps import averaged
from qsr_engine.local_steps.averaged import Averaged, Buffers

INF, NAN = math.inf, math.nan


class Some(Averaged):
    """A replica with these buffers."""

    def __init__(self, **values: list[float]) -> None:
        self.held = {name: torch.tensor(value) for name, value in values.items()}

    def buffers(self) -> dict[str, Tensor]:
        return self.held


@pytest.mark.parametrize(
    ("before", "now", "diverged"),
    [
        ({"a": [0.0, -INF]}, {"a": [0.0, -INF]}, False),
        ({"a": [0.0, NAN]}, {"a": [0.0, NAN]}, False),
        ({"a": [0.0, 0.0]}, {"a": [0.0, INF]}, True),
        ({"a": [0.0, 0.0]}, {"a": [0.0, NAN]}, True),
        ({"a": [0.0, -INF], "b": [0.0]}, {"a": [0.0, 0.0], "b": [INF]}, True),  # of each by itself
        ({}, {"mask": [0.0, -INF]}, False),  # made in a forward
        ({"mask": [0.0, -INF]}, {"mask": [0.0, -INF, -INF]}, False),  # made anew, for longer sequences
        ({}, {"a": [NAN]}, True),
    ],
)
def test_what_has_diverged(before: dict[str, list[float]], now: dict[str, list[float]], diverged: bool) -> None:
    replica = Some(**before)
    buffers = Buffers(replica, average=True, worker_size=1, everybody=None)
    replica.held = Some(**now).held
    told = buffers.have_diverged()
    assert (told is not None and bool(told)) is diverged
    buffers.same_everywhere()
    assert not buffers.have_diverged()
    assert not Buffers(replica, average=False, worker_size=1, everybody=None).have_diverged()


def test_buffers_are_averaged_in_parts_that_are_small_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaged, "PIECE", 8 * (most := 100))
    buffers = [torch.arange(5.0), torch.zeros(2 * most + 7, dtype=torch.bfloat16), torch.zeros(0), torch.ones(4, 2).t()]
    parts = list(averaged._of_some_bytes(buffers))
    assert all(sum(part.numel() for part in together) <= most for together in parts)
    for number, part in enumerate(part for together in parts for part in together):
        part.fill_(number)
    assert [len(set(buffer.flatten().tolist())) for buffer in buffers] == [1, 3, 0, 1]
