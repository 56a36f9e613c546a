"""Training steps on pictures of 32 x 32, timed phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEARNING_RATE = 1e-4
PHASES = ("forward", "backward", "update")
Step = Callable[[], list[float]]  # seconds of each phase; the update includes clipping


def small_model(name: str) -> nn.Module:
    """A ViT or ResNet of timm's, the same at every call."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4} if name.startswith("vit") else {}
    model: nn.Module = timm.create_model(name, num_classes=10, **sizes)
    return model.train()


def adamw(parameters: Iterable[Tensor], fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05, fused=fused)


def timed_step(forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], update: Callable[[], Any]) -> Step:
    def step() -> list[float]:
        times = [time.perf_counter()]
        loss = forward()
        times.append(time.perf_counter())
        backward(loss)
        times.append(time.perf_counter())
        update()
        times.append(time.perf_counter())
        return [end - start for start, end in pairwise(times)]

    return step


def loss_of(module: Any, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(module(images).float(), labels)


def engine_step(engine: Any, images: Tensor, labels: Tensor) -> Step:
    return timed_step(lambda: loss_of(engine, images, labels), engine.backward, engine.step)


def loop_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, clip: float) -> Step:
    """A training loop as its users write it, for a plain model and for one that fully_shard has changed."""

    def update() -> None:
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return timed_step(lambda: loss_of(model, images, labels), Tensor.backward, update)
