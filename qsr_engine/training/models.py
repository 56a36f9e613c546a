"""Models by name, with random initial parameters: timm's, torchvision's, and `qsr/vit_base_patch16_sincos` (vit.py)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from qsr_engine.config.recipe import ModelConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.training.vit import PlainViT

_OWN = {"vit_base_patch16_sincos": PlainViT}
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
    kwargs = dict(config.kwargs)
    if classes is not None:
        kwargs.setdefault("num_classes", classes)
    if classes is not None and kwargs["num_classes"] < classes:
        raise ConfigError(
            f"model.kwargs.num_classes is {kwargs['num_classes']}, and the data has {classes} classes; leave it out"
        )
    if "num_classes" not in kwargs:
        raise ConfigError("model.kwargs.num_classes is missing, and the data's index.json names no classes; write it")
    try:
        model = _make(library, name, kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"model.kwargs: {config.name} does not take {kwargs}: {error}") from error
    _check_shapes(model, config, kwargs["num_classes"], image_size)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


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
    try:
        scores = model(torch.zeros(shape))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"data.image_size is {image_size}, and {config.name} with model.kwargs {config.kwargs} does not take "
            f"images of shape {shape}: {error}"
        ) from error
    if not isinstance(scores, torch.Tensor) or scores.shape != (1, classes):
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ConfigError(f"model.name: {config.name} gives {found} for one image; needed are scores of (1, {classes})")
    model.train()
