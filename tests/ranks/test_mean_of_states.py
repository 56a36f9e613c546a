"""The mean of saved workers' optimizer states, of which the workers of this run load a part each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.checkpoint.other_layout import mean_of_states, to_load
from qsr_engine.local_steps.averaged import Averaged
from tests.support.pool import Processes

SAVED = 5


def of_worker(worker: int) -> list[Tensor]:
    """Large enough for two parts, and not contiguous."""
    generator = torch.Generator().manual_seed(worker)
    return [torch.randn(2_000_007, generator=generator), torch.randn(3, 4, generator=generator).t()]


class State(Averaged):
    """An optimizer's, which loading makes."""

    held: list[Tensor]

    def state_tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        return ((place, "exp_avg", value) for place, value in enumerate(self.held))


def mean_job() -> list[Tensor]:
    dist.init_process_group("gloo")
    state = State()

    def loaded() -> Iterator[bool]:
        for worker, counts in to_load(SAVED, dist.get_rank(), 2):
            state.held = of_worker(worker)
            yield counts

    mean_of_states(state, loaded(), SAVED, None)
    return [value[-9:].clone() for value in state.held]


def test_each_loads_a_part_and_all_have_the_mean(processes: Processes) -> None:
    expected = [torch.stack(same).double().mean(0).float() for same in zip(*map(of_worker, range(SAVED)), strict=True)]
    for found in processes.run(mean_job):
        for value, mean in zip(found, expected, strict=True):
            torch.testing.assert_close(value, mean[-9:], rtol=1e-6, atol=1e-9)
