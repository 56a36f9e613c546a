"""Models that were made by `torch.compile(model)`: they train compiled, and have the names of the plain model.

torch wraps such a model in a module that holds it as `_orig_mod`, so that every name inside begins with it. Here the
compiled forward becomes that of the plain model itself, as `model.compile()` would have it: a checkpoint then is that
of the plain model, and the plain model's can be loaded.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def with_plain_names(model: nn.Module) -> nn.Module:
    """The model without torch's wrappers, at the top and inside, and compiled where they were."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if name != "_orig_mod" and child is not None:
                parent._modules[name] = _unwrapped(child)
    return _unwrapped(model)


def _unwrapped(module: nn.Module) -> nn.Module:
    """As torch does it: compiled is the forward, and hooks of the module itself are called outside."""
    if not hasattr(module, "_orig_mod"):
        return module
    plain: Any = _unwrapped(module._orig_mod)  # type: ignore[arg-type]
    forward = plain.forward
    if not hasattr(forward, "_torchdynamo_orig_callable"):

        @functools.wraps(forward)
        def with_a_frame(*args: Any, **kwargs: Any) -> Any:  # torch compiles no frames of its own modules
            return forward(*args, **kwargs)

        plain.forward = module.dynamo_ctx(with_a_frame)  # type: ignore[operator]
    plain.train(module.training)
    return plain  # type: ignore[no-any-return]
