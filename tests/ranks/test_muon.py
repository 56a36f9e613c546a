"""Muon as the local optimizer: in both engines as in the reference, saved and resumed, and where it is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fsdp_engine import (
    assert_silent,
    expected,
    furthest,
    mlp,
    start,
    start_deepspeed,
    state_of,
    take_step,
    train_job,
)
from tests.support.pool import Processes
from tests.support.training import QSR


def both_engines_job() -> list[dict[str, Any]]:
    return [train_job(QSR, optimizer="muon", stage=stage) for stage in (None, 0)]


def test_both_engines_equal_the_reference(processes: Processes) -> None:
    """Bit for bit in a whole worker, on which Muon sees the matrix that the reference sees."""
    found = processes.run(both_engines_job, ranks=2)
    oracle = expected(QSR, 2, optimizer="muon")
    for engine in range(2):
        results = [told[engine] for told in found]
        assert furthest(results[0]["state"], oracle) == 0
        assert_silent(results, 1)
    assert furthest(oracle, expected(QSR, 2, optimizer="adamw")) > 1e-2, "Muon was meant to matter"


def test_shards_of_a_worker_are_orthogonalized_as_the_whole_matrix(processes: Processes) -> None:
    """Muon iterates in bf16, where products of shards add up in another order: 2^-8 of a step of at most 0.05 x 0.2
    sqrt(17), and 12 of these; parts orthogonalized by themselves would be as far off as the steps are long."""
    qsr = {**QSR, "worker_size": 2}
    results = processes.run(train_job, ranks=4, qsr=qsr, optimizer="muon")
    assert furthest(results[0]["state"], expected(qsr, 2, optimizer="muon")) < 12 * 0.04 * 2**-6
    assert_silent(results, 2)


def resumed_job(folder: str, load: bool) -> dict[str, torch.Tensor]:
    engine = start(QSR, mlp(), "muon")
    if load:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.load_checkpoint(folder)
    while not engine.local_steps.finished:
        take_step(engine)
        if engine.local_steps.step == 5 and not load:
            engine.save_checkpoint(folder)
    return state_of(engine)


def test_it_resumes_inside_a_round_to_the_same_bits(processes: Processes, tmp_path: Path) -> None:
    whole, resumed = (processes.run(resumed_job, ranks=2, folder=str(tmp_path), load=load)[0] for load in (False, True))
    assert furthest(whole, resumed) == 0


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_flat_masters_are_refused(processes: Processes, stage: int) -> None:
    message = processes.run(refused_job, ranks=1, stage=stage)[0]
    assert f"MuonWithAdamW and zero_optimization.stage is {stage}" in message
    assert "write stage 0 in fp32, or use initialize_fsdp()" in message


def refused_job(stage: int) -> str:
    from qsr_engine import ConfigError

    try:
        start_deepspeed(QSR, mlp(), "muon", stage)
    except ConfigError as error:
        return str(error)
    return ""
