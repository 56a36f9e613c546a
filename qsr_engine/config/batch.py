"""DeepSpeed's three batch sizes, and how ranks divide into workers."""

from __future__ import annotations

from dataclasses import dataclass

from qsr_engine.config.strict import ConfigError


def resolve_batch(
    world_size: int, *, train_batch_size: int | None, micro_batch_size: int | None, accumulation: int | None
) -> tuple[int, int, int]:
    """Complete DeepSpeed's three batch sizes as DeepSpeed does, over all ranks.

    Returns:
        (train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps), all in samples or
        micro-batches, with train_batch_size == micro * accumulation * world_size.
    Raises:
        ConfigError: they contradict one another, or none that says a size is given.
    """
    if train_batch_size is None and micro_batch_size is None:
        raise ConfigError("found neither train_batch_size nor train_micro_batch_size_per_gpu; write at least one")
    given = (train_batch_size, micro_batch_size, accumulation)
    if train_batch_size is not None and micro_batch_size is not None and accumulation is None:
        accumulation = max(1, train_batch_size // (micro_batch_size * world_size))
    accumulation = accumulation or 1
    if micro_batch_size is None:
        assert train_batch_size is not None
        micro_batch_size = max(1, train_batch_size // (accumulation * world_size))
    product = micro_batch_size * accumulation * world_size
    if train_batch_size not in (None, product) and None in given:
        raise _uneven(world_size, *given)
    if train_batch_size is not None and train_batch_size != product:
        raise ConfigError(
            f"train_batch_size is {train_batch_size}, but train_micro_batch_size_per_gpu {micro_batch_size} x "
            f"gradient_accumulation_steps {accumulation} x {world_size} ranks is {product}; write "
            f"train_batch_size {product}, or leave one of the three out"
        )
    return product, micro_batch_size, accumulation


def _uneven(world_size: int, train: int | None, micro: int | None, accumulation: int | None) -> ConfigError:
    """A train_batch_size that ranks cannot share, in the words of the keys that are there."""
    assert train is not None
    shared = [f"{world_size} ranks"]
    shared += [] if micro is None else [f"train_micro_batch_size_per_gpu {micro}"]
    shared += [] if accumulation is None else [f"gradient_accumulation_steps {accumulation}"]
    step = world_size * (micro or 1) * (accumulation or 1)
    below = train // step * step
    return ConfigError(
        f"train_batch_size is {train}, which is not a multiple of {' x '.join(shared)}; write "
        f"{f'{below} or ' if below else ''}{below + step}, or start another number of ranks"
    )


def check_world_size(world_size: int, worker_size: int) -> int:
    """Number of workers K. Raises ConfigError where the ranks don't divide into workers."""
    if world_size % worker_size:
        near = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ConfigError(
            f"qsr.worker_size is {worker_size} and there are {world_size} ranks, which is not a multiple of it; "
            f"write a worker_size among {near}, or start another number of ranks"
        )
    return world_size // worker_size


@dataclass(frozen=True)
class Batch:
    """DeepSpeed's three batch sizes, in samples and micro-batches; train counts all ranks."""

    train: int
    micro: int
    accumulation: int
