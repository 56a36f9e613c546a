"""What modules keep beside parameters and buffers: torch's `get_extra_state()` and `set_extra_state()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.rank_file import is_safe


def extra_states(module: nn.Module) -> dict[str, Any]:
    """The state of every module inside that has one, by its name.

    Raises:
        CheckpointError: it cannot be loaded again without running code.
    """
    states = {name: part.get_extra_state() for name, part in module.named_modules() if _has_extra_state(part)}
    for name, state in states.items():
        if not is_safe(state):
            raise CheckpointError(
                f"get_extra_state() of {name or 'the model'!r} gives what cannot be loaded again without running code "
                f"({type(state).__name__}); give numbers, strings, lists, dicts and tensors"
            )
    return states


def put_extra_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a module that has saved its state is not there."""
    parts = dict(module.named_modules())
    for name, state in states.items():
        if name not in parts:
            raise CheckpointError(f"the checkpoint has the state of a module {name!r}, which this model has not")
        parts[name].set_extra_state(state)


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
