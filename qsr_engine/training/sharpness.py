"""How sharp a minimum is: the largest eigenvalue of the Hessian of the training loss.

The paper explains local steps by a drift toward flat minima (Section 3), so its measure belongs beside the accuracy.
Power iteration on Hessian-vector products by double backward; nothing of the size of the Hessian is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]


@torch.enable_grad()
def largest_eigenvalue(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, *, iterations: int = 20, tolerance: float = 1e-2
) -> float:
    """The largest eigenvalue of the Hessian of the mean loss over all batches.

    Args:
        model: in the mode in which the loss is meant, as a rule evaluation: then batch norm does not couple samples.
        batches: inputs and targets on the model's device.
        loss: of outputs and targets, a mean over the batch.
        iterations: at most so many products; twice as many where a negative eigenvalue is the largest in magnitude.
        tolerance: relative change at which the iteration ends.
    Returns:
        The Rayleigh quotient of the last vector, which is below the eigenvalue where the iteration has not converged.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def times(vector: list[Tensor]) -> list[Tensor]:
        return _hessian_times(model, parameters, vector, batches, loss)

    value = _largest_in_magnitude(times, parameters, iterations, tolerance)
    if value >= 0:
        return value
    lift = -value  # of H + lift I no eigenvalue is negative

    def lifted(vector: list[Tensor]) -> list[Tensor]:
        return [product + lift * v for product, v in zip(times(vector), vector, strict=True)]

    return _largest_in_magnitude(lifted, parameters, iterations, tolerance) - lift


def _largest_in_magnitude(
    times: Callable[[list[Tensor]], list[Tensor]], parameters: list[nn.Parameter], iterations: int, tolerance: float
) -> float:
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in parameters]
    value = 0.0
    for _ in range(iterations):
        norm = _dot(vector, vector).sqrt()
        vector = [v / norm for v in vector]
        product = times(vector)
        before, value = value, float(_dot(vector, product))
        if abs(value - before) <= tolerance * abs(value) or not any(bool(p.any()) for p in product):
            break
        vector = product
    return value


def _hessian_times(
    model: nn.Module, parameters: list[nn.Parameter], vector: list[Tensor], batches: Sequence[Batch], loss: Loss
) -> list[Tensor]:
    total = [torch.zeros_like(parameter) for parameter in parameters]
    samples = sum(len(inputs) for inputs, _ in batches)
    # Fused attention has no second derivative.
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        for inputs, targets in batches:
            value = loss(model(inputs), targets) * (len(inputs) / samples)
            gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
            slope = sum(((g * v).sum() for g, v in pairs), torch.zeros((), device=value.device))
            products = torch.autograd.grad(slope, parameters, allow_unused=True) if pairs else ()
            for sum_, product in zip(total, products, strict=bool(pairs)):
                if product is not None:
                    sum_ += product
    return total


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(one, other, strict=True)]).sum()
