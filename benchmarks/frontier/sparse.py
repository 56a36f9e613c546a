"""Sparse regression by u * u - v * v: the flattest minimizers are sparse.

Source: HaoChen, Wei, Lee, Ma, "Shape matters", COLT 2021, arXiv 2006.08680.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.frontier.problems import Problem
from benchmarks.frontier.regression import Layers, Regression

INPUTS, TRUE = 60, 3


class Diagonal:
    """f(x) = <x, u * u - v * v>, the copies in the rows of one tensor [copies, 2 inputs]."""

    def layers(self, rows: Tensor) -> Layers:
        """u and v as views."""
        return [(rows[:, :INPUTS], rows[:, INPUTS:])]

    def coefficients(self, rows: Tensor) -> Tensor:
        u, v = self.layers(rows)[0]
        return u.square() - v.square()

    def gradient(self, layers: Layers, into: Layers, inputs: Tensor, targets: Tensor) -> None:
        """As Model has it."""
        (u, v), (of_u, of_v) = layers[0], into[0]
        error = torch.bmm(inputs, (u.square() - v.square())[:, :, None])[:, :, 0] - targets
        both = torch.bmm(error[:, None], inputs)[:, 0].mul_(2 / inputs.shape[1])
        torch.mul(both, u, out=of_u)
        torch.mul(both, v, out=of_v).neg_()


def sparse_batches(problem: Problem, trials: int, block: int) -> Regression:
    """Three coefficients of 60 are 1 or -1; an error of 3 is that of a model that has learned nothing."""
    generator = torch.Generator().manual_seed(1_000_003 * block + 17)
    inputs = torch.randn(trials, problem.samples, INPUTS, generator=generator)
    places = torch.rand(trials, INPUTS, generator=generator).argsort(1)[:, :TRUE]
    signs = torch.randint(2, (trials, TRUE), generator=generator) * 2.0 - 1
    coefficients = torch.zeros(trials, INPUTS).scatter_(1, places, signs)
    return Regression(problem, Diagonal(), torch.ones(trials, 2 * INPUTS), inputs, coefficients, generator)
