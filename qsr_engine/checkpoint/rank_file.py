"""What one rank keeps in a checkpoint: a file of plain values and tensors, which can be loaded without running code."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qsr_engine.checkpoint.manifest import CheckpointError


def worker_folder(folder: Path, worker: int) -> Path:
    return folder / f"worker-{worker:05d}"


def rank_file(folder: Path, worker: int, rank: int) -> Path:
    return worker_folder(folder, worker) / f"rank-{rank:05d}.pt"


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
        _save_safely(state, buffer)
    except Exception as error:
        wrong = [key for key, value in state["client"].items() if not _is_safe(value)]
        raise CheckpointError(
            f"client_state holds objects that cannot be loaded again without running code, under {wrong}; give numbers "
            f"(float(...) of numpy's), strings, lists, dicts and tensors: {error}"
        ) from error
    path.write_bytes(buffer.getvalue())


def _save_safely(value: Any, buffer: io.BytesIO) -> None:
    torch.save(value, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True, map_location="cpu")


def _is_safe(value: Any) -> bool:
    try:
        _save_safely(value, io.BytesIO())
    except Exception:
        return False
    return True


def read_rank(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if the file is missing or is not what write_rank() wrote."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    missing = [name for name in _OF_A_RANK if not isinstance(state, dict) or name not in state]
    if missing:
        raise CheckpointError(f"{path}: it does not hold {', '.join(missing)}, so it is not the file of a rank")
    return state


_OF_A_RANK = ("local_steps", "averager", "scheduler", "rates", "random", "client", "buffers", "without_frozen", "own")
