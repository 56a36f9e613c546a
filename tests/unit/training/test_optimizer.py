"""The local optimizer of a recipe: Muon's part of the parameters, and AdamW's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsr_engine.config.recipe import ModelConfig, Recipe
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data.index import TextData
from qsr_engine.engines.muon import MuonWithAdamW
from qsr_engine.planning.sizes import model_size
from qsr_engine.training.language_models import create_language_model
from qsr_engine.training.models import create_model
from qsr_engine.training.optimizer import hidden_matrices, make_optimizer
from tests.support.text import CONTEXT, text_recipe

MUON = ["engine=fsdp", "optimizer={type: Muon, momentum: 0.9, betas: [0.8, 0.95], eps: 1.0e-7, weight_decay: 0.05}"]
TEXT = TextData(context=CONTEXT, vocabulary=256, end=0, bytes_per_token={})
LLAMA = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def make(name: str, kwargs: dict[str, Any]) -> nn.Module:
    if name.startswith("transformers/"):
        return create_language_model(ModelConfig(name=name, kwargs=kwargs), TEXT)
    with torch.device("meta"):
        return create_model(ModelConfig(name=name, kwargs=kwargs), 10, 224)


@pytest.mark.parametrize(
    ("name", "kwargs", "left_out", "count"),
    [
        # Its head is the embedding; queries, keys and values are one matrix of 2-d weights in a layer of its own.
        ("transformers/gpt2", {"n_layer": 3, "n_embd": 8, "n_head": 2}, ["wte.weight", "wpe.weight"], 3 * 4),
        ("transformers/llama", LLAMA, ["embed_tokens.weight", "lm_head.weight"], 7),
        ("qsr/simple_vit_b16", {}, ["linear_head.1.weight"], 12 * 4 + 1),
        ("torchvision/vit_b_16", {}, ["heads.head.weight"], 12 * 4),
        ("timm/swin_tiny_patch4_window7_224", {}, [*["relative_position_bias_table"] * 12, "head.fc.weight"], 51),
        ("timm/resnet18", {}, ["fc.weight"], 0),
    ],
)
def test_muon_takes_the_matrices_of_hidden_layers(
    name: str, kwargs: dict[str, Any], left_out: list[str], count: int
) -> None:
    model = make(name, kwargs)
    found = hidden_matrices(model)
    named = dict(model.named_parameters())
    others = [name for name, parameter in named.items() if id(parameter) not in found and parameter.ndim == 2]
    assert [name.endswith(end) for name, end in zip(others, left_out, strict=True)] == [True] * len(left_out)
    assert len(found) == count
    assert all(parameter.ndim == 2 for parameter in named.values() if id(parameter) in found)


def of_gpt(tmp_path: Path, *overrides: str) -> tuple[Recipe, nn.Module]:
    recipe = load_recipe(text_recipe(tmp_path, tmp_path), [*MUON, *overrides])
    return recipe, create_language_model(recipe.model, TEXT)


@pytest.mark.parametrize("decay", [True, False])
def test_the_recipes_options_reach_both_optimizers(tmp_path: Path, decay: bool) -> None:
    recipe, model = of_gpt(tmp_path, f"optimizer.decay_norms_and_biases={str(decay).lower()}")
    optimizer = make_optimizer(recipe, model, model.parameters())
    assert isinstance(optimizer, MuonWithAdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: dict[str, Any] = {}
    for group in optimizer.param_groups:
        own = {"momentum": 0.9} if group["muon"] else {"betas": (0.8, 0.95), "eps": 1e-7}
        assert {key: group[key] for key in own} == own
        assert group["lr"] == recipe.qsr.lr.peak
        seen |= {names[id(parameter)]: (group["muon"], group["weight_decay"]) for parameter in group["params"]}
    assert seen == {
        name: (parameter.ndim == 2 and ".h." in name, 0.05 if decay or parameter.ndim > 1 else 0.0)
        for name, parameter in model.named_parameters()
    }


def test_a_frozen_matrix_is_left_alone(tmp_path: Path) -> None:
    recipe, model = of_gpt(tmp_path)
    frozen = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    frozen.requires_grad = False
    optimizer = make_optimizer(recipe, model, [p for p in model.parameters() if p.requires_grad])
    assert not any(parameter is frozen for group in optimizer.param_groups for parameter in group["params"])


def test_a_plan_sees_the_same_groups(tmp_path: Path) -> None:
    """In whose order parameters lie in buckets: Muon's first."""
    recipe, model = of_gpt(tmp_path)
    groups = make_optimizer(recipe, model, model.parameters()).param_groups
    size, _ = model_size(recipe)
    assert size.shapes == tuple(tuple(tuple(parameter.shape) for parameter in group["params"]) for group in groups)


def test_a_model_of_convolutions_is_refused(tmp_path: Path) -> None:
    recipe, model = of_gpt(tmp_path)[0], make("timm/resnet18", {})
    with pytest.raises(ConfigError, match=r"optimizer.type is 'Muon', and .* has no matrix for it.*write AdamW or SGD"):
        make_optimizer(recipe, model, model.parameters())
