"""The averaged model of a checkpoint: fp32 parameters and buffers under the names of the module's own state_dict()."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qsr_engine.checkpoint.find import find_alone
from qsr_engine.checkpoint.manifest import MODEL_FILE, CheckpointError, Manifest


def named_state(module: nn.Module, full: Callable[[Tensor], Tensor], keep: bool) -> dict[str, Tensor]:
    """fp32 values of all parameters and buffers under their names in state_dict(), on the CPU, none of them shared.

    Collective in a worker that shards them, a parameter at a time; a rank with `keep` False holds one at a time only
    and returns nothing.
    """
    state: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first_name:
            if keep:
                state[name] = state[first_name[id(parameter)]].clone()
            continue
        first_name[id(parameter)] = name
        value = full(parameter)
        if keep:
            state[name] = value.detach().float().cpu().clone().contiguous()
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if keep and name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                state[name] = buffer.detach().cpu().clone().contiguous()
    return state


@torch.no_grad()
def read_model(
    folder: Path, module: nn.Module, put: Callable[[Tensor, Tensor], None], only: set[str] | None = None
) -> None:
    """Put the averaged model of a checkpoint, or only these parameters, into the masters and the buffers.

    Collective where they are sharded.

    Raises:
        CheckpointError: it is of another model.
    """
    with safe_open(folder / MODEL_FILE, framework="pt") as file:
        names = set(file.keys())
        for name, parameter in module.named_parameters():
            if only is not None and name not in only:
                continue
            if name not in names:
                raise CheckpointError(f"{folder}: {MODEL_FILE} has no parameter {name!r}, so it is of another model")
            put(parameter, file.get_tensor(name))
        for name, buffer in module.named_buffers():
            if name in names and only is None:
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
