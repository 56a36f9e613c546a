"""What a run trains, apart from how: a `Task` has its model, its batches, its loss and the figures of an evaluation.

    images.py      classes of pictures
    text.py        language models
    make_task.py   the one that a recipe names

The loop, the evaluation, plans and measurements ask a task, and no name of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qsr_engine.data import Index
from qsr_engine.data.batches import ImageBatch

Batch = tuple[Tensor, Tensor]  # what the model reads, and what its outputs are compared with


class Task(Protocol):
    """A task on the data of an index. A batch has samples in its first dimension."""

    index: Index  # with all that reading it needs
    unit: str  # what throughput counts, "images" or "tokens"
    units: int  # of them in a sample
    reached: tuple[str, ...]  # the fields of a Record that evaluation() gives

    def create_model(self) -> nn.Module:
        """The recipe's model, with initial parameters by torch's generator.

        Raises:
            ConfigError: there is no such model, or it does not take these data.
        """

    def files(self, model: nn.Module) -> dict[str, str]:
        """What stands beside the model in the run's folder, by name: what a library needs to load it."""

    def batch(self, loaded: ImageBatch) -> Batch:
        """A batch of the loader as a model reads it. A sample with the label -1 does not count."""

    def training_batch(self, loaded: ImageBatch) -> Batch:
        """The same in training, where samples may be mixed by torch's generator."""

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The mean loss of what the model gave in training, []."""

    def accuracy(self, outputs: Any, targets: Tensor) -> Tensor | None:
        """The accuracy in %, of what it gave in training, []; None where the task has none."""

    def totals(self, outputs: Any, targets: Tensor) -> Tensor:
        """What evaluation() needs of a batch, [N]; over batches and ranks it is summed in fp64."""

    def evaluation(self, totals: Sequence[float]) -> dict[str, float]:
        """The figures of an evaluation, by the names of a Record's fields."""

    def best(self, evaluated: Mapping[str, float], before: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        """The best evaluation so far, by the names of a Record's fields: this one, of a step, or that before."""

    def blank(self, device: torch.device) -> ImageBatch:
        """A batch of one sample that does not count."""

    def random_batch(self, size: int, generator: torch.Generator) -> Batch:
        """So many samples of no meaning, as a model reads them, on the CPU."""
