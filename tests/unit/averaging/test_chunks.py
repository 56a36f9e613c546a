"""Sums and squares in chunks, and sums of squares as a GPU makes them, on a CPU: there torch makes the same copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qsr_engine.averaging.background import Background
from qsr_engine.averaging.chunks import CHUNK, add_up, divide, squares_by_norms
from tests.support.training import memory_of


@pytest.mark.parametrize("numel", [0, 1, 3_500_000])
def test_squares_by_norms(numel: int) -> None:
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    assert squares_by_norms(flat).item() == pytest.approx(flat.double().square().sum().item(), rel=1e-12)
    assert memory_of(lambda: squares_by_norms(flat))[1] < 8.5e6, "not 28 MB, an fp64 copy of all"
    if numel:
        flat[-1] = torch.inf
        assert not squares_by_norms(flat).isfinite()


def test_a_thread_beside_the_compute_takes_no_other_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch shares what is more than 32,768 elements among all threads of the rank, which the forward needs."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    flat, found = torch.full([CHUNK * 5 + 3], 6.0), list[int]()

    def run() -> Iterator[int]:
        found.extend(chunk.numel() for chunk in add_up([flat], [flat], 2))
        yield 0

    background = Background(flat.device)
    background.begin(run(), [0])
    background.finish()
    background.close()
    assert max(found) == 32_768
    assert sum(found) == flat.numel()
    assert max(chunk.numel() for chunk in add_up([flat], [flat], 3)) == CHUNK * 4, "all threads work on it again"
    squares = divide(flat, flat, 1)
    assert squares is not None
    assert squares.item() == flat.numel()
