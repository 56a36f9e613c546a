"""Muon beside AdamW is torch's own two optimizers, each on its parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.muon import MuonWithAdamW
from qsr_engine.engines.replica import check_state_names

OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(8, 4))


def take_steps(made: nn.Module, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for parameter in made.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def torchs(made: nn.Sequential, matrices: list[Any]) -> list[torch.optim.Optimizer]:
    rest = [p for p in made.parameters() if all(p is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, **OPTIONS, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, **OPTIONS, betas=(0.9, 0.95)),
    ]


@pytest.mark.parametrize("last", [True, False], ids=["all matrices", "the last layer by AdamW"])
def test_it_is_torchs_two_optimizers_also_after_a_state_was_loaded(last: bool) -> None:
    ours, theirs = model(), model()
    matrices = [theirs[0].weight, *([theirs[2].weight] if last else [])]

    def make(made: nn.Sequential) -> MuonWithAdamW:
        parts = [list(made[:2].parameters()), list(made[2].parameters())]
        groups = [{"params": parts[0]}, {"params": parts[1], "muon": False}]
        return MuonWithAdamW(made.parameters() if last else groups, **OPTIONS)

    optimizer, both = make(ours), torchs(theirs, matrices)
    take_steps(ours, [optimizer], seed=1)
    take_steps(theirs, both, seed=1)
    resumed = make(ours)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in (group for one in (resumed, *both) for group in one.param_groups):
        group["lr"] = 0.01  # as the engine does before every step
    take_steps(ours, [resumed], seed=2)
    take_steps(theirs, both, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert sum("momentum_buffer" in state for state in resumed.state.values()) == len(matrices)


def test_a_closure_computes_gradients_and_its_loss_is_given() -> None:
    made = model()
    optimizer = MuonWithAdamW(made.parameters())

    def closure() -> float:
        loss = made[0](torch.ones(2, 5)).square().sum()
        loss.backward()
        return float(loss.item())

    twin = copy.deepcopy(made)
    with torch.no_grad():  # as an engine may call it
        given = optimizer.step(closure)
    assert given == twin[0](torch.ones(2, 5)).square().sum().item()
    weights = [one.get_parameter("0.weight") for one in (made, twin)]
    assert not torch.equal(*weights)


def test_a_bias_in_a_group_for_muon_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \[8\], and Muon takes matrices"):
        MuonWithAdamW([{"params": model()[0].parameters(), "muon": True}])


def test_what_either_optimizer_keeps_may_be_averaged() -> None:
    """The state of matrices is Muon's momentum, and that of all others AdamW's moments."""
    optimizer, device = MuonWithAdamW(model().parameters()), torch.device("cpu")
    check_state_names(["momentum_buffer", "exp_avg", "exp_avg_sq"], optimizer, device)
    with pytest.raises(ConfigError, match=r"names \['exp_inf'\], and MuonWithAdamW .* \['exp_avg', 'exp_avg_sq', 'mom"):
        check_state_names(["exp_avg", "exp_inf"], optimizer, device)
