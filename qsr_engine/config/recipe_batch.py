"""The batch sizes of a recipe on so many ranks."""

from __future__ import annotations

from qsr_engine.config.batch import Batch, resolve_batch
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.strict import ConfigError


def resolve_recipe_batch(recipe: Recipe, ranks: int) -> Batch:
    """Batch sizes for so many ranks. Raises ConfigError where they contradict one another."""
    return Batch(
        *resolve_batch(
            ranks,
            train_batch_size=recipe.batch.train_batch_size,
            micro_batch_size=recipe.batch.train_micro_batch_size_per_gpu,
            accumulation=recipe.batch.gradient_accumulation_steps,
        )
    )


def batch_on_other_ranks(recipe: Recipe, ranks: int, then: Batch) -> Batch:
    """Batch sizes of a run that goes on from a checkpoint, perhaps with another number of ranks.

    As batch.on_other_ranks says. A rank has as many samples in a micro-batch as the recipe says, or, where it says
    nothing, as at the checkpoint; fewer, and more of them, where that does not divide the rank's share of a step.

    Args:
        then: those of the checkpoint. A run may have changed its ranks before it, so the recipe does not tell them.
    Raises:
        ConfigError: train_batch_size is to be kept, and cannot be divided among the ranks.
    """
    total = recipe.batch.train_batch_size
    if recipe.batch.on_other_ranks == "per_rank":
        total = then.micro * then.accumulation * ranks
    if total % ranks:
        multiples = range(recipe.qsr.worker_size, total + 1, recipe.qsr.worker_size)
        near = [number for number in multiples if total % number == 0]
        nearest = sorted(sorted(near, key=lambda number: abs(number - ranks))[:3])
        fitting = f"go on with {', '.join(map(str, nearest))} ranks, or write" if nearest else "write"
        raise ConfigError(
            f"batch.train_batch_size is {total}, which {ranks} ranks cannot divide among them, and "
            f"batch.on_other_ranks is 'keep'; {fitting} on_other_ranks: per_rank"
        )
    share, accumulation = total // ranks, recipe.batch.gradient_accumulation_steps
    given = recipe.batch.train_micro_batch_size_per_gpu or (share // accumulation if accumulation else then.micro)
    micro = max(size for size in range(1, max(1, min(given, share)) + 1) if share % size == 0)
    return Batch(total, micro, share // micro)
