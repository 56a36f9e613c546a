"""Batch norm's running statistics for a model that was averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from qsr_engine.averaging import average_tensors
from qsr_engine.config.recipe import Recipe
from qsr_engine.data import Index
from qsr_engine.data.device import Normalise
from qsr_engine.data.loader import TrainLoader
from qsr_engine.data.order import seed_for
from qsr_engine.training.from_recipe import DTYPES, Engine, autocast


@contextmanager
def of_averaged_model(recipe: Recipe, engine: Engine, index: Index, moved: Callable[[], None]) -> Iterator[None]:
    """Inside, batch norm has the statistics of the averaged parameters; they depend on the seed and the step only.

    Every rank must enter, inside `engine.averaged()`.

    Args:
        recipe: with a block batch_norm. Bad samples count against data.max_bad_samples for each estimation by itself.
        moved: called for every batch.
    """
    place = recipe.seed, engine.local_steps.step
    seed = seed_for("dropout of batch norm", *place, dist.get_rank())
    batches = _batches(recipe, index, engine.device, seed_for("batch norm", *place), moved)
    with reestimated_batch_norm(engine.module, batches, seed, autocast(recipe, engine.device)):
        yield


def _batches(
    recipe: Recipe, index: Index, device: torch.device, seed: int, moved: Callable[[], None]
) -> Iterator[Tensor]:
    """Pictures of the training split, augmented and not mixed; as many batches on every rank."""
    options, ranks = recipe.batch_norm, dist.get_world_size()
    assert options is not None
    place = {"rank": dist.get_rank(), "ranks": ranks, "batch_size": options.batch_size}
    loader = TrainLoader(recipe.data.shards, index, recipe.data, seed=seed, **place)
    normalise = Normalise(device, DTYPES[recipe.precision.dtype])
    for batch in islice(loader.batches(device=device), -(-options.batches // ranks)):
        moved()
        yield normalise(batch.images)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether some module keeps running statistics of batches."""
    return any(_keeps_statistics(module) for module in model.modules())


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def reestimated_batch_norm(
    model: nn.Module, batches: Iterable[Tensor], seed: int, computing: AbstractContextManager[Any] | None = None
) -> Iterator[None]:
    """Inside, batch norm's running statistics are those of the parameters as they are; afterwards nothing has changed.

    Under local steps a worker's running statistics belong to parameters that were its own. Here every rank runs the
    averaged parameters over its batches, as in training but without gradients, and each statistic is the mean over
    its batches and over all ranks. So a variance is the mean of the batches' variances, as in the authors' code: what
    the batches' means differ by is not in it.

    Every rank must enter. Buffers, the modules' training flags and the random states come back bit for bit, also
    after an error.

    Args:
        batches: of images, as the model reads them; the same number on every rank, one at least.
        seed: of what the model draws meanwhile, such as dropout.
        computing: entered for the forwards.
    Raises:
        CollectiveError: averaging the statistics failed.
    """
    modules = list(model.modules())
    flags, buffers = [module.training for module in modules], list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    norms = [module for module in modules if isinstance(module, _BatchNorm) and _keeps_statistics(module)]
    momenta = [norm.momentum for norm in norms]
    try:
        with torch.random.fork_rng(_cuda_devices(buffers)), torch.no_grad(), computing or nullcontext():
            torch.manual_seed(seed)
            update_bn(batches, model)
        _average([value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None])
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _cuda_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    return list({tensor.device for tensor in tensors if tensor.is_cuda})


@torch.no_grad()
def _average(statistics: list[Tensor]) -> None:
    """Replace them by their mean over all ranks, which is computed in fp64."""
    exact = [value.to(torch.float64, copy=True) for value in statistics]
    average_tensors(exact, None)
    for value, mean in zip(statistics, exact, strict=True):
        value.copy_(mean)
