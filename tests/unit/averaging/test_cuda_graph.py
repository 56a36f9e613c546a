"""The captured mean where there is nothing to capture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist

from qsr_engine.averaging.buckets import Piece
from qsr_engine.averaging.cuda_graph import Captured
from qsr_engine.averaging.reducer import Reducer
from qsr_engine.config.strict import ConfigError


class Nothing(Reducer):
    """A mean of pieces that are left as they are."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(pieces, 2, 0)

    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, torch.Tensor | None]]:
        yield from ((index, None) for index in order)


def test_a_rank_whose_part_is_empty_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to refuse the run on this rank alone, and the others waited for it."""
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    captured = Captured(Nothing([]), None)
    for _ in range(3):
        assert list(captured.run([])) == []
    captured.close()


def test_all_ranks_refuse_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    on_cpu = Piece((torch.zeros(2),), in_place=True)
    with pytest.raises(ConfigError, match="the parameters are on cpu with the backend gloo"):
        Captured(Nothing([on_cpu]), None)
    with pytest.raises(ConfigError, match="there is the backend gloo"):
        Captured(Nothing([]), None)
