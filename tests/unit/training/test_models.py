"""Models by name: sizes, the paper's ViT-B, and what the optimizer decays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from qsr_engine.config.recipe import ModelConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.training.from_recipe import without_decay_of_norms_and_biases
from qsr_engine.training.models import create_model
from qsr_engine.training.vit import PlainViT, fill, sincos_positions

SMALL: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
PLAIN = "qsr/vit_base_patch16_sincos"


@pytest.mark.parametrize(
    ("name", "trained", "fixed"),
    [
        ("torchvision/resnet50", 25_557_032, 0),
        ("torchvision/resnet152", 60_192_808, 0),
        ("timm/vit_base_patch16_224", 86_567_656, 0),  # with a class token and positions that are trained
        (PLAIN, 86_415_592, 196 * 768),  # 86.6 M together
    ],
)
def test_number_of_parameters(name: str, trained: int, fixed: int) -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(name=name), 1000, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == trained
    positions = [buffer for name, buffer in model.named_buffers() if name == "pos_embed"]
    assert sum(buffer.numel() for buffer in positions) == fixed


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 8), (3, 2, 12), (14, 14, 768)])
def test_positions_are_those_of_the_formula(rows: int, columns: int, width: int) -> None:
    """Number by number, from the formula as big_vision has it; to half of the last bit of fp32."""
    found = sincos_positions(rows, columns, width)
    assert found.shape == (1, rows * columns, width)
    assert found.dtype == torch.float32
    quarter = width // 4
    for place in range(rows * columns):
        y, x = divmod(place, columns)
        expected = [
            wave(position / 10_000 ** (number / (quarter - 1)))
            for position, wave in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos))
            for number in range(quarter)
        ]
        assert found[0, place].tolist() == pytest.approx(expected, abs=2**-24)


def test_the_plain_vit_is_what_it_says() -> None:
    """Patches, fixed positions, blocks, the norm, the mean over all tokens, one linear layer; written out."""
    torch.manual_seed(0)
    model, images = PlainViT(**SMALL, num_classes=7).train(), torch.randn(2, 3, 24, 24)
    weights = model.patch_embed.proj
    tokens = torch.stack(
        [
            (images[:, None, :, row : row + 8, column : column + 8] * weights.weight).sum((2, 3, 4)) + weights.bias
            for row in (0, 8, 16)
            for column in (0, 8, 16)
        ],
        dim=1,
    )
    tokens = tokens + sincos_positions(3, 3, 32)
    for block in model.blocks:
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    expected = model.head(model.norm(tokens).mean(1))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)  # convolutions add in another order
    assert torch.equal(model(images), model(images)), "no dropout"


def test_its_state_fits_timms_own() -> None:
    torch.manual_seed(0)
    model, images = PlainViT(**SMALL, num_classes=7), torch.randn(2, 3, 24, 24)
    other = timm.create_model(
        "vit_base_patch16_224", **SMALL, num_classes=7, class_token=False, global_pool="avg", fc_norm=False
    )
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


def test_it_begins_as_timms_own_does() -> None:
    torch.manual_seed(0)
    model = PlainViT(**SMALL, num_classes=7)
    torch.manual_seed(0)
    other = VisionTransformer(**SMALL, num_classes=7, class_token=False, global_pool="avg", pos_embed="none")
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name.replace("norm.", "fc_norm.") if name[:4] == "norm" else name])


def test_positions_are_neither_trained_nor_rounded() -> None:
    model = PlainViT(**SMALL, num_classes=7)
    assert "pos_embed" not in dict(model.named_parameters())
    assert "pos_embed" in model.state_dict()
    low = model.to(torch.bfloat16)
    assert low(torch.randn(1, 3, 24, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(low.pos_embed, sincos_positions(3, 3, 32))
    assert torch.equal(low.float().pos_embed, sincos_positions(3, 3, 32))


def test_a_model_on_the_meta_device_is_filled() -> None:
    with torch.device("meta"):
        model = PlainViT(**SMALL, num_classes=7)
    assert model.pos_embed.is_meta
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan)
    for module in model.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            fill(module)
    assert torch.equal(model.pos_embed, sincos_positions(3, 3, 32))
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    spread = model.blocks[0].mlp.fc1.weight.std().item()
    assert spread == pytest.approx(0.02, rel=0.1), "timm's, where torch's own would be 0.1"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "qsr/vit_base_patch16"}, "did you mean qsr/vit_base_patch16_sincos"),
        (
            {"name": PLAIN, "kwargs": {"embed_dim": 30, "num_heads": 3}},
            "embed_dim is 30; sin-cos positions need a multiple of 4",
        ),
        ({"name": PLAIN, "kwargs": {"embed_dim": 4, "num_heads": 1}}, "from 8 on"),
        ({"name": PLAIN, "kwargs": {"class_token": True}}, "unexpected keyword argument 'class_token'"),
        ({"name": PLAIN}, "does not take images of shape (1, 3, 24, 24)"),
    ],
)
def test_models_that_cannot_be_made(model: dict[str, Any], words: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        create_model(ModelConfig(**model), 10, 24)
    assert words in str(caught.value)


def test_channels_last() -> None:
    for last in (False, True):
        with torch.device("meta"):
            model = create_model(ModelConfig(name="torchvision/resnet18", channels_last=last), 10, 64)
        kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] > 1]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) == last for kernel in kernels)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/vit_tiny_patch16_224", PLAIN, "timm/convnext_atto"])
def test_norms_and_biases_are_those_that_timm_leaves_out(name: str) -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(name=name), 10, 224)
    found = without_decay_of_norms_and_biases(model.parameters())
    expected = param_groups_weight_decay(model, weight_decay=0.1)

    def sets(groups: list[dict[str, Any]]) -> dict[bool, set[int]]:
        return {group.get("weight_decay") == 0: {id(p) for p in group["params"]} for group in groups}

    assert sets(found) == sets(expected)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    assert all(id(norm.weight) in sets(found)[True] for norm in norms)


def test_a_group_that_would_be_empty_is_left_out() -> None:
    def numbers(parameters: list[Tensor]) -> list[int]:
        return [len(group["params"]) for group in without_decay_of_norms_and_biases(map(nn.Parameter, parameters))]

    assert numbers([torch.zeros(2, 2)]) == [1]
    assert numbers([torch.zeros(2), torch.zeros(3)]) == [2]
