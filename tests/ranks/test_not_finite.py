"""`faults.not_finite: leave_out`: a worker with a NaN or an infinity is left out of an average, and gets that of the
others. The oracle is the plain mean of what the others held just before the boundary."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError, validate
from qsr_engine.local_steps.header import BoundaryError
from qsr_engine.records.runs import read_run
from tests.support import bare_local_steps as alone
from tests.support import fsdp_engine as fsdp
from tests.support import training
from tests.support.combinations import Combination
from tests.support.combinations import start as start_deepspeed
from tests.support.deepspeed_engine import count_job
from tests.support.launch import spoiled_job
from tests.support.pool import Processes
from tests.support.training import QSR

LEAVE_OUT: dict[str, Any] = {"faults": {"not_finite": "leave_out"}}


# ------------------------------------------------------------------------------------------------- whole engines

AT = 4  # the boundary before which a worker goes bad, the second of QSR's


class _Boundary:
    """Watches an engine's boundary at step AT, just before the headers: what is there then, and what goes bad there."""

    def __init__(self, engine: Any, go_bad: Callable[[], None]) -> None:
        self.state: dict[str, Tensor] = {}
        self.masters = torch.empty(0)
        self._engine, self._go_bad = engine, go_bad
        self._measure = engine.local_steps.averager.sum_of_squares
        engine.local_steps.averager.sum_of_squares = self._look

    def _look(self, fragments: Any) -> Tensor:
        if self._engine.local_steps.step == AT:
            self._go_bad()
            self.masters = training.flat(self._engine.local_steps.averager.buckets).clone()
            self.state = state_of(self._engine)
        measured: Tensor = self._measure(fragments)
        return measured


def state_of(engine: Any) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for _, name, value in engine._driver.replica.state_tensors():
        found.setdefault(name, []).append(value)
    return {name: training.flat(tensors).clone() for name, tensors in found.items()}


def make_engine(kind: str, qsr: dict[str, Any]) -> tuple[Any, torch.dtype]:
    """kind: "deepspeed 2 bf16 AdamW", "fsdp bf16 AdamW"."""
    engine, *rest = kind.split()
    if engine == "fsdp":
        bf16 = {"enabled": rest[0] == "bf16"}
        return fsdp.start(qsr, optimizer=rest[1].lower(), bf16=bf16), torch.float32
    dtype = torch.bfloat16 if rest[1] == "bf16" else torch.float32
    return start_deepspeed(Combination(int(rest[0]), rest[1], rest[2]), qsr), dtype


def engine_job(kind: str, qsr: dict[str, Any], bad: list[int], how: str) -> dict[str, Any]:
    """Train to the end, with ranks that go bad at step AT: by a NaN in a batch, or by one in a parameter."""
    from qsr_engine.local_steps import meeting

    engine, dtype = make_engine(kind, {**QSR, **LEAVE_OUT, **qsr})
    state, rank, warned = engine.local_steps, dist.get_rank(), []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    meeting.log.addHandler(handler)

    def go_bad() -> None:
        if rank in bad and how != "batch":
            state.averager.buckets[0][1] = float(how)
            for _, _, value in engine._driver.replica.state_tensors():
                value.fill_(float(how))

    boundary = _Boundary(engine, go_bad)
    found: dict[str, Any] = {"warned": warned}
    losses: list[float] = []
    while not state.finished:
        inputs, targets = training.batch(rank, state.step, dtype=dtype)
        if rank in bad and how == "batch" and state.step == AT - 1:
            inputs[0, 0] = math.nan
        loss = training.loss(engine(inputs).float(), targets.float())
        engine.backward(loss)
        losses.append(loss.item())
        engine.step()
        if state.step == AT:
            state.wait()
            found["distance"] = state.relative_distance
            found["masters"] = training.flat(state.averager.buckets).clone()
            found["state"] = state_of(engine)
            with torch.no_grad():
                found["outputs"] = engine.module(training.batch(0, 0, dtype=dtype)[0]).clone()
    meeting.log.removeHandler(handler)
    found |= {"before": boundary.masters, "state_before": boundary.state, "losses": losses}
    found |= {"left_out": state.costs.left_out, "figure": state.figures()["left_out"]}
    return {**found, "end": training.flat(state.averager.buckets).clone(), "finite_state": all_finite(engine)}


def all_finite(engine: Any) -> bool:
    values = [v for state in engine._driver.replica.optimizer.state.values() for v in state.values()]
    tensors = [getattr(v, "_local_tensor", v) for v in values if isinstance(v, Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


ONE, TWO = {"worker_size": 1}, {"worker_size": 2}
SMALL_BUCKETS = {"bucket_mb": 0.0005}
ENGINES: list[tuple[str, dict[str, Any], list[int], str]] = [
    ("deepspeed 0 fp32 AdamW", {"averaging": {"shared_memory": False, **SMALL_BUCKETS}}, [1], "batch"),
    ("deepspeed 0 fp32 SGD", {"averaging": {"overlap": "next_forward", **SMALL_BUCKETS}}, [0], "batch"),
    ("deepspeed 0 fp32 AdamW", TWO, [2], "nan"),
    ("deepspeed 0 bf16 AdamW", ONE, [0], "-inf"),
    ("deepspeed 1 bf16 AdamW", {"averaging": {"overlap": "next_forward"}}, [2], "inf"),
    ("deepspeed 1 bf16 SGD", TWO, [1], "nan"),
    ("deepspeed 2 bf16 AdamW", TWO, [3], "nan"),
    ("deepspeed 3 bf16 AdamW", TWO, [0], "nan"),
    ("deepspeed 3 fp32 SGD", ONE, [0, 1], "nan"),
    ("fsdp fp32 AdamW", {"averaging": {"state": {"exp_avg": 2, "exp_avg_sq": 3}}}, [1], "batch"),
    ("fsdp bf16 SGD", ONE, [0], "batch"),
    ("fsdp fp32 SGD", TWO, [1], "batch"),
    ("fsdp bf16 AdamW", TWO, [2, 3], "nan"),
]


@pytest.mark.fast_cells(3, of=13)
@pytest.mark.parametrize(("kind", "qsr", "bad", "how"), ENGINES, ids=lambda value: str(value))
def test_an_engine_goes_on(processes: Processes, kind: str, qsr: dict[str, Any], bad: list[int], how: str) -> None:
    size = qsr.get("worker_size", 1)
    ranks = 3 if size == 1 else 4
    found = processes.run(engine_job, ranks=ranks, kind=kind, qsr=qsr, bad=bad, how=how)
    gone = {rank // size for rank in bad}
    averaged = [name for name, every in qsr.get("averaging", {}).get("state", {}).items() if 2 % every == 0]
    for place in range(size):  # ranks that hold the same part of their workers
        group = found[place::size]
        good = [told for worker, told in enumerate(group) if worker not in gone]
        assert good[0]["before"].isfinite().all()
        # One or two of them: the sum has the same bits in any order, so nothing is off by a rounding.
        mean = torch.stack([told["before"] for told in good]).sum(0) / len(good)
        of_states = {
            name: torch.stack([told["state_before"][name] for told in good]).sum(0) / len(good)
            for name in good[0]["state_before"]
        }
        assert of_states
        for worker, told in enumerate(group):
            assert torch.equal(told["masters"], mean)
            for name, value in told["state"].items():
                own = worker not in gone and name not in averaged
                assert torch.equal(value, told["state_before"][name] if own else of_states[name])
            assert torch.equal(told["end"], group[0]["end"])
        if size == 1 and len(good) > 1:
            spread = torch.stack([(told["before"] - mean).double().square().sum() for told in good]).mean().sqrt()
            assert found[0]["distance"] == pytest.approx((spread / mean.double().norm()).item(), rel=1e-3)
    for rank, told in enumerate(found):
        assert torch.equal(told["outputs"], found[0]["outputs"])  # what a forward reads
        went_bad = [step for step, loss in enumerate(told["losses"]) if not math.isfinite(loss)]
        assert went_bad == ([AT - 1] if how == "batch" and rank in bad else [])
        assert told["end"].isfinite().all()
        assert told["finite_state"]
        assert told["left_out"] == dict.fromkeys(sorted(gone), 1)
        assert told["figure"] == len(gone)
        assert len(told["warned"]) == (rank == 0)
    names = ", ".join(map(str, sorted(gone)))
    assert f"after step {AT} (round 1) the parameters of worker {names}, or its buffers" in found[0]["warned"][0]


# --------------------------------------------------------------------------------------------------------- buffers


class Normed(nn.Module):
    """Batch norm, and a mask that has always held infinities."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(training.FEATURES)
        self.head = nn.Linear(training.FEATURES, training.OUTPUTS)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(inputs))
        return out


def buffers_job(policy: str, bad: list[int], where: str) -> dict[str, Any]:
    """Ranks whose buffers, or parameters, are not finite at the boundary of step AT."""
    import qsr_engine

    torch.manual_seed(5)
    qsr = {**QSR, "faults": {"not_finite": policy}}
    model = Normed()
    engine = qsr_engine.initialize_fsdp(
        model=model, optimizer=lambda parameters: torch.optim.SGD(parameters), config=fsdp.config_of(qsr)
    )
    rank = dist.get_rank()
    found: dict[str, Any] = {}

    def go_bad() -> None:
        with torch.no_grad():
            if rank in bad and where == "parameters":
                model.head.bias[0] = math.nan
            elif rank in bad and model.norm.running_var is not None:
                model.norm.running_var[3] = math.inf
        found["before"] = training.flat(model.buffers()).clone()

    boundary = _Boundary(engine, go_bad)
    try:
        while not engine.local_steps.finished:
            fsdp.take_step(engine)
            if engine.local_steps.step == AT:
                found |= {
                    "after": training.flat(model.buffers()).clone(),
                    "left_out": engine.local_steps.costs.left_out,
                }
    except BoundaryError as error:
        found["said"] = str(error)
    return {**found, "masters": boundary.masters, "at": engine.local_steps.step}


@pytest.mark.parametrize("where", ["parameters", "buffers"])
def test_buffers_of_a_worker_that_is_left_out_are_too(processes: Processes, where: str) -> None:
    """Infinite statistics do not spread either, though the parameters are finite; a mask with infinities may have."""
    found = processes.run(buffers_job, ranks=3, policy="leave_out", bad=[1], where=where)
    mean = torch.stack([told["before"].double() for told in (found[0], found[2])]).mean(0).float()
    counted = 1  # of the integer buffer, num_batches_tracked, which is the same everywhere
    for told in found:
        assert torch.equal(told["after"], mean)
        assert (~told["after"].isfinite()).sum() == counted
        assert told["left_out"] == {1: 1}
        assert told["at"] == QSR["total_steps"]


@pytest.mark.parametrize(
    ("policy", "bad", "where", "words"),
    [
        ("stop", [2], "parameters", "on rank 2"),
        ("stop", [0, 2], "buffers", "on ranks 0, 2"),
        ("leave_out", [0, 1, 2], "parameters", "on ranks 0, 1, 2"),
    ],
)
def test_where_it_stops(processes: Processes, policy: str, bad: list[int], where: str, words: str) -> None:
    """With `stop`, and where nobody is left; the parameters of the others are as they were."""
    for told in processes.run(buffers_job, ranks=3, policy=policy, bad=bad, where=where):
        assert f"after step {AT} the parameters are not finite (NaN or infinity) {words}, or" in told["said"]
        assert told["at"] == AT


# --------------------------------------------------------------------------------------------------- around it


def test_nothing_crosses_workers_between_boundaries(processes: Processes) -> None:
    """And where everybody is well, a boundary has no collective more."""
    outlier = {"faults": {"not_finite": "leave_out", "outlier": {"then": "clip", "after_averagings": 1}}}
    plain, with_policy, judging = (
        processes.run(count_job, ranks=2, qsr={**QSR, **block}, config={}, clip=1.0)
        for block in ({}, LEAVE_OUT, outlier)
    )
    assert with_policy == judging == plain
    assert all(count == 0 for counts in with_policy for boundary, count in counts if not boundary)


def old_checkpoint_job() -> list[Any]:
    state = alone.make(alone.BLOCKS[0])
    state.costs.left_out = {1: 2}
    saved = state.state_dict()
    found: list[Any] = []
    for values_ in (saved, {key: value for key, value in saved.items() if key != "left_out"}):
        state = alone.make(alone.BLOCKS[0])
        state.load_state_dict(values_)
        found.append(state.costs.left_out)
    return found


def test_the_count_is_kept_in_checkpoints_and_older_ones_have_none(processes: Processes) -> None:
    assert processes.run(old_checkpoint_job, ranks=1) == [[{1: 2}, {}]]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"strategy": "parallel", "total_steps": 5}, "strategy 'parallel' averages gradients at every step"),
        ({"strategy": "constant", "total_steps": 5, "averaging": {"overlap": "delayed", "delay_steps": 1}}, "delayed"),
    ],
)
def test_what_it_cannot_mend_is_refused(block: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(QSRConfig, {**block, **LEAVE_OUT}, where="test")
    validate(QSRConfig, block, where="test")


# ------------------------------------------------------------------------------------------------------- qsr train


def bad_train_job(argv: list[str]) -> tuple[int, str]:
    """`qsr train` in which rank 0 meets a NaN in the first step of the second round."""
    return spoiled_job(argv, 2, lambda parameter: parameter.view(-1)[:1].fill_(math.nan))


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("policy", ["leave_out", "stop"])
def test_a_recipe_goes_on_after_a_loss_that_is_not_finite(
    processes: Processes,
    recipe: Path,
    policy: str,
) -> None:
    sets = [f"qsr.faults.not_finite={policy}", "qsr.alpha=0", "logging.every=1", "logging.name=bad"]  # rounds of 2
    argv = ["train", str(recipe), *(word for value in sets for word in ("--set", value))]
    if policy == "stop":  # rank 0 ends in the middle of the round; the other's collective then fails
        (code, err), _ = processes.run(bad_train_job, ranks=2, argv=argv)
        assert code != 0
        assert "the loss is nan at step 3" in err
        return
    for code, err in processes.run(bad_train_job, ranks=2, argv=argv):
        assert code == 0, err
    run = recipe.parent / "runs" / "bad"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 4]
    assert [row["left_out"] for row in rows] == [0, 0, 0] + [1] * (len(rows) - 3)
    assert "left out of an average once" in " ".join(read_run(run).notes)
