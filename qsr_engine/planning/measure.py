"""What a step and an averaging take on the ranks that run this: `qsr plan RECIPE --measure`.

    boundaries   a few rounds of one step: they warm up, and tell what a boundary costs beside its averaging
    steps        local steps, timed one by one on every rank
    averagings   of the parameters, all ranks beginning together, and of one number: bandwidth and latency. A step comes
                 before each, as in a run: a link that is held to a rate lets a burst through after a pause

The recipe's own model, optimizer, engine and batch sizes, with random pictures, so that no shards are needed; reading
data is not measured. The model that comes out is thrown away.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from qsr_engine.averaging.choose import hosts_of
from qsr_engine.checkpoint.together import gathered
from qsr_engine.config.batch import Batch, check_world_size
from qsr_engine.config.recipe import Recipe, resolve_recipe_batch
from qsr_engine.planning.calibration import CLASSES, class_count, gradient_type
from qsr_engine.planning.cost import Network
from qsr_engine.planning.settings import CostSettings
from qsr_engine.training.from_recipe import DTYPES, Engine, make_engine, share_cores
from qsr_engine.training.models import create_model

BOUNDARIES = 4  # the first one is not counted
STEPS = 20
AVERAGINGS = 5
SMALL = 20  # all-reduces of one number


def measure(recipe: Recipe) -> CostSettings:
    """Measure in these ranks; every rank of a launcher must enter. Every rank gets the same figures.

    Raises:
        ConfigError, AgreementError, BoundaryError: as initialize().
    """
    ranks, size = int(os.environ["WORLD_SIZE"]), recipe.qsr.worker_size
    workers = check_world_size(ranks, size)
    batch = resolve_recipe_batch(recipe, ranks)
    share_cores()
    classes, _ = class_count(recipe)
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model, classes, recipe.data.image_size)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine = make_engine(_short_run(recipe), batch, model)
    steps = _Steps(recipe, engine, batch)
    boundaries = _boundaries(engine, steps)
    mine = [steps.timed() for _ in range(STEPS)]
    averager = engine.local_steps.averager
    group, number = averager.group, torch.zeros(1, device=engine.device)
    gradients = torch.zeros(parameters // size + 1, dtype=DTYPES[gradient_type(recipe)], device=engine.device)
    median = partial(_median_of_slowest, engine.device)
    averaging = median(averager.average, AVERAGINGS, steps.step)
    reducing = median(lambda: dist.all_reduce(gradients, group=group), AVERAGINGS, steps.step)
    small = median(lambda: dist.all_reduce(number, group=group), SMALL)
    hosts = hosts_of(None) or [[rank] for rank in range(ranks)]
    of_steps = _of_steps(gathered(mine), size)
    payload = _whole_payload(averager.bytes_per_averaging, size, workers)
    per_host = max(1, max(map(len, hosts)) // size)
    two_level = averager.way.startswith("TwoLevel")
    placed = Network(math.inf, workers_per_host=per_host, two_level=two_level)
    return CostSettings(
        **of_steps,
        **_of_network(payload, averaging, small, workers, placed),
        gradient_efficiency=_relative_rate(gradients.nbytes * size / payload, averaging, reducing, small),
        boundary_seconds=max(0.0, boundaries - averaging),
        workers=workers,
        workers_per_host=per_host,
        two_level=two_level,
        parameters=parameters,
        measured={
            "model": recipe.model.name,
            "train_batch_size": batch.train,
            "micro_batch": batch.micro,
            "hosts": len(hosts),
            "ranks": ranks,
            "workers": workers,
            "device": engine.device.type,
            "torch": torch.__version__,
            "averaging": averager.way,
            "averaging_seconds": averaging,
            "gradient_seconds": reducing,
            "small_all_reduce_seconds": small,
            "step_seconds_by_rank": [statistics.mean(seconds) for seconds in gathered(mine)],
        },
    )


def _short_run(recipe: Recipe) -> Recipe:
    """The recipe with another schedule: some rounds of one step, then local steps. Averagings hide behind nothing."""
    raw = recipe.model_dump(exclude_unset=True)
    raw.pop("epochs", None)
    raw["qsr"] = {
        "strategy": "swap",
        "h_base": 1,
        "switch_step": BOUNDARIES,
        "total_steps": BOUNDARIES + STEPS + 2 * (AVERAGINGS + 1) + 1,  # the run never ends
        "lr": {"schedule": "constant", "peak": recipe.qsr.lr.peak},
        "worker_size": recipe.qsr.worker_size,
        "averaging": {
            key: value
            for key, value in raw["qsr"].get("averaging", {}).items()
            if key not in ("overlap", "delay_steps")
        },
        "outer": raw["qsr"].get("outer"),
    }
    return Recipe.model_validate(raw)


class _Steps:
    """Optimizer steps on random pictures, which stay the same."""

    def __init__(self, recipe: Recipe, engine: Engine, batch: Batch) -> None:
        self._engine, self._accumulation = engine, batch.accumulation
        generator = torch.Generator().manual_seed(recipe.seed + dist.get_rank())
        side = recipe.data.image_size
        images = torch.randn(batch.micro, 3, side, side, generator=generator)
        self._images = images.to(engine.device, DTYPES[recipe.precision.dtype])
        classes, _ = class_count(recipe)
        classes = classes or recipe.model.kwargs.get("num_classes", CLASSES)
        self._labels = torch.randint(classes, (batch.micro,), generator=generator).to(engine.device)

    def step(self) -> bool:
        boundary = False
        for _ in range(self._accumulation):
            loss = F.cross_entropy(self._engine(self._images).float(), self._labels)
            self._engine.backward(loss)
            boundary = self._engine.step()
        return boundary

    def timed(self) -> float:
        """Seconds of one step on this rank."""
        started = _now(self._engine.device)
        boundary = self.step()
        assert not boundary, "a timed step is a local one"
        return _now(self._engine.device) - started


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _boundaries(engine: Engine, steps: _Steps) -> float:
    """Median seconds of a boundary with its averaging; the rank that waits least for others counts."""
    seconds = []
    for _ in range(BOUNDARIES):
        before = engine.local_steps.costs.seconds_averaging
        assert steps.step(), "every round is one step long"
        seconds.append(engine.local_steps.costs.seconds_averaging - before)
    return statistics.median(float(min(row)) for row in zip(*gathered(seconds[1:]), strict=True))


def _median_of_slowest(
    device: torch.device, work: Callable[[], Any], times: int, before: Callable[[], Any] = lambda: None
) -> float:
    """Median, over repetitions, of the seconds that the slowest rank takes for work; all begin together.

    Args:
        before: done before each, and not timed.
    """
    seconds = []
    for _ in range(times + 1):  # the first one is not counted
        before()
        dist.barrier()
        started = _now(device)
        work()
        seconds.append(_now(device) - started)
    return statistics.median(float(max(row)) for row in zip(*gathered(seconds[1:]), strict=True))


def _of_steps(by_rank: Sequence[Sequence[float]], worker_size: int) -> dict[str, Any]:
    """Mean and variation of step times, from those of every rank; a worker is as slow as its slowest rank."""
    by_worker = [
        [max(together) for together in zip(*by_rank[first : first + worker_size], strict=True)]
        for first in range(0, len(by_rank), worker_size)
    ]
    means = [statistics.mean(seconds) for seconds in by_worker]
    mean = statistics.mean(means)
    within = statistics.mean(statistics.variance(seconds) / statistics.mean(seconds) ** 2 for seconds in by_worker)
    # Means of so many steps differ by chance too; what is beyond that is the machines'.
    between = (statistics.variance(means) / mean**2 if len(means) > 1 else 0.0) - within / len(by_worker[0])
    return {"step_seconds": mean, "step_cv": within**0.5, "worker_cv": max(0.0, between) ** 0.5}


def _whole_payload(sent: int, worker_size: int, workers: int) -> float:
    """Bytes of an averaging of a whole worker, each of whose ranks sends so many; math.inf for a single worker."""
    return sent * worker_size * workers / (2 * (workers - 1)) if workers > 1 else math.inf


def _relative_rate(payloads: float, averaging: float, reducing: float, small: float) -> float:
    """Rate of an all-reduce of gradients over that of an averaging, latency left out.

    Args:
        payloads: bytes of gradients over bytes of an averaging.
        averaging, reducing, small: seconds of an averaging, of gradients, and of next to nothing.
    """
    if payloads == 0 or not math.isfinite(payloads):
        return 1.0
    return payloads * (averaging - min(small, 0.5 * averaging)) / (reducing - min(small, 0.5 * reducing))


def _of_network(payload: float, averaging: float, small: float, workers: int, placed: Network) -> dict[str, Any]:
    """Bandwidth and latency that give the measured times; both are what all links together reach.

    Args:
        payload: bytes of an averaging of a whole worker.
        averaging, small: seconds of an averaging, and of an all-reduce of next to nothing, in one ring.
        placed: says how many workers a host has, and in how many levels they average.
    """
    if workers == 1:
        return {"bandwidth": None}
    small = min(small, 0.5 * averaging)  # where next to nothing took as long, noise is all that was measured
    latency = small / (2 * (workers - 1))
    if placed.hosts(workers) == 1:
        rate = placed.bytes_sent(payload, workers) / (averaging - small)
        return {"bandwidth": None, "local_bandwidth": rate, "local_latency": latency}
    return {"bandwidth": placed.port_bytes(payload, workers) / (averaging - small), "latency": latency}
