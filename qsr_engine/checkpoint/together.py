"""Steps that all ranks take together: an error of one is an error of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from qsr_engine.checkpoint.manifest import CheckpointError


class Together:
    """Steps that every rank takes, so that an error of one is an error of all, at the same place."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._error: Exception | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """An error in it waits for agree()."""
        try:
            yield
        except Exception as error:
            self._error = error

    def agree(self) -> None:
        errors = gathered(None if self._error is None else f"{type(self._error).__name__}: {self._error}")
        wrong = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
        if wrong:
            raise CheckpointError(f"{self._what} failed:\n  " + "\n  ".join(wrong[:8])) from self._error


def gathered(value: Any) -> list[Any]:
    """The values of all ranks; small ones."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
