"""The local optimizer that a recipe names, and which of the model's parameters it takes how."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qsr_engine.config.recipe import Recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.muon import MuonWithAdamW


def make_optimizer(recipe: Recipe, model: nn.Module, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The local optimizer of every worker; the engine sets the learning rate of all its groups alike.

    Args:
        parameters: the model's, as the engine trains them.
    Raises:
        ConfigError: as parameter_groups().
    """
    options, groups = recipe.optimizer, parameter_groups(recipe, model, parameters)
    common: dict[str, Any] = {"lr": recipe.qsr.lr.peak, "weight_decay": options.weight_decay}
    betas = (options.betas[0], options.betas[1])
    if options.type == "SGD":
        return torch.optim.SGD(groups, **common, momentum=options.momentum, nesterov=options.nesterov)
    if options.type == "Muon":
        return MuonWithAdamW(groups, **common, momentum=options.momentum, betas=betas, eps=options.eps)
    return torch.optim.AdamW(groups, **common, betas=betas, eps=options.eps)


def parameter_groups(recipe: Recipe, model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's groups, those that would be empty left out.

    Of Muon the matrices of hidden layers (`"muon": True`) come first, and AdamW takes what follows.

    Raises:
        ConfigError: the optimizer is Muon, and the model has no matrix for it.
    """
    options, given = recipe.optimizer, list(parameters)
    groups: list[dict[str, Any]] = [{"params": given}]
    if options.type == "Muon":
        to_muon = hidden_matrices(model)
        if not any(id(parameter) in to_muon for parameter in given):
            raise ConfigError(
                f"optimizer.type is 'Muon', and {recipe.model.name} has no matrix for it: Muon takes the weights of "
                "linear layers but for the last, and no kernel of a convolution; write AdamW or SGD"
            )
        groups = [
            {"params": [parameter for parameter in given if id(parameter) in to_muon], "muon": True},
            {"params": [parameter for parameter in given if id(parameter) not in to_muon], "muon": False},
        ]
    if not options.decay_norms_and_biases:
        groups = [{**group, **part} for group in groups for part in without_decay_of_norms_and_biases(group["params"])]
    return [group for group in groups if group["params"]]


def without_decay_of_norms_and_biases(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Two parameter groups: the optimizer's weight decay for matrices and kernels, none for what has one dimension.

    timm's rule too (its `param_groups_weight_decay`): norms, biases and layer scales have one dimension, and nothing
    else has in the models of timm and torchvision. A group that would be empty is left out.
    """
    given = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in given if parameter.ndim > 1]},
        {"params": [parameter for parameter in given if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def hidden_matrices(model: nn.Module) -> set[int]:
    """The id of each parameter that Muon is for: a matrix called weight, but of no embedding and not of the last layer.

    The last layer is the model's last `nn.Linear`, which gives the scores of classes or tokens; where an embedding
    shares its matrix, that is an embedding's. A table of position biases (Swin) is called otherwise, and left out.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    others = [module for module in model.modules() if isinstance(module, nn.Embedding)] + linear[-1:]
    not_hidden = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    matrices = {
        id(parameter) for name, parameter in model.named_parameters() if parameter.ndim == 2 and name.endswith("weight")
    }
    return matrices - not_hidden
