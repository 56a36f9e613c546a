"""Models by name, with random initial parameters: timm's, torchvision's, and two ViT-B/16 of the package's own.

`qsr/simple_vit_b16` is that of the paper's authors (simple_vit.py), `qsr/vit_base_patch16_sincos` that of Beyer et al.
(vit.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_engine.config.recipe import ModelConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.training.simple_vit import SimpleViT
from qsr_engine.training.vit import PlainViT

_OWN: dict[str, Callable[..., nn.Module]] = {"vit_base_patch16_sincos": PlainViT, "simple_vit_b16": SimpleViT}
_NAMES: dict[str, Callable[[], list[str]]] = {
    "timm": timm.list_models,
    "torchvision": lambda: torchvision.models.list_models(torchvision.models),
    "qsr": lambda: list(_OWN),
}


def create_model(config: ModelConfig, classes: int | None, image_size: int) -> nn.Module:
    """Make the model of a recipe.

    Args:
        classes: number of classes of the data, or None where it is not known; `kwargs.num_classes` goes before it.
        image_size: S; the model must turn images of shape [B, 3, S, S] into scores of shape [B, classes].
    Raises:
        ConfigError: no model has this name, it does not take these arguments, or it does not take such images.
    """
    library, _, name = config.name.partition("/")
    known = _NAMES[library]()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(f'{library}/{match}' for match in near)}?" if near else ""
        raise ConfigError(f"model.name: {library} has no model {name!r}{hint}")
    kwargs = {**config.kwargs, "num_classes": scores_of(config, classes)}
    try:
        model = _make(library, name, kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model.kwargs: {config.name} does not take {kwargs}: {error}") from error
    _check_shapes(model, config, kwargs["num_classes"], image_size)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def usual_image_size(name: str) -> int:
    """Width and height in pixels of what a model is made for, where its library says it; else 224."""
    library, _, name = name.partition("/")
    if library == "timm" and (found := timm.get_pretrained_cfg(name)) is not None and found.input_size:
        return int(found.input_size[-1])
    return 224


def scores_of(config: ModelConfig, classes: int | None) -> int:
    """How many scores the model gives for an image, which may be more than the data has classes.

    Args:
        classes: as for create_model().
    Raises:
        ConfigError: model.kwargs.num_classes is missing, too small or no number.
    """
    scores = config.kwargs.get("num_classes", classes)
    if scores is None:
        raise ConfigError("model.kwargs.num_classes is missing, and the data's index.json names no classes; write it")
    if isinstance(scores, bool) or not isinstance(scores, int) or scores < 1:
        raise ConfigError(f"model.kwargs.num_classes is {scores!r}; write a whole number of at least 1")
    if classes is not None and scores < classes:
        raise ConfigError(f"model.kwargs.num_classes is {scores}, and the data has {classes} classes; leave it out")
    return scores


AUXILIARY = 0.3  # share of an auxiliary classifier's loss (Szegedy et al., arXiv 1409.4842, Section 5)


def loss_of(outputs: Any, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of what a model gives in training.

    Args:
        outputs: scores [B, classes], or a tuple of them and those of auxiliary classifiers (GoogLeNet, Inception), of
            which the one or the other may be None; their losses are added with a weight of 0.3.
        labels: [B], or shares of classes [B, classes].
    """
    scores, *others = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = F.cross_entropy(scores.float(), labels, label_smoothing=label_smoothing)
    for other in others:
        if other is not None:
            loss = loss + AUXILIARY * F.cross_entropy(other.float(), labels, label_smoothing=label_smoothing)
    return loss


def _make(library: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    model: nn.Module
    if library == "timm":
        model = timm.create_model(name, pretrained=False, **kwargs)
    elif library == "torchvision":
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    else:
        model = _OWN[name](**kwargs)
    return model


@torch.no_grad()
def _check_shapes(model: nn.Module, config: ModelConfig, classes: int, image_size: int) -> None:
    shape = (1, 3, image_size, image_size)
    model.eval()
    scores = _outputs(model, config, shape)
    if not _are_scores(scores, (1, classes)):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(f"model.name: {config.name} gives {found} for one image; needed are scores of (1, {classes})")
    model.train()
    outputs = _in_training(model, config, (2, *shape[1:]))
    if not all(_are_scores(part, (2, classes)) for part in outputs if part is not None) or outputs[0] is None:
        parts = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in outputs]
        raise ConfigError(
            f"model.name: {config.name} gives {parts} for two images in training; needed are scores of (2, {classes}), "
            "or a tuple of such scores"
        )


def _outputs(model: nn.Module, config: ModelConfig, shape: tuple[int, ...], when: str = "") -> Any:
    try:
        return model(torch.zeros(shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"data.image_size is {shape[-1]}, and {config.name} with model.kwargs {config.kwargs} does not take "
            f"images of shape {shape}{when}: {error}"
        ) from error


def _are_scores(output: Any, shape: tuple[int, int]) -> bool:
    return isinstance(output, Tensor) and output.shape == shape


def _in_training(model: nn.Module, config: ModelConfig, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """What it gives in training, as a tuple; buffers (batch norm) and the random state stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        outputs = _outputs(model, config, shape, " in training")
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
    return outputs if isinstance(outputs, tuple) else (outputs,)
