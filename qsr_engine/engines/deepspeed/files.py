"""DeepSpeed's own writer and reader of checkpoints, guarded: a rank that cannot write leaves no other waiting, and
what is read runs no code.

    worker-00000/deepspeed/    DeepSpeed's own files of this worker, as its save_checkpoint() writes them
    worker-00000/latest        "deepspeed", so that DeepSpeed and its zero_to_fp32.py read the worker's folder

Does not import deepspeed; the engine gives DeepSpeed's functions and classes. What else a checkpoint holds: see
resumable.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from qsr_engine.checkpoint.manifest import CheckpointError

DEEPSPEED_TAG = "deepspeed"


class GuardedFiles:
    """DeepSpeed's checkpoint engine, with two differences.

    An error of save() waits in `error`: raised at once, it would leave the other ranks in a barrier of
    save_checkpoint() until its time-out. load() makes tensors, plain values and `classes`, and nothing else, where
    DeepSpeed's own takes a file for a pickle that may run anything. So save() looks whether load() will take its file.
    """

    def __init__(self, engine: Any, classes: Sequence[type]) -> None:
        self._engine = engine
        self._classes: list[Any] = list(classes)
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            saved = self._engine.save(state_dict, path, *args, **kwargs)
            self.check(Path(path))
        except Exception as error:
            self.error = self.error or error
            return False
        return saved

    def load(self, path: Any, map_location: Any = None) -> Any:
        with safe_globals(self._classes):
            return torch.load(path, map_location=map_location, weights_only=True)

    def check(self, path: Path) -> None:
        """Raises CheckpointError where load() would refuse a file. Of its tensors nothing is read where it is a zip."""
        try:
            with safe_globals(self._classes):
                torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{path}: it cannot be read, or holds what cannot be loaded without running code: {reason}"
            ) from error


def _is_zip(path: Path) -> bool:
    """torch's older format, which `checkpoint.checkpoint_serialization: false` asks for, is none."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
