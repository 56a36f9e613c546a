"""Lightning, which has two names on PyPI."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qsr_engine.engines.attached.replaced import replaced
from qsr_engine.engines.deepspeed.engine import LocalStepEngine

_NAMES = ("lightning.pytorch", "pytorch_lightning")


@contextlib.contextmanager
def asks_on_boundaries(engines: Sequence[LocalStepEngine]) -> Iterator[None]:
    """Before every batch all ranks are asked whether rank 0 has received SIGTERM (Lightning 2.6, by a broadcast).

    Between boundaries that would make every worker wait.
    """

    def make(ask: Callable[[Any], None]) -> Callable[[Any], None]:
        def ask_on_boundaries(loop: Any) -> None:
            if all(engine.local_steps.on_boundary for engine in engines):
                ask(loop)

        return ask_on_boundaries

    with _replaced("loops.training_epoch_loop", "_TrainingEpochLoop", "_broadcast_sigterm_tensor", make):
        yield


@contextlib.contextmanager
def ends_rounds(end: Callable[[], None]) -> Iterator[None]:
    """When training has ended, and before its teardown moves the model to the CPU, out of the averager's buckets."""

    def make(on_train_end: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(on_train_end)
        def end_after(strategy: Any) -> None:
            on_train_end(strategy)
            end()

        return end_after

    with _replaced("strategies.deepspeed", "DeepSpeedStrategy", "on_train_end", make):
        yield


@contextlib.contextmanager
def _replaced(module: str, owner: str, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    with contextlib.ExitStack() as both:
        for library in _NAMES:
            both.enter_context(replaced(getattr(sys.modules.get(f"{library}.{module}"), owner, None), name, make))
        yield
