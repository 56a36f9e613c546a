"""A small regression task that jobs train on, the same in the engine and in tests/support/reference.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.reference import Batch

FEATURES, OUTPUTS, BATCH = 12, 3, 8
QSR: dict[str, Any] = {  # 12 steps in 5 rounds of 2, 2, 2, 2 and 4
    "strategy": "qsr",
    "h_base": 2,
    "alpha": 0.045,
    "total_steps": 12,
    "lr": {"schedule": "cosine", "peak": 0.05, "min": 1e-3, "warmup_steps": 3},
}


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with sizes that don't divide evenly, the same parameters every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(FEATURES, 17), nn.Tanh(), nn.LayerNorm(17), nn.Linear(17, OUTPUTS))
        return model.to(dtype)


def rounded_model(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> nn.Module:
    """make_model(dtype) as DeepSpeed starts from it: its masters are made from the low-precision parameters."""
    model = make_model(dtype)
    return model.to(compute_dtype).to(dtype) if compute_dtype else model


def batch(part: int, step: int, micro: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Micro-batch of one rank (or one worker of the reference), a function of its numbers alone."""
    generator = torch.Generator().manual_seed(1_000_000 * part + 1_000 * step + micro)
    inputs = torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64)
    noise = torch.randn(BATCH, OUTPUTS, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), (inputs[:, :OUTPUTS].sin() + 0.3 * noise).to(dtype)


def make_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-3)
    if name == "muon":
        from qsr_engine.engines.muon import MuonWithAdamW

        return MuonWithAdamW(parameters, lr=0.0, weight_decay=0.05)
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.05)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def memory_of(action: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch kept of what an action took, and the most that it had at a time."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        action()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    kept = most = 0
    for _, change in sorted(changes):
        kept += change
        most = max(most, kept)
    return kept, most
