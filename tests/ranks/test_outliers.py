"""`faults.outlier`: a worker that moved too far in a round is left out of an average, or clipped, in both engines. The
oracle is the reference, which judges by its own account."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.records.runs import read_run
from tests.support import reference, training
from tests.support.combinations import Combination
from tests.support.combinations import start as start_deepspeed
from tests.support.fsdp_engine import start as start_fsdp
from tests.support.launch import spoiled_job
from tests.support.pool import Processes

# Seven rounds of 2 steps. Worker 1 goes astray in the fifth, worker 0 in the last.
LR = {"schedule": "constant", "peak": 0.02}
QSR: dict[str, Any] = {"strategy": "constant", "h_base": 2, "total_steps": 14, "lr": LR}
ASTRAY = {(1, 9), (0, 13)}  # worker, step
FAR = [(10, 1), (14, 0)]  # step done, worker
JUDGE: dict[str, Any] = {"z": 5.0, "after_averagings": 3}


def batch(rank: int, step: int, worker_size: int = 1) -> reference.Batch:
    inputs, targets = training.batch(rank, step, dtype=torch.float32)
    return inputs, targets * (30.0 if (rank // worker_size, step) in ASTRAY else 1.0)


def judged(then: str, **more: Any) -> dict[str, Any]:
    return {**QSR, **more, "faults": {"outlier": {**JUDGE, "then": then}}}


def start(kind: str, block: dict[str, Any]) -> Any:
    if kind == "fsdp":
        return start_fsdp(block, optimizer="sgd")
    return start_deepspeed(Combination(int(kind[4]), "bf16" if kind.endswith("bf16") else "fp32", "SGD"), block)


def masters(engine: Any) -> Tensor:
    """Whole, of this rank's worker, in the order of the model."""
    engine.local_steps.finish()
    replica = engine._driver.replica
    return training.flat([replica.whole(p).detach().float() for p in engine.module.parameters()]).clone()


def train(engine: Any, until: int) -> list[tuple[int, int]]:
    """Returns (step, worker) of every outlier."""
    state, worker_size, found = engine.local_steps, engine.local_steps.qsr.worker_size, []
    dtype = next(engine.module.parameters()).dtype
    while state.step < until:
        costs = state.costs
        before = {**costs.left_out}, {**costs.clipped}
        inputs, targets = batch(dist.get_rank(), state.step, worker_size)
        engine.backward(training.loss(engine(inputs.to(dtype)).float(), targets))
        engine.step()
        for then, now in zip(before, (costs.left_out, costs.clipped), strict=True):
            found += [(state.step, worker) for worker in now if now[worker] != then.get(worker, 0)]
    return found


def rows_job(rows: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    results = {}
    for name, (kind, block) in rows.items():
        engine = start(kind, block)
        found = train(engine, QSR["total_steps"])
        results[name] = {
            "found": found,
            "end": masters(engine),
            "numbers": fragment_of(engine),
            "left_out": sum(engine.local_steps.costs.left_out.values()),
            "figures": engine.local_steps.figures(),
        }
    return results


def fragment_of(engine: Any) -> Tensor:
    """The fragment of every element, as this engine cuts its masters."""
    averager, replica = engine.local_steps.averager, engine._driver.replica
    for number, parts in enumerate(averager._fragments):
        for part in parts:
            part.fill_(number)
    replica.refresh()
    return masters(engine).to(torch.int64)


def oracle(block: dict[str, Any], numbers: Tensor, workers: int) -> tuple[Tensor, list[tuple[int, int]]]:
    options, worker_size, found = block.get("averaging", {}), block.get("worker_size", 1), list[tuple[int, int]]()
    models, _ = reference.simulate(
        partial(training.make_model, torch.float32),
        partial(training.make_optimizer, "sgd"),
        lambda rank, step: [batch(rank, step, worker_size)],
        block,
        workers,
        worker_size=worker_size,
        outer=block.get("outer"),
        fragment_of=numbers,
        mixing=options.get("mixing", 0.0),
        state=tuple(options.get("state", ())),
        outlier=block["faults"]["outlier"],
        told=found,
    )
    return training.flat(models[0].parameters()), found


FLAT = {"shared_memory": False}
DILOCO = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
Rows = dict[str, tuple[str, dict[str, Any]]]
ROWS: Rows = {
    "left out": ("fsdp", judged("leave_out", averaging=FLAT)),
    "clipped": ("zero0", judged("clip")),
    "clipped, bf16 behind the forward": ("zero1 bf16", judged("clip", averaging={"overlap": "next_forward"})),
    "left out, fragments": ("zero0", judged("leave_out", averaging={"fragments": 2, "mixing": 0.25})),
}
OF_TWO: Rows = {
    "clipped": ("fsdp", judged("clip", worker_size=2)),
    "left out": ("zero3", judged("leave_out", worker_size=2)),
}
MORE: Rows = {
    "clipped, outer": ("fsdp", judged("clip", outer=DILOCO)),
    "left out, outer, behind the forward": (
        "zero0",
        judged("leave_out", outer=DILOCO, averaging={"overlap": "next_forward"}),
    ),
    "clipped, fragments": ("fsdp", judged("clip", averaging={"fragments": 2, "mixing": 0.25, **FLAT})),
    "clipped, int8": ("zero0", judged("clip", averaging={"wire_dtype": "int8"})),
    "left out, bf16 wire": ("fsdp", judged("leave_out", averaging={"wire_dtype": "bf16"})),
    "left out, bf16": ("zero2 bf16", judged("leave_out")),
}
MORE_OF_TWO: Rows = {
    "clipped, zero2": ("zero2", judged("clip", worker_size=2)),
    "clipped, fragments of shards": ("fsdp", judged("clip", worker_size=2, averaging={"fragments": 2})),
    "left out, state": ("fsdp", judged("leave_out", worker_size=2, averaging={"state": ["momentum_buffer"]})),
}


@pytest.mark.parametrize(
    ("rows", "worker_size"),
    [
        pytest.param(ROWS, 1, id="workers of one rank"),
        pytest.param(OF_TWO, 2, id="workers of two"),
        pytest.param(MORE, 1, id="more of one", marks=pytest.mark.slow),
        pytest.param(MORE_OF_TWO, 2, id="more of two", marks=pytest.mark.slow),
    ],
)
def test_they_equal_the_reference(processes: Processes, rows: Rows, worker_size: int) -> None:
    workers = 3 if worker_size == 1 else 2
    results = processes.run(rows_job, ranks=workers * worker_size, rows=rows)
    for name, (kind, block) in rows.items():
        first = results[0][name]
        end, found = oracle(block, first["numbers"], workers)
        leaves_out = block["faults"]["outlier"]["then"] == "leave_out"
        assert set(FAR if leaves_out else FAR[:1]) <= set(found), name  # one that is clipped keeps its momentum
        for result in results:
            assert result[name]["found"] == found, name
            assert torch.equal(result[name]["end"], first["end"]), name
            figures = result[name]["figures"]
            assert (figures["left_out"], figures["clipped"])[:: -1 if leaves_out else 1] == (0, len(found)), name
            assert (figures["largest_z"] > JUDGE["z"]) == (found[-1][0] == QSR["total_steps"]), name
        if "wire_dtype" not in block.get("averaging", {}) and not kind.endswith("bf16"):
            # fp32 sums of three and of four summands in another order: 2^-24 relative at every step and boundary.
            torch.testing.assert_close(first["end"], end, rtol=0, atol=2e-6, msg=name)
            free, _ = oracle(
                {**block, "faults": {"outlier": {**JUDGE, "z": 1e9, "then": "clip"}}}, first["numbers"], workers
            )
            assert (free - end).abs().max() > 1e-3, f"{name}: it was meant to matter"


def resumed_job(kind: str, block: dict[str, Any], folder: str) -> list[Any]:
    """To the end at once; and saved inside the round in which a worker goes astray, and resumed."""
    engine = start(kind, block)
    whole = [
        [far for far in train(engine, 14) if far[0] > 9],
        masters(engine),
        engine.local_steps.state_dict()["outliers"],
    ]
    engine = start(kind, block)
    train(engine, 9)
    engine.save_checkpoint(folder)
    engine = start(kind, block)
    engine.load_checkpoint(folder)
    return [*whole, train(engine, 14), masters(engine), engine.local_steps.state_dict()["outliers"]]


@pytest.mark.parametrize(("kind", "worker_size"), [("fsdp", 1), pytest.param("zero3", 2, marks=pytest.mark.slow)])
def test_a_resumed_run_judges_alike(processes: Processes, tmp_path: Path, kind: str, worker_size: int) -> None:
    """Where the round began, mean and variance are in the checkpoint."""
    block = judged("clip", worker_size=worker_size)
    for far, end, learnt, far_2, end_2, learnt_2 in processes.run(
        resumed_job, ranks=2 * worker_size, kind=kind, block=block, folder=str(tmp_path)
    ):
        assert far == far_2
        assert far[0] == FAR[0]
        assert torch.equal(end, end_2)
        assert learnt == learnt_2


def other_job(folder: str) -> str:
    """A checkpoint from inside a round of a run that judged nobody."""
    block = judged("clip")
    engine = start("fsdp", {**block, "faults": {}})
    train(engine, 9)
    engine.save_checkpoint(folder)
    engine = start("fsdp", block)
    try:
        engine.load_checkpoint(folder)
    except Exception as error:
        return str(error)
    return ""


def test_what_a_round_began_with_is_missing(processes: Processes, tmp_path: Path) -> None:
    for said in processes.run(other_job, ranks=2, folder=str(tmp_path)):
        assert "does not hold what the round began with, which qsr.faults.outlier needs now" in said


def astray_train_job(argv: list[str]) -> tuple[int, str]:
    """`qsr train` in which the parameters of rank 0 are pushed away once."""
    return spoiled_job(argv, 6, lambda parameter: parameter.add_(1.0))


@pytest.mark.slow
def test_a_recipe_tells_it(processes: Processes, recipe: Path) -> None:
    sets = [
        "qsr.alpha=0",
        "logging.every=1",
        "logging.name=far",
        "qsr.faults.outlier={z: 5, then: clip, after_averagings: 2}",
    ]
    argv = ["train", str(recipe), *(word for value in sets for word in ("--set", value))]
    for code, err in processes.run(astray_train_job, ranks=2, argv=argv):
        assert code == 0, err
    run = recipe.parent / "runs" / "far"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["clipped"])
    assert first["largest_z"] > 5
    assert "the movement of a worker that was an outlier was clipped" in " ".join(read_run(run).notes)
