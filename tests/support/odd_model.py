"""A model that reads its parameters in every way there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support import training
from tests.support.deepspeed_engine import start
from tests.support.training import QSR

WIDTH = training.FEATURES


class Odd(nn.Module):
    """Shared weights, checkpointing, a layer called twice and one never, weights read from outside or from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, training.OUTPUTS)
        self.encoder = nn.Linear(WIDTH, WIDTH, bias=False)
        self.decoder = nn.Linear(WIDTH, WIDTH, bias=False)
        self.decoder.weight = self.encoder.weight
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.outside = nn.Linear(WIDTH, WIDTH, bias=False)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.recurrent = nn.LSTM(WIDTH, WIDTH)
        self.listed = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.list = [parameter for parameter in self.listed.parameters() if parameter.ndim == 2]
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + self.list[0].mean())  # before its layer reads it
        x = self.twice(torch.tanh(self.twice(self.encoder(x))))
        x = nn.functional.linear(x, self.outside.weight)
        if self.fail:
            raise KeyError("in the middle of a forward")
        x = checkpoint(self.again, x, use_reentrant=False)
        x, _ = self.attention(x[None], x[None], x[None])
        x, _ = self.recurrent(x)
        x = self.listed[0](self.decoder(x[0])) @ self.list[1]
        out: Tensor = self.head(x * self.scale)
        return out


def make(averaging: dict[str, Any], **config: Any) -> Any:
    torch.manual_seed(3)
    return start({**QSR, "averaging": {"bucket_mb": 0.0006, **averaging}}, Odd(), **config)
