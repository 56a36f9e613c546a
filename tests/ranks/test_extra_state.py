"""Modules that keep a state of their own beside parameters and buffers (get_extra_state, set_extra_state)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.support.deepspeed_engine
import tests.support.fsdp_engine
from tests.support import training
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


class Counting(nn.Module):
    """Counts its forwards, each rank in steps of its own."""

    def __init__(self, by: int, unsafe: bool = False) -> None:
        super().__init__()
        self.seen, self.by, self.unsafe = 0, by, unsafe

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.by if self.training else 0
        return x

    def get_extra_state(self) -> Any:
        return self if self.unsafe else {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def state_job(fsdp: bool, folder: str, load: bool, unsafe: bool = False) -> int:
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    model = nn.Sequential(Counting(rank + 1, unsafe), training.make_model(torch.float32))
    support = tests.support.fsdp_engine if fsdp else tests.support.deepspeed_engine
    zero = {} if fsdp else {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    engine = support.start({**QSR, "worker_size": 1}, model, **zero)
    if load:
        engine.load_checkpoint(folder)
    else:
        for step in range(2):
            inputs, targets = training.batch(dist.get_rank(), step, dtype=torch.float32)
            engine.backward(training.loss(engine(inputs), targets))
            engine.step()
        engine.save_checkpoint(folder)
    return int(model[0].seen)  # type: ignore[arg-type]


@pytest.mark.parametrize("fsdp", [False, True], ids=["deepspeed", "fsdp"])
def test_the_state_of_a_module_comes_back(processes: Processes, tmp_path: Path, fsdp: bool) -> None:
    """That of every rank; with other workers, that of rank 0. What could not be loaded again is refused when saved."""
    job: dict[str, Any] = {"fsdp": fsdp, "folder": str(tmp_path)}
    assert processes.run(state_job, load=False, **job) == [2, 4]
    assert processes.run(state_job, load=True, **job) == [2, 4]
    assert processes.run(state_job, load=True, ranks=1, **job) == [2]
    with pytest.raises(JobError, match=r"get_extra_state\(\) of '0' gives what cannot be loaded again .*Counting"):
        processes.run(state_job, load=False, unsafe=True, **job)
