"""The FSDP engine on one GPU with NCCL, one rank: what a CPU cannot show. Skipped where there is none.

One rank is one worker, so shards are whole and averages are over one worker; what is left to see is the device, bf16,
offload, compilation and checkpoints. benchmarks/gpu has two workers on one GPU, and what a boundary costs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import training
from tests.support.fsdp_engine import BF16, MODELS, batch_of, expected, furthest, start, state_of
from tests.support.training import QSR

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
    dist.destroy_process_group()


def without_key_biases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The bias of an attention's keys changes no output: its gradient is rounding alone, which Adam makes steps of."""
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in kept.items():
        if name.endswith("attn.qkv.bias"):
            tensor.chunk(3)[1].zero_()
    return kept


def take_step(engine: Any, model: str) -> bool:
    inputs, targets = (tensor.to(engine.device) for tensor in batch_of(model, 0, engine.local_steps.step))
    engine.backward(training.loss(engine(inputs).float(), targets))
    return bool(engine.step())


OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "bf16": BF16,
    "bf16, recomputed": {**BF16, "fsdp": {"activation_checkpointing": True}},
    "bf16, compiled": {**BF16, "fsdp": {"compile": True}},
    "offloaded": {"fsdp": {"cpu_offload": True}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_worker_on_a_gpu_equals_the_reference(options: str, optimizer: str) -> None:
    """A GPU rounds a gradient otherwise than a CPU, by 2^-24 (fp32) or 2^-8 (bf16) of its size, and Adam turns that
    into as much of a step: 12 steps of at most 0.05, times two for what later gradients make of it."""
    low = "bf16" in options
    engine = start(QSR, MODELS["vit"](), optimizer, **OPTIONS[options])
    while not engine.local_steps.finished:
        take_step(engine, "vit")
    more: dict[str, Any] = {"compute_dtype": torch.bfloat16, "gradient_dtype": torch.float32} if low else {}
    oracle = expected(QSR, 1, "vit", optimizer, **more)
    found, wanted = without_key_biases(state_of(engine)), without_key_biases(oracle)
    assert furthest(found, wanted) <= 2 * 12 * 0.05 * (2.0**-8 if low else 2.0**-17)


@pytest.mark.parametrize("options", ["whole", "bf16", "offloaded"])
def test_a_resumed_run_gives_the_same_bits_on_a_gpu(options: str, tmp_path: Path) -> None:
    found = []
    for resume in (False, True):
        engine = start(QSR, MODELS["vit"](), **OPTIONS[options])
        if resume:
            engine.load_checkpoint(tmp_path)
        while not engine.local_steps.finished:
            if take_step(engine, "vit") and engine.local_steps.step == 6:
                engine.save_checkpoint(tmp_path)
        found.append((state_of(engine), torch.rand(1, device=engine.device)))
        engine.destroy()
        dist.destroy_process_group()
    dist.init_process_group("gloo")
    assert furthest(found[0][0], found[1][0]) == 0
    assert torch.equal(found[0][1], found[1][1])
