"""A loader of the user's own, `data.loader` of a recipe: found, and each of its batches checked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.errors import DataError

_METHODS = ("__iter__", "state_dict", "load_state_dict")


class OwnLoader:
    """What the function of `data.loader` gives for one rank.

    Args:
        config: with a loader. It is called as `function(config, rank=, ranks=, batch_size=, seed=)`.
        classes: labels are from 0 to below this.
    Raises:
        DataError: there is no such function, or what it gives cannot be iterated over, saved and loaded.
    """

    def __init__(self, config: DataConfig, *, classes: int, rank: int, ranks: int, batch_size: int, seed: int) -> None:
        assert config.loader is not None
        self._name, self._classes = f"data.loader {config.loader}", classes
        self._place = [rank, ranks, batch_size]
        self._shape = (batch_size, 3, config.image_size, config.image_size)
        function = _function(config.loader)
        try:
            made = function(config, rank=rank, ranks=ranks, batch_size=batch_size, seed=seed)
        except Exception as error:  # it is the user's
            raise DataError(f"{self._name} has failed: {type(error).__name__}: {error}") from error
        missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
        if missing:
            raise DataError(
                f"{self._name} gives a {type(made).__name__} without {', '.join(missing)}; give an object that has "
                f"{', '.join(_METHODS)}"
            )
        self._made = made
        try:
            self.batches_of_a_pass: int | None = len(made)
        except TypeError:  # it has no length
            self.batches_of_a_pass = None
        if self.batches_of_a_pass == 0:
            raise DataError(f"{self._name} has no batch on rank {rank}; give every rank as many, at least one")

    def state_dict(self) -> dict[str, Any]:
        """Of this rank, after the batch that was given last."""
        return {"place": self._place, "loader": self._made.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Raises DataError where the state is not of this rank among so many, and of batches of this size."""
        found = None if state is None else state["place"]
        if state is None or found != self._place:
            what = "no state of it" if found is None else "that of rank {} of {}, in batches of {}".format(*found)
            raise DataError(
                f"{self._name}: the checkpoint has {what}, and this is rank {self._place[0]} of {self._place[1]}, in "
                f"batches of {self._place[2]}; go on with as many ranks, or begin another run"
            )
        self._made.load_state_dict(state["loader"])

    def batches(self, device: torch.device) -> Iterator[ImageBatch]:
        """Batches on the device, without end; none is taken before it is wanted, so that state_dict() is right.

        Raises:
            DataError: a batch is none as a model reads them, or a loader of no length has come to its end.
        """
        number = 0
        while True:
            before = number
            for batch in self._made:
                images, labels = self._checked(batch, number)
                number += 1
                yield ImageBatch(_moved(images, device), _moved(labels, device))
            if self.batches_of_a_pass is None or number == before:
                raise DataError(
                    f"{self._name} came to its end after {number} batches; give batches without end, or a __len__ "
                    "that says how many there are on every pass"
                )

    def _checked(self, batch: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        where = f"batch {number} of {self._name}"
        if not isinstance(batch, tuple | list) or len(batch) < 2 or not all(map(torch.is_tensor, batch[:2])):
            raise DataError(f"{where} is a {type(batch).__name__}; give a tuple of two tensors, images and labels")
        images, labels = batch[:2]
        if images.dtype != torch.uint8 or tuple(images.shape) != self._shape:
            found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise DataError(f"the images of {where} are {found}; give uint8 {list(self._shape)}, RGB from 0 to 255")
        if labels.dtype != torch.int64 or tuple(labels.shape) != self._shape[:1]:
            found = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
            raise DataError(f"the labels of {where} are {found}; give int64 [{self._shape[0]}]")
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= self._classes:
            wrong = least if least < 0 else most
            raise DataError(f"{where} has the label {wrong}; give labels from 0 to {self._classes - 1}")
        return images, labels


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device. The host waits for a copy to a GPU where the loader has pinned the memory: it may use it again.

    Otherwise the copy is from pinned memory of this call, which torch keeps until it is done.
    """
    if device.type != "cuda" or tensor.is_pinned():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _function(name: str) -> Any:
    """The function of `package.module:function`. Raises DataError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise DataError(
            f"data.loader is {name}, and {module} cannot be imported: {error}; write a module that Python finds, and "
            "put its folder into PYTHONPATH"
        ) from error
    if not callable(found):
        raise DataError(f"data.loader is {name}, and {module} has no function {function!r}; write one that it has")
    return found
