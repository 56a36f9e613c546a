"""What a run keeps on disk: checkpoints while it trains, and its averaged model at the end."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qsr_engine.checkpoint.find import find_alone
from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.config.recipe import Recipe
from qsr_engine.records.run_folder import CHECKPOINTS, MODEL, RECIPE, cannot_finish, write_whole
from qsr_engine.training.from_recipe import Engine


class UnsavedError(CheckpointError):
    """The run was asked to stop, or is to stop there, and its checkpoint could not be written."""


class Checkpoints:
    """Writes a run's checkpoints, and counts those that could not be written, without which training goes on."""

    def __init__(self, recipe: Recipe, engine: Engine) -> None:
        self._folder, self._keep = recipe.run_dir / CHECKPOINTS, recipe.logging.keep_checkpoints
        self._engine = engine
        self.failed = 0

    def state_dict(self) -> dict[str, Any]:
        return {"checkpoints_failed": self.failed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.failed = state.get("checkpoints_failed", 0)

    def save(self, client: dict[str, Any], *, stopping: str | None = None) -> None:
        """Write one of this step, with what this rank keeps beside the engine's own; on all ranks.

        Args:
            stopping: why the run ends with it; None where it goes on.
        Raises:
            UnsavedError: the run ends, and it could not be written.
        """
        tag = f"step-{self._engine.local_steps.step:08d}"
        try:
            self._engine.save_checkpoint(self._folder, tag=tag, client_state=client, keep=self._keep)
        except CheckpointError as error:  # on all ranks alike
            self._note_failure(error, stopping)

    def _note_failure(self, error: CheckpointError, stopping: str | None) -> None:
        """Training goes on without it, and a run that is to stop ends with the error; both say what is left."""
        self.failed += 1
        try:
            there = f"the last whole one is {find_alone(self._folder)[0].name}"
        except CheckpointError:
            there = "there is no whole one yet"
        if stopping is not None:
            raise UnsavedError(f"{stopping}, and its checkpoint failed; {there}. {error}") from error
        if dist.get_rank() == 0:
            warnings.warn(
                f"step {self._engine.local_steps.step}: the checkpoint could not be written, and {there}; training "
                f"goes on, and the next one is tried at its own time. {error}",
                stacklevel=3,
            )


def save_model(state: dict[str, Tensor], recipe: Recipe, files: Mapping[str, str]) -> None:
    """The averaged model as safetensors; timm's and torchvision's models load it with load_state_dict().

    Args:
        files: what else is written, by name.
    Raises:
        ConfigError: there is no room, or nothing can be written any more; no part of it is left.
    """
    path = recipe.run_dir / MODEL
    temporary = path.with_suffix(".tmp")
    try:
        for name, text in files.items():
            write_whole(recipe.run_dir / name, text)
        save_file(state, temporary, metadata={"format": "pt"})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        shutil.copymode(recipe.run_dir / RECIPE, temporary)  # safetensors makes files that only their owner reads
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_finish(path, error) from error
