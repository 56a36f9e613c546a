"""Which parts of real models are found to be their blocks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.fsdp.blocks import find_blocks


def make(name: str) -> nn.Module:
    """A model of timm or torchvision on the meta device, which takes no memory."""
    library, _, model = name.partition("/")
    with torch.device("meta"):
        made: nn.Module = (
            timm.create_model(model) if library == "timm" else torchvision.models.get_model(model, weights=None)
        )
        return made


def names(model: nn.Module, wrap: Any = None) -> list[str]:
    by_module = {module: name for name, module in model.named_modules()}
    return [by_module[block] for block in find_blocks(model, wrap)]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("timm/vit_tiny_patch16_224", [f"blocks.{number}" for number in range(12)]),
        ("torchvision/vit_b_16", [f"encoder.layers.encoder_layer_{number}" for number in range(12)]),
        ("timm/resnet50", [f"layer{number}" for number in (1, 2, 3, 4)]),
        ("torchvision/resnet152", [f"layer{number}" for number in (1, 2, 3, 4)]),
        ("timm/convnext_atto", [f"stages.{number}" for number in range(4)]),
        ("timm/swin_tiny_patch4_window7_224", [f"layers.{number}" for number in range(4)]),
        ("timm/regnetx_002", [f"s{number}" for number in (1, 2, 3, 4)]),
        ("torchvision/densenet121", [f"features.denseblock{number}" for number in (1, 2, 3, 4)]),
        ("torchvision/vgg11", ["features", "classifier"]),
    ],
)
def test_blocks_of_real_models(name: str, blocks: list[str]) -> None:
    assert names(make(name)) == blocks


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Sequential(nn.Linear(width, width)))


def test_inner_blocks_come_first() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(block(2), block(2))})
    assert names(model, nn.Sequential) == ["body.0.1", "body.1.1", "body.0", "body.1", "body"]


def test_a_block_that_shares_a_weight_with_another_is_none() -> None:
    """Each would be sharded by itself, and the weight would fall apart into two."""
    body = nn.Sequential(block(2), block(2), block(2))
    body[2][0].weight = body[0][0].weight  # type: ignore[index]
    assert names(nn.Sequential(body)) == ["0.1"]


def test_a_weight_shared_inside_a_block_is_its_own_affair() -> None:
    body = nn.Sequential(block(2), block(2))
    body[0][1][0].weight = body[0][0].weight  # type: ignore[index]
    assert names(nn.Sequential(body)) == ["0.0", "0.1"]


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        ([nn.Conv2d], "wrap chooses no module of the Sequential"),
        ([nn.ModuleList], "wrap chooses a ModuleList, which has no forward of its own"),
        (lambda module: False, "wrap chooses no module"),
    ],
)
def test_a_wrap_that_cannot_be_is_refused(wrap: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_blocks(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), wrap)
