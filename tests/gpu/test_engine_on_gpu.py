"""The engine on one GPU with NCCL, one rank: what a CPU cannot show. Skipped where there is none."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import reference, training
from tests.support.combinations import (
    COMBINATIONS,
    DTYPES,
    Combination,
    expected,
    start,
    take_step,
    whole_masters,
    whole_parameters,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu", reason="needs a GPU"
)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(port))
    yield
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


@pytest.mark.parametrize("stage", [0, 1])
def test_one_worker_on_a_gpu_equals_the_reference(stage: int) -> None:
    """In fp32; a GPU adds the terms of a matrix product in another order than a CPU, 2^-24 relative at each step."""
    import qsr_engine

    engine, *_ = qsr_engine.initialize(
        model=training.make_model(torch.float32),
        optimizer=partial(training.make_optimizer, "sgd"),
        config={
            "train_batch_size": training.BATCH,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "qsr": training.QSR,
        },
    )
    assert all(bucket.is_cuda for bucket in engine.local_steps.averager.buckets)
    while not engine.local_steps.finished:
        inputs, targets = training.batch(0, engine.local_steps.step, dtype=torch.float32)
        engine.backward(training.loss(engine(inputs.cuda()), targets.cuda()))
        engine.step()
    models, _ = reference.simulate(
        partial(training.make_model, torch.float32),
        partial(training.make_optimizer, "sgd"),
        lambda worker, step: [training.batch(worker, step, dtype=torch.float32)],
        training.QSR,
        workers=1,
    )
    found, oracle = (training.flat(m.parameters()).cpu() for m in (engine.module, models[0]))
    torch.testing.assert_close(found, oracle, rtol=0, atol=2e-6)


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if not c.refused], ids=str)
def test_every_stage_and_precision_on_a_gpu(combination: Combination) -> None:
    """A GPU rounds a gradient otherwise than a CPU, by 2^-24 (fp32), 2^-8 (bf16) or 2^-11 (fp16) of its size, and Adam
    turns that into as much of a step: 12 steps of at most 0.05, times two for what later gradients make of it."""
    engine = start(combination, training.QSR)
    while not engine.local_steps.finished:
        take_step(engine, combination)
    compute = DTYPES[combination.precision] or torch.float32
    masters = whole_masters(engine).cpu()
    assert torch.equal(whole_parameters(engine).cpu(), masters.to(compute))
    bits = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[compute]
    oracle = expected(combination, training.QSR, workers=1)
    torch.testing.assert_close(masters, oracle, rtol=0, atol=2 * 12 * 0.05 * bits)


@pytest.mark.parametrize("combination", [Combination(stage, "bf16", "FusedAdam") for stage in (0, 1, 2, 3)])
def test_a_resumed_run_gives_the_same_bits_on_a_gpu(combination: Combination, tmp_path: Path) -> None:
    found = []
    for resume in (False, True):
        engine = start(combination, training.QSR)
        if resume:
            engine.load_checkpoint(tmp_path)
        while not engine.local_steps.finished:
            if take_step(engine, combination) and engine.local_steps.step == 6:
                engine.save_checkpoint(tmp_path)
        found.append((whole_masters(engine), torch.rand(1), torch.rand(1, device=engine.device)))
        engine.destroy()
    for whole, resumed in zip(*found, strict=True):
        assert torch.equal(whole, resumed)
