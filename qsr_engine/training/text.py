"""The task `text`: a causal language model that predicts every token of a block from those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_engine.config.recipe import Recipe
from qsr_engine.data import Index
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.blocks import dtype_of
from qsr_engine.training.language_models import create_language_model
from qsr_engine.training.task import Batch

_IGNORED = -1  # as a target


class TextTask:
    """Tokens [B, context], and those that follow them [B, context], both int64."""

    unit = "tokens"
    reached: tuple[str, ...] = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "best_loss", "best_step")

    def __init__(self, recipe: Recipe, index: Index) -> None:
        assert index.text is not None
        self._recipe, self.index, self._text = recipe, index, index.text
        self.units = index.text.context
        self._bytes_of_token = dtype_of(index.text.vocabulary).itemsize

    def create_model(self) -> nn.Module:
        return create_language_model(self._recipe.model, self._text)

    def files(self, model: nn.Module) -> dict[str, str]:
        """The configuration, so that transformers' from_pretrained() takes the run's folder."""
        config: Any = model.config
        return {"config.json": config.to_json_string()}

    def batch(self, loaded: ImageBatch) -> Batch:
        tokens = tokens_of(loaded.images, self._bytes_of_token)
        targets = tokens[:, 1:]
        return tokens[:, :-1], targets.masked_fill(loaded.labels[:, None] < 0, _IGNORED)

    def training_batch(self, loaded: ImageBatch) -> Batch:
        return self.batch(loaded)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return _cross_entropy(outputs, targets, label_smoothing=self._recipe.label_smoothing)

    def accuracy(self, outputs: Any, targets: Tensor) -> None:
        return None

    def totals(self, outputs: Any, targets: Tensor) -> Tensor:
        """Tokens, and their summed loss in nats."""
        return torch.stack([(targets >= 0).sum(), _cross_entropy(outputs, targets, reduction="sum")])

    def evaluation(self, totals: Sequence[float]) -> dict[str, float]:
        tokens, total = totals
        loss = total / max(1, tokens)
        per_token = self._text.bytes_per_token.get(self._recipe.data.eval, math.nan)
        return {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, _LARGEST)),
            "eval_bits_per_byte": loss / math.log(2) / per_token,
        }

    def best(self, evaluated: Mapping[str, float], before: Mapping[str, Any], step: int) -> Mapping[str, Any]:
        if not evaluated["eval_loss"] < before.get("best_loss", math.inf):
            return before
        return {"best_loss": evaluated["eval_loss"], "best_step": step}

    def blank(self, device: torch.device) -> ImageBatch:
        bytes_of_block = (self._text.context + 1) * self._bytes_of_token
        nothing = torch.zeros(1, bytes_of_block, dtype=torch.uint8, device=device)
        return ImageBatch(nothing, torch.tensor([-1], device=device))

    def random_batch(self, size: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(self._text.vocabulary, (size, self._text.context + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]


_LARGEST = 700.0  # nats, whose exponential a float holds


def tokens_of(content: Tensor, bytes_of_token: int) -> Tensor:
    """The tokens of blocks, int64 [B, tokens], from their bytes, uint8 [B, bytes]."""
    if bytes_of_token == 1:
        return content.long()
    kind, mask = {2: (torch.int16, 0xFFFF), 4: (torch.int32, 0xFFFFFFFF)}[bytes_of_token]  # unsigned in the file
    return content.contiguous().view(kind).long() & mask


def _cross_entropy(outputs: Any, targets: Tensor, **options: Any) -> Tensor:
    """Of the scores [B, context, vocabulary] in what a model of transformers gives."""
    scores = outputs.logits.float()
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, **options)
