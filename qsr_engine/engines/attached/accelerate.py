"""Hugging Face Accelerate: `get_state_dict` gives the workers' average, at any step."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from qsr_engine.engines.attached.replaced import replaced
from qsr_engine.engines.deepspeed.engine import LocalStepEngine


def gives_the_average(engines: Sequence[LocalStepEngine]) -> contextlib.AbstractContextManager[None]:
    """Inside, an Accelerator that prepares an engine is changed, for good: its loop may come after the block.

    save_model() and Trainer ask get_state_dict() too, on every rank.
    """

    def make(prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def prepare_and_change(accelerator: Any, *args: Any, **kwargs: Any) -> Any:
            before = len(engines)
            prepared = prepare(accelerator, *args, **kwargs)
            if len(engines) > before and "get_state_dict" not in vars(accelerator):
                accelerator.get_state_dict = functools.partial(_of_the_average, accelerator.get_state_dict)
            return prepared

        return prepare_and_change

    return replaced(getattr(sys.modules.get("accelerate"), "Accelerator", None), "prepare", make)


def _of_the_average(get_state_dict: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Where all workers hold the same, nobody is met: some loops ask on one rank at their end."""
    differs = isinstance(model, LocalStepEngine) and not model.local_steps.boundary.same_everywhere
    with model.averaged() if differs else contextlib.nullcontext():
        return get_state_dict(model, *args, **kwargs)
