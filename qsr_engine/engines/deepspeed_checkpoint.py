"""What a checkpoint of the DeepSpeed engine holds, and how a run goes on from it.

    worker-00000/deepspeed/    DeepSpeed's own files of this worker, as its save_checkpoint() writes them
    worker-00000/latest        "deepspeed", so that DeepSpeed and its zero_to_fp32.py read the worker's folder
    worker-00000/rank-00000.pt local steps, random states, the averager's and the scheduler's state, the caller's own

A run with the same layout goes on bit for bit. One with another number of workers of the same size takes the
parameters, which are the same on every worker, and the mean of the workers' optimizer state, or none
(`qsr.on_other_workers`). One with workers of another size, another ZeRO stage or precision takes the parameters only.

Does not import deepspeed; the engine gives DeepSpeed's functions.
"""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from qsr_engine.checkpoint import MODEL_FILE, CheckpointError
from qsr_engine.engines.deepspeed_masters import Masters

log = logging.getLogger(__name__)

DEEPSPEED_TAG = "deepspeed"
# Of a layout: what may differ for the optimizer's state to be averaged, and what must be the same for anything.
_WORKERS = "workers"
_SAME_MODEL = ("model",)


def worker_folder(folder: Path, worker: int) -> Path:
    return folder / f"worker-{worker:05d}"


def rank_file(folder: Path, worker: int, rank: int) -> Path:
    return worker_folder(folder, worker) / f"rank-{rank:05d}.pt"


# ------------------------------------------------------------------------------------------------------ a rank


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the random generators of this process, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def write_rank(path: Path, state: dict[str, Any]) -> None:
    """Write a rank's own file.

    Raises:
        CheckpointError: the caller's state holds what cannot be loaded again safely.
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(
            "client_state holds objects that cannot be loaded again without running code; give numbers, strings, "
            f"lists, dicts and tensors: {error}"
        ) from error
    path.write_bytes(buffer.getvalue())


def read_rank(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if the file is missing or is not what write_rank() wrote."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return state


class RecordedErrors:
    """DeepSpeed's checkpoint engine, whose errors wait: raised at once, they would leave the other ranks in a barrier
    of save_checkpoint() until its time-out."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._engine.save(*args, **kwargs)
        except Exception as error:
            self.error = self.error or error
            return False


# --------------------------------------------------------------------------------------------------- the model


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


# --------------------------------------------------------------------------------------- another number of workers


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of two layouts whose values differ: (saved, now)."""
    return {key: (saved.get(key), now.get(key)) for key in {*saved, *now} if saved.get(key) != now.get(key)}


def check_same_model(folder: Path, found: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises CheckpointError if the checkpoint is of another model."""
    if any(key in found for key in _SAME_MODEL):
        raise CheckpointError(
            f"{folder}: it is the checkpoint of another model (names, types or shapes of parameters and buffers "
            "differ); give the folder of this run"
        )


def policy(folder: Path, found: Mapping[str, tuple[Any, Any]], on_other_workers: str) -> str:
    """What happens to the optimizer's state in a run with another layout: "mean" or "fresh".

    Raises:
        CheckpointError: the mean was asked for, and more than the number of workers differs.
    """
    if on_other_workers == "fresh":
        return "fresh"
    others = {key: values for key, values in found.items() if key != _WORKERS}
    if others:
        spelled = ", ".join(f"{key} was {then!r} and is {now!r}" for key, (then, now) in sorted(others.items()))
        raise CheckpointError(
            f"{folder}: {spelled}, so the workers' optimizer states do not fit this run and cannot be averaged; write "
            "qsr.on_other_workers 'fresh' to take the parameters and start the optimizer anew, or go on as before"
        )
    return "mean"


def say(folder: Path, found: Mapping[str, tuple[Any, Any]], chosen: str) -> None:
    """On rank 0, loudly: what was taken over and what was not."""
    if dist.get_rank() != 0:
        return
    spelled = ", ".join(f"{key} was {then!r} and is {now!r}" for key, (then, now) in sorted(found.items()))
    state = {
        "mean": "Every worker's optimizer starts from the mean of the saved workers' states.",
        "fresh": "The optimizer starts anew, without the state that was saved.",
    }[chosen]
    log.warning(
        "%s: %s. The parameters, the step and the scheduler are taken over. %s Random states start anew, and where the "
        "data goes on is the caller's affair, so this is not the run that was saved.",
        folder,
        spelled,
        state,
    )


@torch.no_grad()
def mean_of_states(masters: Masters, load_worker: Callable[[int], Any], workers: int) -> None:
    """Load the saved workers one after another, and leave the mean of their optimizer states in the optimizer.

    State that is not floating point (step counters as integers) and single numbers are those of the last one loaded;
    workers have counted the same steps but for overflows.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    for worker in range(workers):
        load_worker(worker)
        for place, name, value in _state_tensors(masters):
            key = (place, name)
            sums[key] = sums[key] + value.double() if key in sums else value.double()
    for place, name, value in _state_tensors(masters):
        value.copy_(sums[place, name] / workers)


def _state_tensors(masters: Masters) -> Iterator[tuple[int, str, Tensor]]:
    states = masters.base_optimizer.state
    for place, master in enumerate(masters.held()):
        for name, value in states.get(master, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == master.shape:
                yield place, name, value
