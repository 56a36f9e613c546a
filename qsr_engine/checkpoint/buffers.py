"""A module's buffers in a checkpoint, by name: a model may make some in its first forward, or anew in another shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsr_engine.checkpoint.manifest import CheckpointError

log = logging.getLogger(__name__)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the module's state, by their names in state_dict()."""
    return {
        name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(prefix, recurse=False)
        if name.rpartition(".")[2] not in part._non_persistent_buffers_set
    }


def kept_buffers(module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """All buffers by name, on the CPU, each with whether it is persistent."""
    persistent = persistent_buffers(module)
    return {name: (buffer.detach().cpu(), name in persistent) for name, buffer in module.named_buffers()}


def make_room(module: nn.Module, kept: Any, device: torch.device) -> None:
    """Give a module the buffers of kept_buffers() that it does not have yet, or has in another shape.

    Args:
        kept: as a checkpoint has it; an older one has a list, of which nothing is known but the order.
        device: of a buffer that is new.
    """
    for name, (value, persistent) in kept.items() if isinstance(kept, Mapping) else ():
        owner_name, _, own = name.rpartition(".")
        try:
            owner = module.get_submodule(owner_name)
        except AttributeError:
            owner = None
        here = None if owner is None else owner._buffers.get(own)
        if here is not None and here.shape == value.shape:
            continue
        if owner is None or (here is None and getattr(owner, own, None) is not None):
            log.warning("the buffer %r of the checkpoint has no place in this model, and is left out", name)
            continue
        owner.__dict__.pop(own, None)  # None, until the module puts a buffer there
        there = device if here is None else here.device
        owner.register_buffer(own, value.to(there, copy=True), persistent)


@torch.no_grad()
def put_buffers(module: nn.Module, kept: Any) -> None:
    """Give a module's buffers the values of kept_buffers(), after make_room().

    Raises:
        CheckpointError: an older checkpoint kept other buffers than the module has, and not their names.
    """
    here = dict(module.named_buffers())
    values: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]]
    if isinstance(kept, Mapping):
        values = {name: value for name, (value, _) in kept.items() if name in here}
    elif len(kept) == len(here):
        values = dict(zip(here, kept, strict=True))
    else:
        raise CheckpointError(
            f"the model has {len(here)} buffers, and the checkpoint, which an older version wrote, has {len(kept)} "
            "without their names; where the model makes some in its first forward, run one before load_checkpoint()"
        )
    for name, value in values.items():
        here[name].copy_(value)
