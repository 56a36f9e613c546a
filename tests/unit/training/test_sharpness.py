"""The largest eigenvalue of a Hessian, against the whole matrix."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from qsr_engine.training.sharpness import largest_eigenvalue


def whole_hessian(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def value(flat: torch.Tensor) -> torch.Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (inputs,)), targets)

    hessian: torch.Tensor = torch.autograd.functional.hessian(value, flat)  # type: ignore[no-untyped-call]
    return hessian


@pytest.mark.parametrize("sign", [1, -1])
def test_it_is_the_largest_eigenvalue_of_the_whole_hessian(sign: int) -> None:
    """In fp64, until the iteration has converged; batches of unequal size count by their samples.

    With the loss turned round, a negative eigenvalue is the largest in magnitude.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    inputs, targets = torch.randn(50, 5, dtype=torch.float64), torch.randint(0, 3, (50,))
    eigenvalues = torch.linalg.eigvalsh(sign * whole_hessian(model, inputs, targets))
    assert (eigenvalues[-1] > -eigenvalues[0]) == (sign == 1), "the case is what it says"
    batches = [(inputs[:40], targets[:40]), (inputs[40:], targets[40:])]
    found = largest_eigenvalue(
        model, batches, lambda x, y: sign * F.cross_entropy(x, y), iterations=3000, tolerance=1e-10
    )
    assert found == pytest.approx(float(eigenvalues[-1]), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_real_models_have_second_derivatives(name: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=4, **size).eval()
    batch = (torch.randn(4, 3, 32, 32), torch.randint(0, 4, (4,)))
    assert math.isfinite(largest_eigenvalue(model, [batch], F.cross_entropy, iterations=3))


def test_frozen_and_unused_parameters_do_no_harm() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    batch = (torch.randn(9, 3), torch.randint(0, 2, (9,)))
    assert largest_eigenvalue(model, [batch], F.cross_entropy) > 0
