"""The task `images`: classes of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_engine.config.recipe import Recipe
from qsr_engine.data import Index
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.device import MixUp, Normalise
from qsr_engine.training.from_recipe import DTYPES
from qsr_engine.training.models import create_model, loss_of, scores_of
from qsr_engine.training.task import Batch


class ImageTask:
    """Pictures [B, 3, S, S], and labels [B] or, mixed, shares of the classes that the model has, [B, classes].

    Raises:
        ConfigError: how many classes there are is not known, or the model has fewer.
    """

    unit, units = "images", 1
    reached: tuple[str, ...] = ("eval_accuracy", "eval_top5_accuracy", "eval_loss", "best_accuracy", "best_step")

    def __init__(self, recipe: Recipe, index: Index) -> None:
        self._recipe, self._classes = recipe, index.class_count
        self._scores = scores_of(recipe.model, index.class_count)
        if index.classes is None:  # so that a label that is too large is found where it is read
            index = index.model_copy(update={"classes": [str(label) for label in range(self._scores)]})
        self.index = index
        self._mixup = MixUp(recipe.data.mixup, self._scores) if recipe.data.mixup > 0 else None
        self._normalise: Normalise | None = None  # on the device of the first batch

    def create_model(self) -> nn.Module:
        return create_model(self._recipe.model, self._classes, self._recipe.data.image_size)

    def files(self, model: nn.Module) -> dict[str, str]:
        return {}

    def batch(self, loaded: ImageBatch) -> Batch:
        if self._normalise is None:
            self._normalise = Normalise(loaded.images.device, DTYPES[self._recipe.precision.dtype])
        return self._normalise(loaded.images), loaded.labels

    def training_batch(self, loaded: ImageBatch) -> Batch:
        images, labels = self.batch(loaded)
        return (images, labels) if self._mixup is None else self._mixup(images, labels)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return loss_of(outputs, targets, self._recipe.label_smoothing)

    def accuracy(self, outputs: Any, targets: Tensor) -> Tensor:
        return accuracy_of(outputs, targets)

    def totals(self, outputs: Any, targets: Tensor) -> Tensor:
        """Samples, right ones, those right among the first five, and the summed loss."""
        scores = outputs.float()
        right = (scores.argmax(1) == targets).sum()
        among_five = (scores.topk(min(5, scores.shape[1])).indices == targets[:, None]).sum()
        loss = F.cross_entropy(scores, targets, reduction="sum", ignore_index=-1)
        return torch.stack([(targets >= 0).sum(), right, among_five, loss])

    def evaluation(self, totals: Sequence[float]) -> dict[str, float]:
        samples, right, among_five, loss = totals
        samples = max(1, samples)
        found = {"eval_accuracy": 100 * right / samples, "eval_loss": loss / samples}
        if self._scores > 5:  # else it is 100
            found["eval_top5_accuracy"] = 100 * among_five / samples
        return found

    def best(self, evaluated: Mapping[str, float], before: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        if evaluated["eval_accuracy"] <= before.get("best_accuracy", -1.0):
            return before
        return {"best_accuracy": evaluated["eval_accuracy"], "best_step": step}

    def blank(self, device: torch.device) -> ImageBatch:
        size = self._recipe.data.image_size
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
        return ImageBatch(pixels, torch.tensor([-1], device=device))

    def random_batch(self, size: int, generator: torch.Generator) -> Batch:
        side = self._recipe.data.image_size
        images = torch.randn(size, 3, side, side, generator=generator).to(DTYPES[self._recipe.precision.dtype])
        return images, torch.randint(self._classes or self._scores, (size,), generator=generator)


@torch.no_grad()
def accuracy_of(outputs: Any, labels: Tensor) -> Tensor:
    """Accuracy in % of a micro-batch by what the model gave in training.

    Where pictures are mixed, an answer counts as right by the share of its class in the picture, as the authors count:
    (1 - lambda) for the one picture's class and lambda for the other's. Label smoothing is in the loss only.

    Args:
        outputs: scores [B, classes], or a tuple that begins with them.
        labels: [B], or shares of classes [B, classes].
    """
    scores: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    answers = scores.argmax(1)
    right = answers == labels if labels.ndim == 1 else labels.gather(1, answers[:, None])
    return 100 * right.float().mean()
