"""Muon for matrices beside AdamW for the rest, as one local optimizer.

Source: MuLoCo (Therien et al., arXiv 2505.23725), which takes Muon for the local steps of DiLoCo. Both optimizers are
torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qsr_engine.config.strict import ConfigError


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on matrices and `torch.optim.AdamW` on every other parameter.

    Muon's steps are scaled to the size of AdamW's (`adjust_lr_fn: match_rms_adamw`), so that both take one learning
    rate. Muon is for the matrices of hidden layers: give embeddings and the last layer to AdamW, in a group of their
    own with `"muon": False`.

    Args:
        parameters: tensors, or groups of them as torch has them; of a group, `muon` says which optimizer takes it,
            where all of its parameters are matrices. Without it, matrices go to Muon.
        lr, weight_decay: of both.
        momentum: of Muon.
        betas, eps: of AdamW.
    Raises:
        ConfigError: a group with `"muon": True` has a parameter that is no matrix.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        given = list(parameters)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        parts = [part for group in groups for part in _by_optimizer(group)]
        self._of: dict[bool, torch.optim.Optimizer] = {}
        for muon in (True, False):
            own = [part for part in parts if part["muon"] is muon]
            if own and muon:
                self._of[muon] = torch.optim.Muon(own, **common, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            elif own:
                self._of[muon] = torch.optim.AdamW(own, **common, betas=betas, eps=eps)
        super().__init__([group for one in self._of.values() for group in one.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Both take their step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for muon, optimizer in self._of.items():
            # Loading a state makes new groups, and a new state.
            optimizer.param_groups = [group for group in self.param_groups if group["muon"] is muon]
            optimizer.state = self.state
            optimizer.step()
        return loss


def _by_optimizer(group: Any) -> list[dict[str, Any]]:
    """The part of a group that goes to Muon, and that which goes to AdamW; each says which."""
    own = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    matrices = [parameter for parameter in own if parameter.ndim == 2]
    if group.get("muon") and len(matrices) < len(own):
        strange = next(parameter for parameter in own if parameter.ndim != 2)
        raise ConfigError(
            f"a group with muon True has a parameter of shape {list(strange.shape)}, and Muon takes matrices; give "
            "that one in a group with muon False, or leave muon out"
        )
    to_muon = matrices if group.get("muon", True) else []
    taken = {id(parameter) for parameter in to_muon}
    rest = [parameter for parameter in own if id(parameter) not in taken]
    return [{**group, "params": part, "muon": muon} for part, muon in ((to_muon, True), (rest, False)) if part]
