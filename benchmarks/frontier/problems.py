"""What is learned: pictures with label noise, by a small network of many copies at once, one a worker and trial."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Problem:
    """A task, its network and its local optimizer; every rule is compared within one.

    Args:
        data: "digits" (scikit-learn's, 8 x 8), "cifar10" (8 x 8 x 3, shrunk from a folder that --data names), or
            "sparse" or "sensing" (frontier.regression, which reads no hidden and no loss).
        samples: training pictures of a trial, drawn from all; the others test it.
        hidden: sizes of the hidden layers.
        noise: share of labels that are drawn anew at every step, uniformly over the classes; of a regression the
            standard deviation of what is added to them.
        batch: pictures a worker and step.
        optimizer: "sgd", "momentum" (0.9), "adamw" or "muon" (of all matrices but the last, AdamW for the rest).
        rate: the peak learning rate with which tuning begins; cosine to 0.
        state: averaging.state of all its rules.
    """

    name: str
    steps: int
    data: str = "digits"
    samples: int = 200
    hidden: tuple[int, ...] = (32,)
    loss: str = "squared"
    noise: float = 0.5
    workers: int = 8
    batch: int = 2
    optimizer: str = "sgd"
    rate: float = 0.1
    state: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Pictures:
    """pixels [N, inputs] with mean 0 and deviation 1, labels [N]."""

    pixels: Tensor
    labels: Tensor


def load(problem: Problem, folder: Path | None) -> Pictures:
    """The pictures of a problem; folder is that of --data."""
    if problem.data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels, labels = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    else:
        if folder is None:
            raise SystemExit(f"{problem.name} needs pictures: give --data FOLDER with train/CLASS/*.jpg")
        pixels, labels = _shrunk(folder)
    pixels = pixels - pixels.mean()
    return Pictures(pixels / pixels.std(), labels)


def _shrunk(folder: Path, each: int = 600) -> tuple[Tensor, Tensor]:
    """The first pictures of every class, 8 x 8 x 3, by the means of 4 x 4 pixels."""
    import numpy as np
    from PIL import Image

    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    paths = [
        (label, path) for label, name in enumerate(names) for path in sorted((folder / "train" / name).iterdir())[:each]
    ]
    whole = np.stack([np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) for _, path in paths])
    small = whole.reshape(len(paths), 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(paths), -1)
    return torch.from_numpy(small), torch.tensor([label for label, _ in paths])


class Network:
    """A perceptron with ReLU whose copies lie in the rows of one tensor [copies, size]; gradients by hand.

    Autograd gives the same (tests/unit/benchmarks/test_frontier.py), and takes three times as long.
    """

    def __init__(self, inputs: int, problem: Problem) -> None:
        widths = [inputs, *problem.hidden, CLASSES]
        self.shapes = list(itertools.pairwise(widths))
        self.size = sum((before + 1) * after for before, after in self.shapes)
        self._entropy = problem.loss == "cross_entropy"

    def start(self, copies: int, generator: torch.Generator) -> Tensor:
        """As torch.nn.Linear: uniform, up to 1 / sqrt(inputs of the layer)."""
        parts = []
        for before, after in self.shapes:
            parts.append((torch.rand(copies, (before + 1) * after, generator=generator) * 2 - 1) / math.sqrt(before))
        return torch.cat(parts, 1)

    def layers(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights [copies, before, after] and biases [copies, 1, after] as views of the rows."""
        found, start = [], 0
        for before, after in self.shapes:
            middle, end = start + before * after, start + (before + 1) * after
            found.append((rows[:, start:middle].view(-1, before, after), rows[:, middle:end].view(-1, 1, after)))
            start = end
        return found

    def outputs(self, layers: list[tuple[Tensor, Tensor]], pixels: Tensor) -> list[Tensor]:
        """What enters every layer, and last the outputs; pixels are [copies, batch, inputs]."""
        values = [pixels]
        for number, (weights, biases) in enumerate(layers, 1):
            out = torch.baddbmm(biases, values[-1], weights)
            values.append(out.relu_() if number < len(layers) else out)
        return values

    def gradient(
        self, layers: list[tuple[Tensor, Tensor]], into: list[tuple[Tensor, Tensor]], pixels: Tensor, targets: Tensor
    ) -> None:
        """Of the mean loss over a batch: half the squared error, or cross-entropy; targets [copies, batch, classes]."""
        *values, out = self.outputs(layers, pixels)
        error = (out.softmax(2) if self._entropy else out).sub_(targets).div_(pixels.shape[1])
        for number in range(len(layers) - 1, -1, -1):
            torch.bmm(values[number].transpose(1, 2), error, out=into[number][0])
            torch.sum(error, 1, keepdim=True, out=into[number][1])
            if number:
                error = torch.bmm(error, layers[number][0].transpose(1, 2)).mul_(values[number] > 0)


class Batches:
    """What every worker of every trial sees, the same under every rule.

    Args:
        trials: independent ones; each has training pictures, a start and batches of its own.
        block: of trials; another number gives others.
    """

    def __init__(self, problem: Problem, pictures: Pictures, trials: int, block: int) -> None:
        self.problem, self.pictures, self.trials = problem, pictures, trials
        self._generator = torch.Generator().manual_seed(1_000_003 * block + 17)
        order = torch.rand(trials, len(pictures.labels), generator=self._generator).argsort(1)
        self._training, self.held_out = order[:, : problem.samples], order[:, problem.samples :]
        self.network = Network(pictures.pixels.shape[1], problem)
        self.start = self.network.start(trials, self._generator)
        self._eye = torch.eye(CLASSES)
        self._drawn: list[tuple[Tensor, Tensor]] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """Pixels [workers, trials, batch, inputs] and targets [workers, trials, batch, classes] of a step."""
        if not self._drawn:
            self._draw(200)
        index, labels = self._drawn.pop()
        return self.pictures.pixels[index], self._eye[labels]

    def _draw(self, steps: int) -> None:
        problem, generator = self.problem, self._generator
        shape = (steps, problem.workers, self.trials, problem.batch)
        chosen = torch.randint(problem.samples, shape, generator=generator)
        index = self._training[torch.arange(self.trials)[None, None, :, None], chosen]
        wrong = torch.rand(shape, generator=generator) < problem.noise
        labels = torch.where(wrong, torch.randint(CLASSES, shape, generator=generator), self.pictures.labels[index])
        self._drawn = list(zip(index.unbind(), labels.unbind(), strict=True))

    def errors(self, rows: Tensor) -> list[float]:
        """Per cent of the held-out pictures, with their true labels, that each trial's model gets wrong."""
        pixels, labels = self.pictures.pixels[self.held_out], self.pictures.labels[self.held_out]
        out: Any = self.network.outputs(self.network.layers(rows), pixels)[-1]
        right = (out.argmax(2) == labels) & out.isfinite().all(2)
        return [round(100 - 100 * float(value), 4) for value in right.float().mean(1)]
