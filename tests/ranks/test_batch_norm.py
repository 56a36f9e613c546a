"""Batch norm in `qsr train`: statistics are estimated anew for an evaluation, and training is left alone."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.data import read_index
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.order import seed_for
from qsr_engine.training.models import create_model
from tests.support.launch import interrupted_job, qsr_job, train
from tests.support.pool import Processes
from tests.support.recipes import normalised

NORMED = [
    "model={name: timm/test_resnet, kwargs: {drop_rate: 0.2}}",
    "data.image_size=16",
    "batch.train_batch_size=32",
    "batch_norm={batches: 5, batch_size: 8}",
    "qsr.strategy=constant",
    "qsr.total_steps=6",
]


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def batch_statistics(run: Path, state: dict[str, torch.Tensor], step: int, ranks: int) -> dict[str, torch.Tensor]:
    """Mean and unbiased variance of what every batch norm reads, by hand: the mean over three batches and all ranks."""
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    model = create_model(resolved.model, index.class_count, resolved.data.image_size)
    model.load_state_dict(state)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, inputs: torch.Tensor) -> None:
        seen.setdefault(f"{name}.running_mean", []).append(inputs.mean((0, 2, 3)))
        seen.setdefault(f"{name}.running_var", []).append(inputs.var((0, 2, 3), unbiased=True))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))
    seed = seed_for("batch norm", resolved.seed, step)
    for rank in range(ranks):
        loader = TrainLoader(
            resolved.data.shards, index, resolved.data, rank=rank, ranks=ranks, batch_size=8, seed=seed
        )
        for batch in islice(loader.batches(), 3):  # 5 batches do not divide by 2 ranks
            with torch.no_grad():
                model.train()(normalised(batch)[0])
    return {name: torch.stack(values).mean(0) for name, values in seen.items()}


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize(
    "engine",
    [
        [],
        ["precision.zero_stage=3", "qsr.worker_size=2"],
        ["engine=fsdp", "qsr.worker_size=2"],
        ["engine=fsdp", "model.channels_last=true"],
    ],
    ids=["deepspeed", "zero3", "fsdp", "fsdp-one-rank"],
)
def test_batch_norm_is_estimated_anew_and_training_is_left_alone(
    processes: Processes, recipe: Path, engine: list[str]
) -> None:
    """Evaluated at every boundary with the block, and at the end only without it: the same parameters, also with
    dropout, which draws random numbers in training and while statistics are estimated."""
    run = train(processes, recipe, *NORMED, *engine, "logging.eval_every=1")
    without = train(processes, recipe, *NORMED, *engine, "batch_norm=null", "logging.eval_every=6")
    model, plain = (load_file(run / "model.safetensors") for run in (run, without))
    assert all(torch.equal(model[name], plain[name]) for name in model if not is_statistic(name))
    expected = batch_statistics(run, model, step=6, ranks=2)
    assert {*expected} == {name for name in model if is_statistic(name) and "tracked" not in name}
    for name, value in expected.items():
        torch.testing.assert_close(model[name], value, rtol=1e-4, atol=1e-5)
    far = [name for name in expected if not torch.allclose(plain[name], expected[name], rtol=0.05, atol=0.01)]
    assert len(far) > len(expected) / 2, "those that training keeps are others"


def test_the_model_with_batch_norm_that_is_saved_is_the_one_that_was_evaluated(
    processes: Processes, recipe: Path
) -> None:
    """And its statistics do not depend on how often it was evaluated before."""
    run = train(processes, recipe, *NORMED, "logging.eval_every=2")
    other = train(processes, recipe, *NORMED)
    first, second = (load_file(run / "model.safetensors") for run in (run, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    model = create_model(resolved.model, index.class_count, resolved.data.image_size)
    model.load_state_dict(load_file(run / "model.safetensors"))
    (batch,) = EvalLoader(resolved.data.shards, index, resolved.data, rank=0, ranks=1, batch_size=360)
    images, labels = normalised(batch)
    with torch.no_grad():
        scores = model.eval()(images)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-4)


def test_a_checkpoint_has_both_the_statistics_of_training_and_those_of_the_averaged_model(
    processes: Processes, recipe: Path, tmp_path: Path
) -> None:
    """A run that died resumes to the same bits; `qsr export` gives what an evaluation would have measured. The run has
    two parameter groups as well."""
    more = [*NORMED, "logging.checkpoint_every=3", "optimizer.decay_norms_and_biases=false"]
    whole = train(processes, recipe, *more)
    other = train(processes, recipe, *more, "batch_norm=null")
    argv = ["train", str(recipe), "--set", "logging.name=died"]
    argv += [word for override in more for word in ("--set", override)]
    assert processes.run(interrupted_job, argv=argv, at_step=5) == [130, 130]
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 0, err
    first, second = (load_file(run / "model.safetensors") for run in (whole, recipe.parent / "runs" / "died"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    (tag,) = [path.name for path in (whole / "checkpoints").glob("step-*")]
    own = [run / "checkpoints" / tag / "worker-00001" / "rank-00001.pt" for run in (whole, other)]
    states = [torch.load(path, weights_only=True) for path in own]
    assert states[0]["buffers"]
    for name, (buffer, _) in states[0]["buffers"].items():
        assert torch.equal(buffer, states[1]["buffers"][name][0])
    assert torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])

    from qsr_engine.cli.main import main

    out = tmp_path / "out.safetensors"
    assert main(["export", str(whole / "checkpoints" / tag), str(out)]) == 0
    exported = load_file(out)
    for name, value in batch_statistics(whole, exported, step=int(tag[-8:]), ranks=2).items():
        torch.testing.assert_close(exported[name], value, rtol=1e-4, atol=1e-5)
