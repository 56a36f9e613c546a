"""The two ViTs of the package, and weight decay without norms and biases."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.data import read_index
from qsr_engine.data.loader import TrainLoader
from qsr_engine.training.models import create_model
from qsr_engine.training.vit import sincos_positions
from tests.support import reference
from tests.support.launch import train
from tests.support.pool import Processes
from tests.support.recipes import normalised


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize(
    "engine",
    [[], ["precision.zero_stage=1"], ["precision.zero_stage=3"], ["engine=fsdp"]],
    ids=["deepspeed", "zero1", "zero3", "fsdp"],
)
def test_no_weight_decay_on_norms_and_biases(processes: Processes, recipe: Path, engine: list[str]) -> None:
    """Bit for bit what the simulation gives with the two groups; so the learning rate reaches both of them."""
    decay = ["optimizer.weight_decay=0.5", "optimizer.gradient_clipping=0"]
    run = train(processes, recipe, *decay, *engine, "optimizer.decay_norms_and_biases=false")
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    streams = [
        TrainLoader(resolved.data.shards, index, resolved.data, rank=rank, ranks=2, batch_size=48, seed=0).batches()
        for rank in range(2)
    ]

    def make_model() -> torch.nn.Module:
        torch.manual_seed(0)
        return create_model(resolved.model, index.class_count, resolved.data.image_size)

    def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        names = [name for name, _ in make_model().named_parameters()]
        alone = [number for number, name in enumerate(names) if "norm" in name or name.endswith("bias")]
        groups = [
            {"params": [p for number, p in enumerate(parameters) if number not in alone], "weight_decay": 0.5},
            {"params": [parameters[number] for number in alone], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0)

    models, _ = reference.simulate(
        make_model,
        make_optimizer,
        lambda worker, step: [normalised(next(streams[worker]))],
        resolved.qsr.model_dump(exclude_none=True),
        workers=2,
        clip=0.0,
        loss=torch.nn.functional.cross_entropy,
    )
    found = load_file(run / "model.safetensors")
    for name, value in models[0].state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "engine",
    [
        ["precision.zero_stage=1"],
        pytest.param(["precision.zero_stage=3", "qsr.worker_size=2"], marks=pytest.mark.slow),
        pytest.param(["engine=fsdp"], marks=pytest.mark.slow),
        ["engine=fsdp", "qsr.worker_size=2"],
    ],
    ids=["zero1", "zero3", "fsdp-one-rank", "fsdp"],
)
def test_the_vits_train_in_bf16(processes: Processes, recipe: Path, engine: list[str]) -> None:
    """The plain one, and the authors' where a worker of two ranks shards it by blocks."""
    plain = "qsr.worker_size=2" not in engine
    kwargs = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}"
    model = f"model={{name: qsr/{'vit_base_patch16_sincos' if plain else 'simple_vit_b16'}, kwargs: {kwargs}}}"
    run = train(processes, recipe, model, "precision.dtype=bf16", *engine, "logging.eval_every=7")
    saved = load_file(run / "model.safetensors")
    if plain:
        assert torch.equal(saved["pos_embed"], sincos_positions(2, 2, 16)), "neither trained nor rounded"
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def meta_job() -> dict[str, torch.Tensor]:
    from qsr_engine import initialize_fsdp
    from qsr_engine.training.vit import PlainViT, fill

    torch.manual_seed(int(os.environ["RANK"]))
    with torch.device("meta"):
        model = PlainViT(img_size=8, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    lr = {"schedule": "constant", "peak": 1e-3}
    engine = initialize_fsdp(
        model=model,
        optimizer=torch.optim.AdamW,
        init=fill,
        config={
            "train_batch_size": 4,
            "bf16": {"enabled": True},
            "qsr": {"strategy": "constant", "h_base": 1, "total_steps": 2, "worker_size": 2, "lr": lr},
        },
    )
    begun = engine.averaged_state_dict()
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 3, 8, 8)).float().square().mean())
        engine.step()
    trained = engine.averaged_state_dict()
    return {"begun": begun["blocks.1.mlp.fc1.weight"].std(), **trained} if begun else {}


def test_the_plain_vit_is_made_block_by_block(processes: Processes) -> None:
    state, _ = processes.run(meta_job)
    assert torch.equal(state["pos_embed"], sincos_positions(2, 2, 64))
    assert state["begun"].item() == pytest.approx(0.02, rel=0.1), "as timm begins"
    assert all(bool(value.isfinite().all()) for value in state.values())
