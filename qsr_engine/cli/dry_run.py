"""`qsr train RECIPE --dry-run`: everything that can be checked without training, and the plan."""

from __future__ import annotations

import os

from qsr_engine.config.batch import check_world_size
from qsr_engine.config.deepspeed import check_supported, split_deepspeed_config
from qsr_engine.config.fsdp import load_fsdp_config
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.units import counted
from qsr_engine.data import Index
from qsr_engine.planning.plan import plan_of
from qsr_engine.records.run_folder import CHECKPOINTS


def dry_run(path: str, recipe: Recipe, index: Index, ranks: int | None, *, resume: bool) -> None:
    """Print what a run would be, a line for each thing that was checked; nothing is written.

    Args:
        path: of the recipe, as it is called in what is printed.
        recipe: as resolve_recipe() gives it, with a folder that this run may have.
        index: of its shards, which have been checked.
        ranks: None for one a GPU; where there is no GPU the batch is not checked.
        resume: the run goes on from its newest checkpoint, which may be of other ranks.
    Raises:
        ConfigError: the model, the batch or the engine's configuration cannot be.
    """
    train, evaluated = index.split(recipe.data.train), index.split(recipe.data.eval)
    lines = {
        "data": f"{recipe.data.shards}: {train.samples} training samples{_of_tokens(index)} in "
        f"{counted(len(train.shards), 'shard')}, {evaluated.samples} to evaluate",
        "model": _model(recipe, index),
        "ranks": _ranks(recipe, ranks, resume),
        "folder": f"{recipe.run_dir} ({_state(recipe) if resume else 'new'})",
    }
    print("\n".join(f"{name + ':':<8}{text}" for name, text in lines.items()), end="\n\n")
    print(plan_of(path, recipe, train.samples // recipe.batch.train_batch_size).text())
    print("\nAll that can be checked without training is right. Nothing was started.", flush=True)


def _of_tokens(index: Index) -> str:
    return "" if index.text is None else f" of {index.text.context} tokens"


def _model(recipe: Recipe, index: Index) -> str:
    """Made without memory for its parameters: on the meta device."""
    import torch

    from qsr_engine.averaging.fragments import check_fragments
    from qsr_engine.engines.replica import check_state_names
    from qsr_engine.training.loop import make_model
    from qsr_engine.training.make_task import make_task
    from qsr_engine.training.optimizer import make_optimizer

    with torch.device("meta"):
        model = make_model(recipe, make_task(recipe, index))
    averaging, trained = recipe.qsr.averaging, [one for one in model.parameters() if one.requires_grad]
    check_fragments(averaging.fragments, len(trained))
    optimizer = make_optimizer(recipe, model, trained)
    check_state_names(list(averaging.state_periods), optimizer, torch.device("cpu"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{recipe.model.name}: {parameters / 1e6:.4g} million parameters"


def _state(recipe: Recipe) -> str:
    from qsr_engine.checkpoint.find import find_alone
    from qsr_engine.checkpoint.manifest import CheckpointError
    from qsr_engine.training.resuming import check_same_recipe

    check_same_recipe(recipe)
    try:
        return f"goes on from {find_alone(recipe.run_dir / CHECKPOINTS)[0].name}"
    except CheckpointError:
        return "begins anew: there is no whole checkpoint"


def _ranks(recipe: Recipe, ranks: int | None, resume: bool) -> str:
    import torch

    from qsr_engine.training.attendance import batch_of_worker
    from qsr_engine.training.from_recipe import deepspeed_config, fsdp_config
    from qsr_engine.training.resuming import batch_for

    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    found = ranks or (0 if on_cpu else torch.cuda.device_count())
    if not found:
        return "not checked, since there is no GPU here; write --ranks N, as for training"
    check_world_size(found, recipe.qsr.worker_size)
    workers = found // recipe.qsr.worker_size
    if recipe.qsr.membership.elastic:
        batch, dealing = batch_of_worker(recipe, recipe.qsr.worker_size, resume=resume, workers=workers)
        part = dealing.part(0, workers)
        accumulation, samples = part.accumulation, part.samples
    else:
        batch = batch_for(recipe, found, resume=resume)
        accumulation, samples = batch.accumulation, batch.train
    if recipe.engine == "fsdp":
        load_fsdp_config(fsdp_config(recipe, batch))
    else:
        check_supported(*split_deepspeed_config(deepspeed_config(recipe, batch)))
    return (
        f"{found}, {counted(workers, 'worker')} of {recipe.qsr.worker_size}, engine {recipe.engine}, "
        f"{'CPU' if on_cpu else torch.cuda.get_device_name()}; {batch.micro} samples a rank, "
        f"{accumulation} times a step, {samples} in all"
    )
