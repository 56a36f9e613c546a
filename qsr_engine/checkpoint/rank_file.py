"""What one rank keeps in a checkpoint: a file of plain values and tensors, which can be loaded without running code."""

from __future__ import annotations

import io
import random
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

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
    """Write a rank's own file, without numpy's types.

    Raises:
        CheckpointError: the state holds what cannot be loaded again safely.
        OSError: there is no room.
    """
    state = without_numpy(state)
    with open(path, "wb") as opened:
        file = _File(opened)
        try:
            torch.save(state, cast(IO[bytes], file))
            opened.flush()
            torch.load(path, weights_only=True, map_location="cpu", mmap=True)  # of its tensors nothing is read
        except OSError:
            raise
        except Exception as error:
            if file.error is not None:  # torch raises one of its own that does not say it
                raise file.error from None
            raise _unsafe(state, error) from error


class _File(io.RawIOBase):
    """An open file that keeps the error of the disk.

    Args:
        file: opened for writing bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error
            raise


def _unsafe(state: Mapping[str, Any], error: Exception) -> CheckpointError:
    client = [key for key, value in state["client"].items() if not is_safe(value)]
    parts = [name for name, value in state.items() if name != "client" and not is_safe(value)]
    where, under = ("client_state", f", under {client}") if client or not parts else (" and ".join(parts), "")
    return CheckpointError(
        f"{where} holds objects that cannot be loaded again without running code{under}; give numbers, strings, lists, "
        f"dicts and tensors: {error}"
    )


def is_safe(value: Any) -> bool:
    """Whether it can be loaded again without running code."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True, map_location="cpu")
    except Exception:
        return False
    return True


def without_numpy(value: Any) -> Any:
    """The same with Python's numbers in place of numpy's and tensors in place of its arrays, which would run code when
    they are loaded. A learning rate becomes one of them by a factor that numpy has computed."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(value.copy())
        except TypeError:  # of strings or objects
            return value
    if type(value) in (dict, OrderedDict):
        return type(value)((without_numpy(key), without_numpy(entry)) for key, entry in value.items())
    if type(value) in (list, tuple, set):
        return type(value)(without_numpy(entry) for entry in value)
    return value


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
