"""The outer optimizer: torch's own SGD on the workers' mean movement, in both engines, saved and resumed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import reference, training
from tests.support.deepspeed_run import assert_all_equal, block, expected, train
from tests.support.fsdp_engine import mlp, start, start_deepspeed, state_of, take_step
from tests.support.pool import Processes

OUTERS: dict[str, dict[str, Any]] = {
    "SlowMo": {"lr": 1.0, "momentum": 0.6},
    "DiLoCo": {"lr": 0.7, "momentum": 0.9, "nesterov": True},
    "damped": {"lr": 0.5},
}


@pytest.mark.fast_cells(4)
@pytest.mark.parametrize("strategy", ["qsr", "post_local", "swap"])
@pytest.mark.parametrize("name", OUTERS)
def test_it_is_torchs_sgd_on_the_mean_movement(processes: Processes, strategy: str, name: str) -> None:
    """In fp64; the step is written in another order of operations than torch's, which rounds 22 steps to 1e-13."""
    qsr = block(strategy, "adamw", outer=OUTERS[name])
    results = processes.run(train, ranks=2, qsr=qsr, optimizer="adamw")
    assert_all_equal(results)
    oracle = expected(qsr, "adamw", workers=2, outer=OUTERS[name])
    torch.testing.assert_close(results[0]["parameters"], oracle["parameters"], rtol=1e-12, atol=1e-12)
    plain = expected(qsr, "adamw", workers=2)
    assert (oracle["parameters"] - plain["parameters"]).abs().max() > 1e-3, "the outer step was meant to matter"
    if strategy == "qsr":  # the distance is that of the workers from their mean, not from where the round goes on
        assert results[0]["distances"] == pytest.approx(oracle["distances"], rel=1e-6)


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize("unit", [3, 8])
@pytest.mark.parametrize("strategy", ["qsr", "post_local"])
def test_in_rounds_of_other_lengths_than_its_unit(processes: Processes, strategy: str, unit: int) -> None:
    """The factors are rounded to 9 digits, which 22 steps add up."""
    outer = OUTERS["DiLoCo"]
    qsr = block(strategy, "adamw", outer={**outer, "unit_steps": unit})
    results = processes.run(train, ranks=2, qsr=qsr, optimizer="adamw")
    assert_all_equal(results)
    oracle = expected(qsr, "adamw", workers=2, outer=outer, outer_unit=unit)
    torch.testing.assert_close(results[0]["parameters"], oracle["parameters"], rtol=1e-8, atol=1e-8)
    fixed = expected(qsr, "adamw", workers=2, outer=outer)
    assert (oracle["parameters"] - fixed["parameters"]).abs().max() > 1e-3, "the length was meant to matter"


def test_two_rounds_leave_what_one_as_long_as_both_leaves() -> None:
    """Towards a mean that stands still, without momentum: a third of the distance after one unit, and so on."""
    from qsr_engine.averaging.buckets import pieces_in_place
    from qsr_engine.averaging.outer import Outer
    from qsr_engine.config.averaging import OuterConfig

    left = []
    for lengths in ([0.25, 1.75], [2.0]):
        bucket = torch.ones(8, dtype=torch.float64)
        outer = Outer(OuterConfig(lr=2 / 3, unit_steps=1), [bucket])
        for length in lengths:
            bucket.zero_()
            outer.round_lasted(length)
            for piece in pieces_in_place([bucket], 1024):
                outer.step(piece)
        left.append(float(bucket[0]))
    assert left == pytest.approx([1 / 9, 1 / 9], rel=1e-7)


def test_lr_1_without_momentum_is_the_plain_average_bit_for_bit(processes: Processes) -> None:
    plain, outer = (
        processes.run(train, ranks=3, qsr=block("qsr", "adamw", **more), optimizer="adamw", dtype=torch.float32)
        for more in ({}, {"outer": {"lr": 1.0, "momentum": 0.0}})
    )
    assert torch.equal(plain[0]["parameters"], outer[0]["parameters"])


def formula_job() -> list[torch.Tensor]:
    """Without the short cut: the step itself with lr 1 and no momentum, and what a zero momentum leaves."""
    from qsr_engine.averaging.buckets import pieces_in_place
    from qsr_engine.averaging.outer import Outer
    from qsr_engine.config.averaging import OuterConfig

    bucket = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    outer = Outer(OuterConfig(), [bucket])
    mean = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    bucket.copy_(mean)
    for piece in pieces_in_place([bucket], 1024):
        outer.step(piece)
    return [bucket, mean]


def test_the_step_with_lr_1_is_exact() -> None:
    bucket, mean = formula_job()
    assert torch.equal(bucket, mean)


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize(
    ("averaging", "worker_size"),
    [
        ({"overlap": "next_forward"}, 1),
        ({"overlap": "next_forward"}, 2),
        ({"shared_memory": False, "bucket_mb": 300e-6}, 1),
        ({"wire_dtype": "bf16"}, 2),
    ],
    ids=["overlapped", "overlapped, two ranks", "small buckets", "bf16 on the wire, two ranks"],
)
def test_other_ways_of_averaging_give_the_same(
    processes: Processes, averaging: dict[str, Any], worker_size: int
) -> None:
    more: dict[str, Any] = {"outer": OUTERS["DiLoCo"], "worker_size": worker_size}
    plain, other = (
        processes.run(
            train,
            ranks=2 * worker_size,
            qsr=block("qsr", "sgd", averaging=way, **more),
            optimizer="sgd",
            dtype=torch.float32,
        )
        for way in ({}, averaging)
    )
    assert_all_equal(other)
    # bf16 keeps 8 bits of each difference from the round's beginning; those are 0.1 here at most, and momentum 0.9 adds
    # ten of their errors up.
    tolerance = 1e-2 if "wire_dtype" in averaging else 0.0
    torch.testing.assert_close(other[0]["parameters"], plain[0]["parameters"], rtol=0, atol=tolerance)


def engine_of(kind: str, qsr: dict[str, Any]) -> Any:
    return start(qsr) if kind == "fsdp" else start_deepspeed(qsr, mlp(), "adamw", stage=int(kind[-1]))


def job(kind: str, qsr: dict[str, Any], folder: str = "", save_at: int = -1, load: bool = False) -> Any:
    """Train to the end, from a checkpoint perhaps. The averaged model, and how large this rank's momentum is."""
    engine = engine_of(kind, qsr)
    if load:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.load_checkpoint(folder)
    momentum = engine.local_steps.averager.state_dict()["outer"]["momentum"]
    held = sum(tensor.numel() for tensor in momentum)
    began = float(sum(tensor.abs().sum() for tensor in momentum))
    while not engine.local_steps.finished:
        if take_step(engine) and engine.local_steps.step == save_at:
            engine.save_checkpoint(folder)
    return {"state": state_of(engine), "held": held, "began": began}


KINDS = ["fsdp", "zero0", "zero2", "zero3"]


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_two_ranks_shard_its_state_and_resume_to_the_same_bits(
    processes: Processes, tmp_path: Path, kind: str
) -> None:
    qsr = {**training.QSR, "worker_size": 2, "outer": {**OUTERS["DiLoCo"], "unit_steps": 4}}
    whole = processes.run(job, ranks=4, kind=kind, qsr=qsr, folder=str(tmp_path), save_at=4)
    elements = sum(parameter.numel() for parameter in mlp().parameters())
    for result in whole:
        assert result["began"] == 0
        # Shards are padded to equal sizes.
        assert result["held"] >= elements if kind == "zero0" else result["held"] <= 0.6 * elements + 64
    resumed = processes.run(job, ranks=4, kind=kind, qsr=qsr, folder=str(tmp_path), load=True)
    assert resumed[0]["began"] > 0, "the momentum was loaded"
    assert whole[0]["state"].keys() == resumed[0]["state"].keys() != set()
    assert all(torch.equal(value, resumed[0]["state"][name]) for name, value in whole[0]["state"].items())

    oracle, _ = reference.simulate(
        mlp,
        lambda parameters: training.make_optimizer("adamw", parameters),
        lambda rank, step: [training.batch(rank, step, dtype=torch.float32)],
        qsr,
        workers=2,
        worker_size=2,
        outer=OUTERS["DiLoCo"],
        outer_unit=4,
    )
    found = torch.cat([whole[0]["state"][name].flatten() for name, _ in mlp().named_parameters()])
    # AdamW in fp32, gradients of two ranks: as the tests of the engines without it.
    torch.testing.assert_close(found, training.flat(oracle[0].parameters()), rtol=0, atol=1e-5)


def test_another_number_of_workers_begins_without_momentum(processes: Processes, tmp_path: Path) -> None:
    qsr = {**training.QSR, "outer": OUTERS["DiLoCo"]}
    processes.run(job, ranks=2, kind="fsdp", qsr=qsr, folder=str(tmp_path), save_at=4)
    assert [r["began"] for r in processes.run(job, ranks=4, kind="fsdp", qsr=qsr, folder=str(tmp_path), load=True)] == [
        0
    ] * 4
