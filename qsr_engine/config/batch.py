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


@dataclass(frozen=True)
class Part:
    """What one member takes of a step.

    accumulation: micro-batches of each of its ranks. first: the first stream of data of its first rank. count: streams
    of each of its ranks, which are neighbours. streams: of data, in all. samples: of the step, over all members.
    """

    accumulation: int
    first: int
    count: int
    streams: int
    samples: int


@dataclass(frozen=True)
class Dealing:
    """How the members who are there divide a step. Micro-batches have one size, and all ranks of a worker take as many.

    Args:
        micro: samples in a micro-batch.
        ranks: of a worker.
        accumulation: micro-batches that a rank takes whoever else is there; where `kept` is given, at the start.
        kept: samples of a step over all members, however many they are (`keep`); None: each takes its own (`per_rank`).
    """

    micro: int
    ranks: int
    accumulation: int
    kept: int | None = None

    def part(self, place: int, members: int) -> Part:
        """Of the member with this place among so many.

        Where the whole is kept, it is dealt out in micro-batches for all ranks of a worker, and those with the first
        places take one more where it does not divide evenly. The whole is the nearest that these make, and no member
        goes without: more members than such parts make more of it.
        """
        if self.kept is None:
            streams = members * self.ranks
            return Part(self.accumulation, place * self.ranks, 1, streams, streams * self.accumulation * self.micro)
        one = self.micro * self.ranks
        dealt = max(members, (2 * self.kept + one) // (2 * one))
        each, more = divmod(dealt, members)
        own, before = each + (place < more), place * each + min(place, more)
        return Part(own, before * self.ranks, own, dealt * self.ranks, dealt * one)
