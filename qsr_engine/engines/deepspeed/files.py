"""DeepSpeed's own writer and reader of checkpoints, guarded: a rank that cannot write leaves no other waiting, and
what is read runs no code.

    worker-00000/deepspeed/    DeepSpeed's own files of this worker, as its save_checkpoint() writes them
    worker-00000/latest        "deepspeed", so that DeepSpeed and its zero_to_fp32.py read the worker's folder

What else a checkpoint holds: see checkpoint/checkpointer.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.serialization import safe_globals

from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.model_file import named_state, read_model
from qsr_engine.checkpoint.rank_file import without_numpy
from qsr_engine.engines.deepspeed.groups import WorkerGroups
from qsr_engine.engines.deepspeed.internals import deepspeed_uses, without_barriers
from qsr_engine.engines.replica import Replica

DEEPSPEED_TAG = "deepspeed"
# Beside tensors and plain values these are in the files of DeepSpeed, which keep no code of their own.
_IN_CHECKPOINTS: list[type] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class DeepSpeedFiles:
    """DeepSpeed's files of one worker; see checkpoint.checkpointer.WorkerFiles."""

    folder = DEEPSPEED_TAG

    def __init__(self, engine: DeepSpeedEngine, replica: Replica, groups: WorkerGroups | None) -> None:
        self._engine, self._replica, self._groups = engine, replica, groups
        # At stage 0 every rank has all of the state, however many they are.
        whole = engine.zero_optimization_stage() == 0
        self.may_differ = frozenset({"workers", "worker_size"} if whole else {"workers"})

    def write(self, folder: Path, *, without_frozen: bool) -> None:
        engine = self._engine
        writer = engine.checkpoint_engine
        files = engine.checkpoint_engine = GuardedFiles(writer, _IN_CHECKPOINTS)
        try:
            with deepspeed_uses(self._groups), without_barriers():
                DeepSpeedEngine.save_checkpoint(
                    engine,
                    str(folder),
                    tag=DEEPSPEED_TAG,
                    client_state={},
                    save_latest=False,
                    exclude_frozen_parameters=without_frozen,
                )
        finally:
            engine.checkpoint_engine = writer
        if files.error is not None:
            raise files.error
        (folder / "latest").write_text(DEEPSPEED_TAG, encoding="utf-8")

    def check(self, folder: Path) -> None:
        if self._engine.load_universal_checkpoint():
            raise CheckpointError(
                "checkpoint.load_universal is true, and DeepSpeed then runs code that it finds in files; write false"
            )
        files = GuardedFiles(self._engine.checkpoint_engine, _IN_CHECKPOINTS)
        for path in sorted((folder / self.folder).glob("*.pt")):
            files.check(path)

    def load(self, folder: Path, own: Mapping[str, Any], **options: Any) -> None:
        engine = self._engine
        reader = engine.checkpoint_engine
        engine.checkpoint_engine = GuardedFiles(reader, _IN_CHECKPOINTS)
        scaler = getattr(engine.optimizer, "loss_scaler", None)
        try:
            with deepspeed_uses(self._groups):
                path, _ = DeepSpeedEngine.load_checkpoint(engine, str(folder), tag=DEEPSPEED_TAG, **options)
        finally:
            engine.checkpoint_engine = reader
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load here")
        _follow_configuration(engine, scaler)
        if engine.torch_autocast_z0_gradscaler and "grad_scaler" in own:
            engine.torch_autocast_z0_gradscaler.load_state_dict(own["grad_scaler"])

    def state_dict(self) -> dict[str, Any]:
        scaler = self._engine.torch_autocast_z0_gradscaler
        return {"grad_scaler": scaler.state_dict()} if scaler else {}

    def model(self, *, keep: bool, frozen: bool) -> dict[str, Tensor]:
        with deepspeed_uses(self._groups):
            return named_state(self._engine.module, self._replica.whole, keep=keep, frozen=frozen)

    def read_model(self, folder: Path) -> None:
        with deepspeed_uses(self._groups):
            read_model(folder, self._engine.module, self._replica.put)
            self._replica.refresh()


def _follow_configuration(engine: DeepSpeedEngine, scaler: Any) -> None:
    """DeepSpeed's optimizers load how they clip and scale with their state; this run's configuration says how.

    Args:
        scaler: of the loss, as configured; of the loaded one the position is taken over.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "clip_grad"):
        optimizer.clip_grad = engine.gradient_clipping()
    if scaler is None:
        return
    if isinstance(scaler, DynamicLossScaler) and isinstance(optimizer.loss_scaler, DynamicLossScaler):
        vars(scaler).update({name: vars(optimizer.loss_scaler)[name] for name in _POSITION_OF_A_SCALER})
    optimizer.loss_scaler, optimizer.dynamic_loss_scale = scaler, scaler.dynamic


_POSITION_OF_A_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


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
            saved = self._engine.save(without_numpy(state_dict), path, *args, **kwargs)
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
