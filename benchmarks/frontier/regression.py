"""Regression on few samples with label noise, where only drift along the minimizers finds the coefficients.

There are more coefficients than samples, so that many fit; label noise drives the parameters toward the flattest.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from benchmarks.frontier.problems import Problem

WORST = 1000.0  # the error of what has diverged

Layers = list[tuple[Tensor, Tensor]]


class Model(Protocol):
    """Copies in the rows of one tensor [copies, size]."""

    def layers(self, rows: Tensor) -> Layers: ...

    def gradient(self, layers: Layers, into: Layers, inputs: Tensor, targets: Tensor) -> None:
        """Of half the squared error's mean over a batch; inputs [copies, batch, inputs], targets [copies, batch]."""

    def coefficients(self, rows: Tensor) -> Tensor:
        """[copies, inputs]: the model's output is their product with the input."""


class Regression:
    """As Batches: a trial is a draw of inputs, of the true coefficients and of noise.

    Args:
        start: parameters [trials, size], of all workers.
        inputs: [trials, samples, inputs], so scaled that an error in the coefficients is that on new inputs.
        coefficients: [trials, inputs], the true ones.
        generator: of the steps' draws.
    """

    def __init__(
        self,
        problem: Problem,
        model: Model,
        start: Tensor,
        inputs: Tensor,
        coefficients: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.problem, self.network, self.start, self.coefficients = problem, model, start, coefficients
        self.trials = len(start)
        self._inputs, self._generator = inputs, generator
        self._labels = torch.bmm(inputs, coefficients[:, :, None])[:, :, 0]
        self._drawn: list[tuple[Tensor, Tensor]] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs [workers, trials, batch, inputs] and labels with noise [workers, trials, batch] of a step."""
        if not self._drawn:
            problem, generator = self.problem, self._generator
            shape = (200, problem.workers, self.trials, problem.batch)
            chosen = torch.randint(problem.samples, shape, generator=generator)
            noise = problem.noise * torch.randn(shape, generator=generator)
            self._drawn = list(zip(chosen.unbind(), noise.unbind(), strict=True))
        chosen, noise = self._drawn.pop()
        trial = torch.arange(self.trials)[None, :, None]
        return self._inputs[trial, chosen], self._labels[trial, chosen] + noise

    def errors(self, rows: Tensor) -> list[float]:
        """The expected squared error of each trial on new inputs without noise."""
        found = (self.network.coefficients(rows) - self.coefficients).square().sum(1)
        return [round(float(value), 5) for value in found.nan_to_num(WORST, WORST).clamp(max=WORST)]
