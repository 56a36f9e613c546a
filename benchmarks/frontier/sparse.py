"""Sparse regression by u * u - v * v with label noise, where only drift along the minimizers finds the few inputs.

There are more inputs than samples, so that many coefficients fit; label noise drives u and v toward the flattest of
them, the sparse ones (HaoChen, Wei, Lee, Ma, "Shape matters", COLT 2021, arXiv 2006.08680).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.frontier.problems import Problem

INPUTS, TRUE = 60, 3
WORST = 1000.0  # the error of what has diverged

Layers = list[tuple[Tensor, Tensor]]


class Diagonal:
    """f(x) = <x, u * u - v * v>, the copies in the rows of one tensor [copies, 2 inputs]."""

    def layers(self, rows: Tensor) -> Layers:
        """u and v as views."""
        return [(rows[:, :INPUTS], rows[:, INPUTS:])]

    def gradient(self, layers: Layers, into: Layers, inputs: Tensor, targets: Tensor) -> None:
        """Of half the squared error's mean over a batch; inputs [copies, batch, inputs], targets [copies, batch]."""
        (u, v), (of_u, of_v) = layers[0], into[0]
        error = torch.bmm(inputs, (u.square() - v.square())[:, :, None])[:, :, 0] - targets
        both = torch.bmm(error[:, None], inputs)[:, 0].mul_(2 / inputs.shape[1])
        torch.mul(both, u, out=of_u)
        torch.mul(both, v, out=of_v).neg_()


class SparseBatches:
    """As Batches: a trial is a draw of inputs, of the coefficients and of noise."""

    def __init__(self, problem: Problem, trials: int, block: int) -> None:
        self.problem, self.trials, self.network = problem, trials, Diagonal()
        self._generator = generator = torch.Generator().manual_seed(1_000_003 * block + 17)
        self.start = torch.ones(trials, 2 * INPUTS)
        self._inputs = torch.randn(trials, problem.samples, INPUTS, generator=generator)
        places = torch.rand(trials, INPUTS, generator=generator).argsort(1)[:, :TRUE]
        signs = torch.randint(2, (trials, TRUE), generator=generator) * 2.0 - 1
        self.coefficients = torch.zeros(trials, INPUTS).scatter_(1, places, signs)
        self._labels = torch.bmm(self._inputs, self.coefficients[:, :, None])[:, :, 0]
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
        """The expected squared error of each trial on new inputs without noise: of 3 where nothing is learned."""
        u, v = self.network.layers(rows)[0]
        found = (u.square() - v.square() - self.coefficients).square().sum(1)
        return [round(float(value), 5) for value in found.nan_to_num(WORST, WORST).clamp(max=WORST)]
