"""Low-precision copies of a whole model's parameters, which its modules hold from a forward to the optimizer's step.

What FSDP does for shards, for a worker of one rank, which has nothing to gather: the optimizer and the averaging know
the fp32 parameters only (the masters), the model computes in copies of them, and gradients come back to the masters in
fp32. fully_shard over one rank gives the same bits, and takes a quarter more time (benchmarks/fsdp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class ComputeCopies:
    """The copies in which one model computes.

    Args:
        model: with its masters in place.
        blocks: parts of it whose inputs are converted too, as FSDP does for what it wraps.
        dtype: of the copies.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._present = False
        made: dict[nn.Parameter, nn.Parameter] = {}
        self._places: list[tuple[dict[str, Any], str, nn.Parameter, nn.Parameter]] = []
        for module in model.modules():
            for name, master in module._parameters.items():
                if master is not None:
                    if master not in made:
                        made[master] = nn.Parameter(torch.empty_like(master, dtype=dtype), master.requires_grad)
                    self._places.append((module._parameters, name, master, made[master]))
        self._masters: list[Tensor] = list(made.keys())
        self._copies: list[Tensor] = list(made.values())
        model.register_forward_pre_hook(self._begin_forward, prepend=True, with_kwargs=True)
        for block in blocks:
            block.register_forward_pre_hook(self._convert, with_kwargs=True)
        hooked: Any = model  # torch gives these two no types
        hooked.register_state_dict_pre_hook(lambda *_: self.withdraw())
        hooked.register_load_state_dict_pre_hook(lambda *_: self.withdraw())

    def _begin_forward(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.present()
        return self._convert(module, args, kwargs)

    def _convert(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def convert(value: Any) -> Any:
            return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return tree_map(convert, args), tree_map(convert, kwargs)

    @torch.no_grad()
    def present(self) -> None:
        """The modules hold copies of what the masters are now."""
        if not self._present:
            torch._foreach_copy_(self._copies, self._masters)
            for parameters, name, _, copy in self._places:
                parameters[name] = copy
            self._present = True

    def withdraw(self) -> None:
        """The modules hold the masters again; call it before anything changes them."""
        if self._present:
            for parameters, name, master, _ in self._places:
                parameters[name] = master
            self._present = False

    @torch.no_grad()
    def collect(self) -> None:
        """After a backward: add the copies' gradients to those of the masters, in the masters' type."""
        for master, copy in zip(self._masters, self._copies, strict=True):
            if copy.grad is None:
                continue
            if master.grad is None:
                master.grad = copy.grad.to(master.dtype)
            else:
                master.grad.add_(copy.grad)
            copy.grad = None
