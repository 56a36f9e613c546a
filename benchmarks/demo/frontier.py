"""Many short runs in two processes: a small network on scikit-learn's digits, under one setting and seed after another.

The engine, the schedule and the averaging are the project's own (`initialize_fsdp`, workers of one rank, gloo). What a
launch would cost, importing torch above all, is paid once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.demo.ranks import RANKS, in_ranks, meet_again
from qsr_engine import initialize_fsdp

BATCH, EVAL = 64, 900  # samples of a step over both ranks; images for evaluation
WIDTH, STEPS, WARMUP = 64, 400, 30


@dataclass(frozen=True)
class Setting:
    """One point of the frontier: keys of the qsr block, and the peak of the learning rate."""

    name: str
    block: Mapping[str, Any]
    peak: float

    @classmethod
    def constant(cls, h: int, peak: float) -> Setting:
        return cls(f"constant H = {h}", {"strategy": "constant", "h_base": h}, peak)

    @classmethod
    def qsr(cls, h_base: int, ratio: float, peak: float) -> Setting:
        """Its alpha is ratio times the peak, so that H is the same function of the step at every peak."""
        rule = {"strategy": "qsr", "h_base": h_base, "alpha": ratio * peak}
        return cls(f"QSR h_base {h_base}, alpha = {ratio:g} peak", rule, peak)


@dataclass(frozen=True)
class Result:
    """One run."""

    name: str
    peak: float
    seed: int
    accuracy: float  # %, of the averaged model on the images for evaluation
    averagings_percent: float  # of the steps
    seconds: float


def run_all(settings: Sequence[Setting], seeds: Sequence[int], results: Path, *, split: int = 0) -> list[Result]:
    """Train every setting with every seed, keep the results in a file, and return them.

    Args:
        split: seed of the split into images for training and for evaluation; 0 is that of `qsr shards digits`.
    """
    in_ranks(partial(_train_all, list(settings), list(seeds), results, split))
    return [Result(**row) for row in json.loads(results.read_text(encoding="utf-8"))]


def _train_all(settings: Sequence[Setting], seeds: Sequence[int], results: Path, split: int) -> None:
    rank, data = torch.distributed.get_rank(), Digits(split)
    found = []
    for seed in seeds:
        meet_again(f"seed {seed}")
        for setting in settings:
            found.append(_train(setting, seed, rank, data))
        if rank == 0:
            results.write_text(json.dumps([asdict(result) for result in found]), encoding="utf-8")
            print(f"seed {seed}: {len(settings)} runs", flush=True)


def _train(setting: Setting, seed: int, rank: int, data: Digits) -> Result:
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10))
    lr = {"schedule": "cosine", "peak": setting.peak, "min": 1e-6, "warmup_steps": WARMUP}
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 1.0,
        "qsr": {"total_steps": STEPS, "lr": lr, **setting.block},
    }
    engine = initialize_fsdp(
        model=model, optimizer=lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.05), config=config
    )
    batches = data.batches(seed, rank)
    while not engine.local_steps.finished:
        images, labels = next(batches)
        loss = cross_entropy(engine(images), labels, label_smoothing=0.1)
        engine.backward(loss)
        engine.step()
    with engine.averaged(), torch.no_grad():
        correct = engine.module(data.eval_images).argmax(1) == data.eval_labels
    averagings = engine.local_steps.averagings_percent
    engine.destroy()
    return Result(
        setting.name,
        setting.peak,
        seed,
        100 * correct.double().mean().item(),
        averagings,
        time.perf_counter() - started,
    )


class Digits:
    """The split of `qsr shards digits --eval 900`, in memory; images are [N, 64] in fp32, of mean 0."""

    def __init__(self, split: int) -> None:
        digits = load_digits()
        order = list(range(len(digits.images)))
        random.Random(split).shuffle(order)
        images = torch.tensor(digits.images, dtype=torch.float32).div_(8).sub_(0.6)
        labels = torch.tensor(digits.target)
        self.eval_images, self.eval_labels = images[order[:EVAL]].flatten(1), labels[order[:EVAL]]
        self._images, self._labels = images[order[EVAL:]], labels[order[EVAL:]]

    def batches(self, seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A rank's batches without end: an epoch shuffled for all ranks together, each image moved by up to a pixel."""
        everybody, own = (torch.Generator().manual_seed(1000 * seed + number) for number in (0, 1 + rank))
        samples, each = len(self._images), BATCH // RANKS
        while True:
            order = torch.randperm(samples, generator=everybody)
            for start in range(0, samples - BATCH + 1, BATCH):
                chosen = order[start + rank * each : start + (rank + 1) * each]
                moved = torch.randint(-1, 2, (2,), generator=own).tolist()
                yield self._images[chosen].roll(moved, (1, 2)).flatten(1), self._labels[chosen]
