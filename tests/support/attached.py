"""Loops of others: what a loop records, and the plain loop that it must equal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils.data import TensorDataset

from tests.support import training
from tests.support.counting import collectives_across_workers
from tests.support.training import QSR

ENDS = [2, 4, 6, 8, 12]  # of the rounds of QSR


OWN_SCHEDULE = {**{key: value for key, value in QSR.items() if key != "lr"}, "warmup_steps": 2, "alpha": 0.06}


BF16_STAGE_1 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


@contextlib.contextmanager
def accelerate_without_gpu() -> Iterator[None]:
    """Accelerate as on a host with GPUs, whose backend would be gloo; all that it sets in the process is undone.

    Without the stand-in it takes a DeepSpeed run on CPUs for one of a single process (`num_processes` is 1). Trainer's
    arguments start the process group, before attach() can say that DeepSpeed need not compile for it.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    from qsr_engine.engines.deepspeed.internals import leave_out_shared_memory_collective

    leave_out_shared_memory_collective()

    def gloo(*args: Any, **kwargs: Any) -> tuple[str, Any]:
        return "gloo", DistributedType.MULTI_CPU

    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"), mock.patch.object(PartialState, "_prepare_backend", gloo):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


class Recorder:
    """What a loop's engine saw and did, step by step: batches, collectives, parameters."""

    def __init__(self) -> None:
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.steps: list[dict[str, Any]] = []
        self.of_the_loop: list[int] = []  # collectives of the loop itself, before each of its batches but the first
        self._before = 0

    def begin(self, engine: Any, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        count = self.counted()
        if self.batches:  # around the first batch the loader's setting up meets the other ranks
            assert engine.local_steps.on_boundary or count == 0, "the loop itself, between boundaries"
            self.of_the_loop.append(count)
        self.batches.append((inputs.clone(), targets.clone()))

    def counted(self) -> int:
        """Collectives since the last call, of this rank with other workers."""
        now = collectives_across_workers(worker_size=1)
        before, self._before = self._before, now
        return now - before

    def end(self, engine: Any) -> None:
        """After a micro-batch, which may have ended a step."""
        collectives, state = self.counted(), engine.local_steps
        if (self.steps and self.steps[-1]["step"] == state.step) or state.step == 0:
            assert collectives == 0, "between two micro-batches"
            return
        self.steps.append(
            {
                "step": state.step,
                "boundary": state.on_boundary,
                "collectives": collectives,
                "parameters": training.flat(engine.module.parameters()).clone(),
            }
        )


def plain_loop(
    recorder: Recorder,
    qsr: dict[str, Any],
    accumulation: int,
    config: dict[str, Any],
    scheduler: Any = None,
    loss_scale: float = 1.0,
) -> list[torch.Tensor]:
    """Parameters after every step of a loop of one's own on the same batches."""
    import qsr_engine

    model = training.make_model(torch.float32)
    optimizer = training.make_optimizer("sgd", model.parameters())
    engine = qsr_engine.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler(optimizer) if scheduler else None,
        config={
            "train_micro_batch_size_per_gpu": training.BATCH,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.5,
            "qsr": qsr,
            **config,
        },
    )[0]
    history = []
    for inputs, targets in recorder.batches:
        dtype = next(engine.module.parameters()).dtype
        before = engine.local_steps.step
        engine.backward(training.loss(engine(inputs.to(dtype)), targets.to(dtype)) * loss_scale)
        engine.step()
        if engine.local_steps.step > before:
            history.append(training.flat(engine.module.parameters()).clone())
    return history


def dataset(steps: int = 12, ranks: int = 2, accumulation: int = 1) -> TensorDataset:
    batches = [training.batch(0, step, dtype=torch.float32) for step in range(steps * ranks * accumulation)]
    return TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def warm_up_and_decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A scheduler of one's own; the period would be another if it were read one step late."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.05
    rates = [0.2, 0.6, 1.0, 0.9, 0.8, 0.7, 0.5, 0.45, 0.4, 0.3, 0.2, 0.1, 0.05]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])


def check(results: list[tuple[list[dict[str, Any]], list[torch.Tensor]]], ends: list[int] | None = None) -> None:
    """Silent and apart between boundaries, equal on them, and everywhere what a loop of one's own gives."""
    (first, plain_first), (second, plain_second) = results
    assert [entry["step"] for entry in first] == list(range(1, 13))
    assert [entry["step"] for entry in first if entry["boundary"]] == (ends or ENDS)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["parameters"], other["parameters"]) == one["boundary"]
        assert one["collectives"] == other["collectives"] == (3 if one["boundary"] else 0), "header and two meetings"
    for steps, plain in ((first, plain_first), (second, plain_second)):
        for entry, expected in zip(steps, plain, strict=True):
            assert torch.equal(entry["parameters"], expected)
