"""The averaged model of a checkpoint: parameters and buffers under the names of the module's own state_dict()."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qsr_engine.checkpoint.buffers import persistent_buffers
from qsr_engine.checkpoint.find import find_alone
from qsr_engine.checkpoint.manifest import MODEL_FILE, CheckpointError, Manifest


def named_state(
    module: nn.Module, full: Callable[[Tensor], Tensor], *, keep: bool, frozen: bool = True
) -> dict[str, Tensor]:
    """Parameters and buffers under their names in state_dict(), on the CPU, none of them shared.

    What is trained is in fp32, and what is frozen in the type that it has (a base in bf16). Collective in a worker that
    shards them, a parameter at a time; a rank with `keep` False holds one at a time only and returns nothing.

    Args:
        frozen: False leaves out parameters that are not trained.
    """
    state: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not (frozen or parameter.requires_grad):
            continue
        if id(parameter) in first_name:
            if keep:
                state[name] = state[first_name[id(parameter)]].clone()
            continue
        first_name[id(parameter)] = name
        value = full(parameter)
        if keep:
            value = value.detach().float() if parameter.requires_grad else value.detach()
            state[name] = value.cpu().clone().contiguous()
    if keep:
        for name, buffer in persistent_buffers(module).items():
            state[name] = buffer.detach().cpu().clone().contiguous()
    return state


@torch.no_grad()
def read_model(folder: Path, module: nn.Module, put: Callable[[Tensor, Tensor], None]) -> None:
    """Put the averaged model of a checkpoint into the masters and the buffers; collective where they are sharded.

    Frozen parameters that it was written without stay as they are.

    Raises:
        CheckpointError: it is of another model.
    """
    with safe_open(folder / MODEL_FILE, framework="pt") as file:
        names = set(file.keys())
        for name, parameter in module.named_parameters():
            if name in names:
                put(parameter, file.get_tensor(name))
            elif parameter.requires_grad:
                raise CheckpointError(
                    f"{folder}: {MODEL_FILE} has no parameter {name!r}, so it is of another model, or was saved "
                    "without frozen parameters, of which this one was then one"
                )
        for name, buffer in module.named_buffers():
            if name in names:
                buffer.copy_(file.get_tensor(name))


def export(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> Manifest:
    """Copy the averaged model of a checkpoint, after comparing it with its SHA-256.

    Raises:
        CheckpointError: there is no whole checkpoint, or it was altered, or `out` cannot be written.
    """
    folder, manifest = find_alone(checkpoint)
    if MODEL_FILE not in manifest.files:
        raise CheckpointError(f"{folder}: {MODEL_FILE} is on another host (that of rank 0); run this there")
    manifest.check_digests(folder, [MODEL_FILE])
    out = Path(out)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.copyfile(folder / MODEL_FILE, temporary)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{out}: cannot write there: {error.strerror or error}") from error
    return manifest
