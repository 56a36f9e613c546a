"""What a worker holds by itself, of either engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def own_parameters(engine: Any) -> dict[str, Tensor]:
    """Masters and floating-point buffers by name, whole, in fp64."""
    replica = engine._driver.replica
    if hasattr(engine, "hold_masters"):
        engine.hold_masters()
    named = {name: replica.whole(p).detach().double().clone() for name, p in engine.module.named_parameters()}
    buffers = {name: b.double().clone() for name, b in engine.module.named_buffers() if b.is_floating_point()}
    return {**named, **buffers}
