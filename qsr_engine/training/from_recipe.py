"""The engine that a recipe names, with the configuration that it reads, and what a rank of it needs beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import qsr_engine
from qsr_engine.config.batch import Batch
from qsr_engine.config.recipe import Recipe
from qsr_engine.data.writing.processes import usable_cores
from qsr_engine.local_steps.steps import LocalSteps
from qsr_engine.training.optimizer import make_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(Protocol):
    """What both engines show."""

    module: nn.Module
    device: torch.device

    @property
    def local_steps(self) -> LocalSteps: ...

    @property
    def seconds_averaging(self) -> float | None: ...

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> Any: ...

    def step(self) -> bool: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...

    def save_checkpoint(self, save_dir: Path, *, tag: str, client_state: dict[str, Any], keep: int | None) -> bool: ...

    def load_checkpoint(self, load_dir: Path, **options: Any) -> tuple[str | None, dict[str, Any] | None]: ...

    def end_round(self) -> bool: ...

    def measure_next_step(self) -> None: ...

    def measured(self) -> dict[str, float]: ...

    def averaged(self) -> AbstractContextManager[None]: ...

    def averaged_state_dict(self) -> dict[str, Tensor]: ...

    def while_model_is_read(self, context: Callable[[], AbstractContextManager[None]]) -> None: ...


def make_engine(recipe: Recipe, batch: Batch, model: nn.Module) -> Engine:
    """Start the engine of a recipe, `recipe.engine`.

    Raises:
        ConfigError, AgreementError: as initialize() and initialize_fsdp().
    """
    optimizer = partial(make_optimizer, recipe, model)
    if recipe.engine == "fsdp":
        fsdp: Engine = qsr_engine.initialize_fsdp(model=model, optimizer=optimizer, config=fsdp_config(recipe, batch))
        return fsdp
    engine: Engine
    engine, *_ = qsr_engine.initialize(model=model, optimizer=optimizer, config=deepspeed_config(recipe, batch))
    return engine


def deepspeed_config(recipe: Recipe, batch: Batch) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe, its `"qsr"` block included."""
    return {
        **_for_both(recipe, batch),
        "fp16": {"enabled": recipe.precision.dtype == "fp16"},
        **_torch_autocast(recipe),
        "zero_optimization": {"stage": recipe.precision.zero_stage},
        "zero_allow_untested_optimizer": True,  # DeepSpeed has not tested torch's SGD under ZeRO; the tests here have
    }


def _torch_autocast(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's block, by which it scales the loss too; autocast() says it for evaluations, and under FSDP."""
    dtype = recipe.precision.autocast
    if dtype is None:
        return {}
    return {"torch_autocast": {"enabled": True, "dtype": str(DTYPES[dtype]).removeprefix("torch.")}}


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """Around every forward of the model: torch.autocast where the recipe has it."""
    dtype = recipe.precision.autocast
    return torch.autocast(device.type, DTYPES[dtype]) if dtype else nullcontext()


def fsdp_config(recipe: Recipe, batch: Batch) -> dict[str, Any]:
    """The configuration of a recipe for `initialize_fsdp`."""
    return {**_for_both(recipe, batch), "fsdp": recipe.fsdp.model_dump()}


def _for_both(recipe: Recipe, batch: Batch) -> dict[str, Any]:
    return {
        "train_batch_size": batch.train,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "bf16": {"enabled": recipe.precision.dtype == "bf16"},
        "qsr": recipe.qsr.model_dump(exclude_none=True),
    }


def share_cores() -> None:
    """On a CPU, give each rank of this host its share of the cores, unless OMP_NUM_THREADS says another number.

    torchrun itself writes 1 there; cli/launcher.py and launch/torchrun.sh write the share before it can.
    """
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        here = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"  # deepspeed's, torchrun's
        torch.set_num_threads(max(1, usable_cores() // int(here)))
