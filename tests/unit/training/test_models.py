"""Models by name: sizes, the paper's ViT-B, and what the optimizer decays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from qsr_engine.config.recipe import ModelConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.fsdp.blocks import find_blocks
from qsr_engine.training.models import create_model, loss_of
from qsr_engine.training.optimizer import without_decay_of_norms_and_biases
from qsr_engine.training.simple_vit import SimpleViT
from qsr_engine.training.vit import FixedPositions, PlainViT, fill, sincos_positions

SMALL: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
PLAIN, SIMPLE = "qsr/vit_base_patch16_sincos", "qsr/simple_vit_b16"


@pytest.mark.parametrize(
    ("name", "trained", "fixed"),
    [
        ("torchvision/resnet50", 25_557_032, 0),
        ("torchvision/resnet152", 60_192_808, 0),
        ("timm/vit_base_patch16_224", 86_567_656, 0),  # with a class token and positions that are trained
        (PLAIN, 86_415_592, 196 * 768),  # 86.6 M together
        (SIMPLE, 86_381_800, 196 * 768),  # patches 593,664, 12 blocks of 7,084,800, norm and head 770,536
    ],
)
def test_number_of_parameters(name: str, trained: int, fixed: int) -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(name=name), 1000, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == trained
    positions = [buffer for name, buffer in model.named_buffers() if name == "pos_embed"]
    assert sum(buffer.numel() for buffer in positions) == fixed


@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 8), (3, 2, 12), (14, 3, 96)])
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
    model: Any = PlainViT(**SMALL, num_classes=7).train()
    images = torch.randn(2, 3, 24, 24)
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


def test_the_authors_vit_is_what_it_says() -> None:
    """Scores in fp64 beside a slow version, number by number, that takes the state by vit-pytorch's names."""
    torch.manual_seed(0)
    model = SimpleViT(**SMALL, head_dim=6, num_classes=7)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # norms and biases that tell where they are
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    found = model.double()(images.to(memory_format=torch.channels_last))
    expected = torch.stack([simple_vit_scores(image, model.state_dict(), heads=4) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"img_size is 24, and the images are \(8, 8\)"):
        model(images[:, :, :8, :8])


def simple_vit_scores(image: Tensor, state: dict[str, Tensor], heads: int) -> Tensor:
    """Scores [classes] of an image [3, 24, 24] in patches of 8; each name of the state is used once a call."""
    unused = set(state)

    def get(name: str) -> Tensor:
        unused.discard(name)
        return state[name]

    def norm(vector: Tensor, name: str) -> Tensor:
        centred = vector - vector.sum() / len(vector)
        spread = ((centred**2).sum() / len(vector) + 1e-5).sqrt()
        return centred / spread * get(f"{name}.weight") + get(f"{name}.bias")

    def linear(vector: Tensor, name: str) -> Tensor:
        return (get(f"{name}.weight") * vector).sum(1) + get(f"{name}.bias")

    positions, tokens = sincos_positions(3, 3, 32)[0].double(), []
    for place in range(9):
        top, left = 8 * (place // 3), 8 * (place % 3)
        colours = [image[colour, top + y, left + x] for y in range(8) for x in range(8) for colour in range(3)]
        pixels = norm(torch.stack(colours), "to_patch_embedding.1")
        tokens.append(norm(linear(pixels, "to_patch_embedding.2"), "to_patch_embedding.3") + positions[place])
    for number in range(2):
        attention, forward = f"transformer.layers.{number}.0", f"transformer.layers.{number}.1.net"
        projected = [(get(f"{attention}.to_qkv.weight") * norm(token, f"{attention}.norm")).sum(1) for token in tokens]
        queries, keys, values = torch.stack(projected).chunk(3, dim=1)
        size = queries.shape[1] // heads
        seen = []
        for place in range(9):
            parts: list[Tensor] = []
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                weights = torch.stack([(queries[place, own] * keys[n, own]).sum() / size**0.5 for n in range(9)]).exp()
                parts.append((weights[:, None] * values[:, own]).sum(0) / weights.sum())
            seen.append((get(f"{attention}.to_out.weight") * torch.cat(parts)).sum(1))
        tokens = [token + added for token, added in zip(tokens, seen, strict=True)]
        for place, token in enumerate(tokens):
            hidden = linear(norm(token, f"{forward}.0"), f"{forward}.1")
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            tokens[place] = token + linear(hidden, f"{forward}.3")
    scores = linear(norm(sum(tokens, torch.zeros(32)) / 9, "linear_head.0"), "linear_head.1")
    assert not unused
    return scores


def test_the_authors_vit_begins_as_torch_does() -> None:
    torch.manual_seed(0)
    for name, module in SimpleViT(**SMALL, num_classes=50).named_modules():
        if isinstance(module, nn.Linear):
            limit = module.in_features**-0.5  # uniform up to it
            assert module.weight.abs().max().item() <= limit, name
            assert module.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05), name
            assert module.bias is None or 0.8 * limit < module.bias.abs().max().item() <= limit, name
        elif isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()


def test_the_authors_vit_is_made_of_blocks_for_fsdp() -> None:
    model = SimpleViT(**SMALL, num_classes=7)
    assert find_blocks(model) == list(model.transformer.layers)


@pytest.mark.parametrize("kind", [PlainViT, SimpleViT])
def test_positions_are_neither_trained_nor_rounded(kind: Callable[..., FixedPositions]) -> None:
    model = kind(**SMALL, num_classes=7)
    assert "pos_embed" not in dict(model.named_parameters())
    assert ("pos_embed" in model.state_dict()) == (kind is PlainViT), "vit-pytorch's state has none"
    low = model.to(torch.bfloat16)
    assert low(torch.randn(1, 3, 24, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.equal(low.pos_embed, sincos_positions(3, 3, 32))
    assert torch.equal(low.float().pos_embed, sincos_positions(3, 3, 32))


@pytest.mark.parametrize("kind", [PlainViT, SimpleViT])
def test_a_model_on_the_meta_device_is_filled(kind: Callable[..., FixedPositions]) -> None:
    with torch.device("meta"):
        model: Any = kind(**SMALL, num_classes=7)
    assert model.pos_embed.is_meta
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(math.nan)
    for module in model.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            fill(module) if kind is PlainViT else module.reset_parameters()
    assert torch.equal(model.pos_embed, sincos_positions(3, 3, 32))
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    if kind is PlainViT:
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
        ({"name": PLAIN, "kwargs": {"num_classes": 9}}, "num_classes is 9, and the data has 10 classes"),
        ({"name": PLAIN, "kwargs": {"num_classes": "many"}}, "num_classes is 'many'; write a whole number"),
        ({"name": PLAIN}, "does not take images of shape (1, 3, 24, 24)"),
        ({"name": SIMPLE}, "img_size is 224, and the images are (24, 24)"),
        ({"name": SIMPLE, "kwargs": {"patch_size": 0}}, "patch_size is 0; write a number above 0"),
        ({"name": SIMPLE, "kwargs": {"num_heads": 0}}, "num_heads is 0; write a number above 0"),
        ({"name": SIMPLE, "kwargs": {"img_size": 25}}, "img_size is 25, which patches of 16 pixels do not fill"),
    ],
)
def test_models_that_cannot_be_made(model: dict[str, Any], words: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        create_model(ModelConfig(**model), 10, 24)
    assert words in str(caught.value)


def test_auxiliary_classifiers_take_part_in_the_loss() -> None:
    """GoogLeNet gives a tuple in training: the scores, and those of two classifiers inside it."""
    torch.manual_seed(0)
    config = ModelConfig(name="torchvision/googlenet", kwargs={"num_classes": 12, "init_weights": False})
    model = create_model(config, 10, 32)
    assert all(torch.isin(b.float(), torch.tensor([0.0, 1.0])).all() for b in model.buffers()), "fresh batch norm"
    labels = torch.tensor([3, 9])
    outputs = model(torch.randn(2, 3, 32, 32))
    expected = sum(
        weight * nn.functional.cross_entropy(part, labels, label_smoothing=0.1)
        for weight, part in zip((1, 0.3, 0.3), outputs, strict=True)
    )
    loss = loss_of(outputs, labels, 0.1)
    torch.testing.assert_close(loss, expected)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(loss_of(outputs[0], labels), nn.functional.cross_entropy(outputs[0], labels))
    assert torch.equal(loss_of((outputs[0], None), labels), loss_of(outputs[0], labels))


def test_what_a_model_does_in_training_is_tried_before_training() -> None:
    """Inception's auxiliary classifier needs larger images than the rest of it."""
    with torch.device("meta"), pytest.raises(ConfigError, match=r"images of shape \(2, 3, 96, 96\) in training"):
        create_model(ModelConfig(name="torchvision/inception_v3", kwargs={"init_weights": False}), 10, 96)


def test_channels_last() -> None:
    for last in (False, True):
        with torch.device("meta"):
            model = create_model(ModelConfig(name="torchvision/resnet18", channels_last=last), 10, 64)
        kernels = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] > 1]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) == last for kernel in kernels)


@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "timm/vit_tiny_patch16_224", PLAIN, SIMPLE, "timm/convnext_atto"]
)
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
