"""What DeepSpeed's own writer of checkpoints needs, so that a rank that cannot write does not leave the others waiting.

    worker-00000/deepspeed/    DeepSpeed's own files of this worker, as its save_checkpoint() writes them
    worker-00000/latest        "deepspeed", so that DeepSpeed and its zero_to_fp32.py read the worker's folder

Does not import deepspeed; the engine gives DeepSpeed's functions. What else a checkpoint holds: see resumable.py.
"""

from __future__ import annotations

from typing import Any

DEEPSPEED_TAG = "deepspeed"


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
