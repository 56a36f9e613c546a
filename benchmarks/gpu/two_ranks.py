"""Two workers on one device over gloo, and four for two levels: SGD beside tests/support/reference.py, on both engines.

gloo takes tensors of a GPU through the host's memory, so that two processes can average on one GPU, as NCCL cannot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.rows import Found, Row, checked
from tests.support import fsdp_engine, reference, training
from tests.support.pretended_hosts import TWO_OF_TWO, pretended

PART = "workers beside the reference"
ENGINES = ("fsdp", "deepspeed")
AMID = 5  # a step inside a round of training.QSR, after which a run is saved
BAD = (2, 3)  # steps of a round, after whose last one worker 0 is not finite
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
FP32 = 5e-6  # a GPU adds up in another order: 2^-24 relative a step, in 12 steps that are at most 0.05 of a gradient
MOVED = 0.25  # more than a run moves any parameter here; each of its differences is rounded relative to itself


@dataclasses.dataclass(frozen=True)
class Case:
    """Beside training.QSR: what else the block qsr says, the reference is told, and how far they may be apart."""

    qsr: dict[str, Any] = dataclasses.field(default_factory=dict)
    told: dict[str, Any] = dataclasses.field(default_factory=dict)
    apart: float = FP32
    ranks: int = 2
    way: str | None = None


def _averaging(**options: Any) -> dict[str, Any]:
    """Not in shared memory, which only CPUs have."""
    return {"averaging": {"shared_memory": False, **options}}


# Another way to average (fragments, say) is one more line here, and what the reference has to be told for it.
CASES = {
    "plain": Case(way="AllReduce"),
    "next_forward": Case(_averaging(overlap="next_forward")),
    "delayed": Case(_averaging(overlap="delayed", delay_steps=1), {"delay": 1}),
    "bf16": Case(_averaging(wire_dtype="bf16"), apart=MOVED / 2**8, way="Compressed"),
    "int8": Case(_averaging(wire_dtype="int8"), apart=MOVED / 127, way="Compressed"),
    "outer": Case({"outer": OUTER}, {"outer": OUTER}),
    "leave_out": Case({"faults": {"not_finite": "leave_out"}}),
    "resume": Case(),
    "two_level": Case(_averaging(two_level=True), ranks=4, way="TwoLevelCollectives"),
}


def names(engine: str, ranks: int) -> list[str]:
    return [f"{engine}, {name}" for name, case in CASES.items() if case.ranks == ranks]


def measure(device: str, engine: str) -> list[Row]:
    """Runs in every rank; all of them see the same device 0."""
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("gloo")
    hosts = TWO_OF_TWO if dist.get_world_size() == 4 else [0, 0]
    rows = []
    with pretended(hosts):
        for name, case in CASES.items():
            if case.ranks == dist.get_world_size():
                rows.append(_agreed(checked(PART, f"{engine}, {name}", partial(_look, device, engine, name, case))))
    return rows


def _agreed(row: Row) -> Row:
    """Rank 0's row, failed where it has failed on any rank."""
    rows = [row] * dist.get_world_size()
    dist.all_gather_object(rows, row)
    return next((other for other in rows if other.state == "failed"), rows[0])


def _look(device: str, kind: str, name: str, case: Case) -> Found:
    qsr = {**training.QSR, **_averaging(), **case.qsr}
    engine = _start(kind, qsr, name)
    on_device = all(bucket.device.type == device for bucket in engine.local_steps.averager.buckets)
    if name == "resume":
        with _shared_folder() as folder:
            _train(engine, name, until=AMID)
            engine.save_checkpoint(folder)
            engine.destroy()
            engine = _start(kind, qsr, name)
            engine.load_checkpoint(folder)
            dist.barrier()
    _train(engine, name)
    way = engine.local_steps.averager.way
    held = float(engine.local_steps.averager.sum_of_squares())
    state = {key: value.cpu() for key, value in engine.averaged_state_dict().items()}
    engine.destroy()
    told: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(told, held)
    furthest = fsdp_engine.furthest(state, _expected(name, case)) if dist.get_rank() == 0 else 0.0
    good = furthest <= case.apart and len(set(told)) == 1 and on_device and case.way in (None, way)
    where = "" if on_device else ", not on the device"
    words = f"{furthest:.1e} apart (at most {case.apart:.1e}), {way}{where}"
    return good, words, {"apart": furthest, "limit": case.apart, "way": way, "ranks": case.ranks}


def _optimizer(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    """Without momentum where a worker is left out: what becomes of its momentum is another question."""
    return partial(torch.optim.SGD, lr=0.0, momentum=0.0 if name == "leave_out" else 0.9, weight_decay=1e-3)


def _start(kind: str, qsr: dict[str, Any], name: str) -> Any:
    import qsr_engine

    config = fsdp_engine.config_of(qsr)
    if kind == "fsdp":
        return qsr_engine.initialize_fsdp(model=fsdp_engine.mlp(), optimizer=_optimizer(name), config=config)
    config |= {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    return qsr_engine.initialize(model=fsdp_engine.mlp(), optimizer=_optimizer(name), config=config)[0]


def _train(engine: Any, name: str, until: int = 1 << 30) -> None:
    while not engine.local_steps.finished and engine.local_steps.step < until:
        step, rank = engine.local_steps.step, dist.get_rank()
        inputs, targets = (tensor.to(engine.device) for tensor in training.batch(rank, step, dtype=torch.float32))
        engine.backward(training.loss(engine(inputs), targets))
        if name == "leave_out" and rank == 0 and step == BAD[-1]:
            engine.local_steps.averager.buckets[0][0] = torch.nan
        engine.step()


def _expected(name: str, case: Case) -> dict[str, Tensor]:
    """A worker that is left out gets what the other has: as if it had taken the other's batches in that round."""

    def batches(rank: int, step: int) -> list[reference.Batch]:
        of = 1 if name == "leave_out" and step in BAD else rank
        return [training.batch(of, step, dtype=torch.float32)]

    models, _ = reference.simulate(
        fsdp_engine.mlp, _optimizer(name), batches, training.QSR, case.ranks, average_buffers=True, **case.told
    )
    return {key: value.detach() for key, value in models[0].state_dict().items()}


@contextlib.contextmanager
def _shared_folder() -> Any:
    """The same on all ranks, which are on one host."""
    with tempfile.TemporaryDirectory() as folder:
        found = [folder]
        dist.broadcast_object_list(found, 0)
        yield Path(found[0])
        dist.barrier()
