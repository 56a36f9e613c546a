"""A matrix of rank 1 from few of its products with random ones, by U U^T: the flattest minimizers have a low rank.

With label noise the drift lowers the mean over samples of |A U|^2, about the trace of U U^T, which matrices of low rank
that fit have least of: Li, Wang, Arora, "What happens after SGD reaches zero loss?", ICLR 2022, arXiv 2110.06914, has
the drift; Gunasekar et al., arXiv 1705.09280, the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.frontier.problems import Problem
from benchmarks.frontier.regression import Layers, Regression

SIZE = 12


class Product:
    """f(A) = <A, U U^T> of symmetric A, the copies of U in the rows of one tensor [copies, SIZE * SIZE]."""

    def layers(self, rows: Tensor) -> Layers:
        """U as a view, twice, for there is no bias."""
        u = rows.view(-1, SIZE, SIZE)
        return [(u, u)]

    def coefficients(self, rows: Tensor) -> Tensor:
        u = self.layers(rows)[0][0]
        return torch.bmm(u, u.transpose(1, 2)).flatten(1)

    def gradient(self, layers: Layers, into: Layers, inputs: Tensor, targets: Tensor) -> None:
        """As Model has it."""
        u = layers[0][0]
        found = torch.bmm(u, u.transpose(1, 2)).flatten(1)
        error = torch.bmm(inputs, found[:, :, None])[:, :, 0] - targets
        matrix = torch.bmm(error[:, None], inputs).mul_(2 / inputs.shape[1])
        torch.bmm(matrix.view(-1, SIZE, SIZE), u, out=into[0][0])


def sensing_batches(problem: Problem, trials: int, block: int) -> Regression:
    """w w^T with |w|^2 = 3 and U = 1 at the start; 9 is the error of a model that has learned nothing.

    Inputs are symmetric parts of matrices of independent normal numbers, whose product with a symmetric matrix has its
    squared norm as variance.
    """
    generator = torch.Generator().manual_seed(1_000_003 * block + 17)
    drawn = torch.randn(trials, problem.samples, SIZE, SIZE, generator=generator)
    inputs = ((drawn + drawn.transpose(2, 3)) / 2).flatten(2)
    w = torch.nn.functional.normalize(torch.randn(trials, SIZE, generator=generator)) * 3**0.5
    coefficients = (w[:, :, None] * w[:, None, :]).flatten(1)
    start = torch.eye(SIZE).flatten().repeat(trials, 1)
    return Regression(problem, Product(), start, inputs, coefficients, generator)
