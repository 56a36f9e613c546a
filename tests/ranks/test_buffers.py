"""Buffers that a model makes in its first forward, constants among them, and buffers that differ between ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.local_steps.header import BoundaryError
from tests.support import training
from tests.support.fsdp_engine import start, start_deepspeed, take_step
from tests.support.pool import Processes
from tests.support.training import QSR


class Late(nn.Module):
    """In its first forward it makes a mask, a statistic that grows out of its first shape, and a table of its own."""

    mask: Tensor
    seen: Tensor
    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.head = nn.Linear(training.FEATURES, training.OUTPUTS)
        self.register_buffer("table", None, persistent=False)
        self.register_buffer("seen", torch.zeros(1))
        self.before: dict[str, Tensor] = {}  # the buffers when the forward began

    def forward(self, inputs: Tensor) -> Tensor:
        self.before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
            self.register_buffer("seen", torch.zeros(training.FEATURES))
        if self.table is None:
            self.table = torch.full((2,), float(dist.get_rank()))
        self.seen.lerp_(inputs.detach().mean(0), 0.5)
        out: Tensor = self.head(inputs + 0.1 * self.seen)
        return out


def late_job(folder: str, engine: str, load: bool) -> dict[str, Any]:
    """Train to the end through a checkpoint at step 4, or from it in a model that has seen no forward."""
    model = Late()
    made: Any = start(QSR, model) if engine == "fsdp" else start_deepspeed(QSR, model, "adamw", stage=1)
    if load:
        made.load_checkpoint(folder)
        assert {"mask", "seen", "table"} <= {name for name, _ in made.module.named_buffers()}
    found: dict[str, Any] = {}
    while not made.local_steps.finished:
        if take_step(made) and made.local_steps.step == 4:
            made.save_checkpoint(folder)
        if made.local_steps.step == 5:
            found["before"] = model.before
    return {
        **found,
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "parameters": training.flat(model.parameters()).clone(),
    }


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_buffers_of_the_first_forward(processes: Processes, tmp_path: Any, engine: str) -> None:
    """Constants are no divergence, statistics are averaged, what is not persistent stays, and a checkpoint has all."""
    whole = processes.run(late_job, folder=str(tmp_path), engine=engine, load=False)
    resumed = processes.run(late_job, folder=str(tmp_path), engine=engine, load=True)
    for rank, (one, other) in enumerate(zip(whole, resumed, strict=True)):
        assert torch.equal(one["parameters"], other["parameters"])
        for which in ("before", "buffers"):
            assert one[which].keys() == other[which].keys() == {"mask", "seen", "table"}
            assert all(torch.equal(value, other[which][name]) for name, value in one[which].items())
        assert torch.equal(one["buffers"]["mask"], torch.full((3, 3), -math.inf).triu(1))
        assert one["buffers"]["table"].tolist() == [rank, rank]
        assert torch.equal(one["buffers"]["seen"], whole[0]["buffers"]["seen"])
        assert one["buffers"]["seen"].any()


def uneven_job(kind: str, averaging: dict[str, Any]) -> str:
    """Rank 1 makes a buffer that the others have not, or have in another shape."""
    model = training.make_model(torch.float32)
    engine = start({**QSR, "averaging": averaging}, model)
    rank = dist.get_rank()
    if kind == "absent" and rank == 1:
        model.register_buffer("cache", torch.ones(3))
    if kind != "absent":
        model.register_buffer("cache", torch.full((2 + rank,), float(rank)), persistent=kind != "not persistent")
    try:
        while not take_step(engine):
            pass
    except BoundaryError as error:
        return str(error)
    return "" if kind == "absent" else str(model.get_buffer("cache").tolist())


def test_buffers_that_differ_between_ranks(processes: Processes) -> None:
    for kind, here, there in (("absent", "'nothing'", "'float32 [3]'"), ("shape", "'float32 [2]'", "'float32 [3]'")):
        for said in processes.run(uneven_job, kind=kind, averaging={}):
            assert f"  cache: {here} on rank 0; {there} on rank 1\n" in said
            assert "persistent=False" in said
    assert processes.run(uneven_job, kind="not persistent", averaging={}) == ["[0.0, 0.0]", "[1.0, 1.0, 1.0]"]
    assert processes.run(uneven_job, kind="absent", averaging={"buffers": "local"}) == ["", ""]
