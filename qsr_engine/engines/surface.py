"""What both engines show beside their framework's own surface; a training loop never asks which engine it has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from qsr_engine.checkpoint.checkpointer import Checkpointer
from qsr_engine.engines.driver import Driver
from qsr_engine.local_steps.steps import LocalSteps


class Surface:
    """Methods of an engine that has a driver and a checkpointer."""

    _driver: Driver
    _checkpointer: Checkpointer

    @property
    def local_steps(self) -> LocalSteps:
        """Step, round, period and what averagings cost so far."""
        return self._driver.local_steps

    @property
    def seconds_averaging(self) -> float | None:
        """Wall-clock seconds in averagings so far; None where it runs beside compute and cannot be told apart."""
        return self._driver.seconds_averaging

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        keep: int | None = None,
    ) -> bool:
        """Save a checkpoint, one folder a worker, whole or not there; on a boundary only.

        Every rank must call it. Arguments as DeepSpeed's. client_state is kept for every rank: the position in the data
        belongs there. Random states, the local steps and the averaged model are saved too; the files are listed in
        checkpoint/write.py. With `keep`, the older whole ones in save_dir are deleted when this one is whole, so that
        so many are left.

        Raises:
            RuntimeError: inside a round, where every worker has parameters of its own, or inside gradient accumulation.
            CheckpointError: on every rank, if one could not write; what was saved before is as it was.
        """
        frozen = not exclude_frozen_parameters
        self._checkpointer.save(save_dir, tag, client_state, latest=save_latest, keep=keep, frozen=frozen)
        return True

    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from what save_checkpoint() wrote: from the newest whole checkpoint, or from the one with a tag.

        Every rank must call it. Arguments as DeepSpeed's. With another number of workers the optimizer's state follows
        qsr.on_other_workers, and a warning says what was taken over. load_optimizer_states=False takes parameters, step
        and scheduler; load_module_only=True takes the parameters alone, also those of the other engine, and the run
        begins at step 0 with them.

        Returns:
            (path of the checkpoint's folder, the client_state that this rank gave; with other workers, that of rank 0).
        Raises:
            CheckpointError: on every rank, if there is no whole checkpoint, or it is of another model.
            RuntimeError: inside gradient accumulation; or load_module_only, and this run has begun.
        """
        return self._checkpointer.load(load_dir, *args, **kwargs)

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The averaged model: fp32 parameters and the buffers, on the CPU, under the names of the module's own.

        Every rank must call it, on a boundary. All of it is on rank 0; the others get an empty one.

        Raises:
            RuntimeError: inside a round.
        """
        return self._checkpointer.averaged_model()

    def while_model_is_read(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Enter a context on every rank whenever the averaged model is read, for a checkpoint or by
        averaged_state_dict(): one that changes its buffers for so long (batch norm's statistics)."""
        self._checkpointer.while_model_is_read(context)
