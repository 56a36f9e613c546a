"""Low-precision copies of a whole model's parameters, which its modules hold from a forward to the end of its backward.

What FSDP does for shards, for a worker of one rank, which has nothing to gather: the optimizer and the averaging know
the fp32 parameters only (the masters), the model computes in copies of them, and gradients come back to the masters in
fp32 while the backward runs. fully_shard over one rank gives the same bits, and takes a quarter more time
(benchmarks/fsdp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_leaves, tree_map


class ComputeCopies:
    """The copies in which one model computes. What has their type already, as a frozen base may, is not copied.

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
                if master is not None and master.is_floating_point() and master.dtype != dtype:
                    if master not in made:
                        made[master] = self._copy_of(master)
                    self._places.append((module._parameters, name, master, made[master]))
        self._masters: list[Tensor] = list(made.keys())
        self._copies: list[Tensor] = list(made.values())
        model.register_forward_pre_hook(self._begin_forward, prepend=True, with_kwargs=True)
        model.register_forward_hook(self._end_forward)
        for block in blocks:
            block.register_forward_pre_hook(self._convert, with_kwargs=True)
        hooked: Any = model  # torch gives these two no types
        hooked.register_state_dict_pre_hook(lambda *_: self.withdraw())
        hooked.register_load_state_dict_pre_hook(lambda *_: self.withdraw())

    def _copy_of(self, master: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(torch.empty_like(master, dtype=self._dtype))  # only one that is trained takes a hook
        hooked: Any = copy
        hooked.register_post_accumulate_grad_hook(_collect_for(master))
        return copy

    def _begin_forward(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.present()
        return self._convert(module, args, kwargs)

    def _convert(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def convert(value: Any) -> Any:
            return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return tree_map(convert, args), tree_map(convert, kwargs)

    def _end_forward(self, _: nn.Module, __: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            self.withdraw()
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                value.register_hook(self._begin_backward)  # type: ignore[no-untyped-call]

    def _begin_backward(self, _: Tensor) -> None:
        """A backward that computes a part of the forward again needs the copies; a loop then finds the masters."""
        self.present()
        Variable._execution_engine.queue_callback(self.withdraw)

    @torch.no_grad()
    def present(self) -> None:
        """The modules hold copies of what the masters are now, trained where these are."""
        if self._present or not self._copies:
            return
        with _unsafe_preserve_version_counter(tuple(self._copies)):  # as FSDP gathers again for a second backward
            torch._foreach_copy_(self._copies, self._masters)
        for parameters, name, master, copy in self._places:
            copy.requires_grad_(master.requires_grad)
            parameters[name] = copy
        self._present = True

    def withdraw(self) -> None:
        """The modules hold the masters again; call it before anything changes them."""
        if self._present:
            for parameters, name, master, _ in self._places:
                parameters[name] = master
            self._present = False


def _collect_for(master: Tensor) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def collect(copy: Tensor) -> None:
        """Add the gradient of a copy to its master's, in the master's type."""
        assert copy.grad is not None
        if master.grad is None:
            master.grad = copy.grad.to(master.dtype)
        else:
            master.grad.add_(copy.grad)
        copy.grad = None

    return collect
