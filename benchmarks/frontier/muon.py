"""Muon for the hidden matrices of many copies at once, beside AdamW for the rest, as qsr_engine's MuonWithAdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM, DECAY, BETAS = 0.95, 0.1, (0.9, 0.95)  # of MuonWithAdamW
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of torch.optim.Muon, whose function takes one matrix only
STEPS, LEAST = 5, 1e-7


def orthogonal(matrices: Tensor) -> Tensor:
    """Each of [copies, rows, columns] with its singular values near 1, in bf16, by five Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    found = matrices.bfloat16()
    tall = found.shape[1] > found.shape[2]
    found = found.mT if tall else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=LEAST)
    for _ in range(STEPS):
        gram = torch.bmm(found, found.mT)
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


class BatchedMuon(torch.optim.AdamW):
    """AdamW on rows [copies, size], but Muon on the matrices that lie in them.

    Its state is that of AdamW, and `momentum_buffer` of the same shape; AdamW's moments of the matrices mean nothing.

    Args:
        rows: the parameter.
        matrices: gives those of [copies, size] as views [copies, rows, columns] each.
    """

    def __init__(self, rows: nn.Parameter, matrices: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__([rows], betas=BETAS, weight_decay=DECAY, fused=True)
        self._rows, self._matrices = rows, matrices

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Without a closure."""
        rows, lr = self._rows, self.param_groups[0]["lr"]
        before = [matrix.clone() for matrix in self._matrices(rows.detach())]
        super().step()
        state = self.state[rows]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(rows)
        assert rows.grad is not None
        parts = (self._matrices(values) for values in (rows.detach(), rows.grad, state["momentum_buffer"]))
        for old, matrix, gradient, buffer in zip(before, *parts, strict=True):
            buffer.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(buffer, MOMENTUM))
            scale = 0.2 * math.sqrt(max(matrix.shape[1:]))  # match_rms_adamw
            matrix.copy_(old.mul_(1 - lr * DECAY).add_(update, alpha=-lr * scale))
