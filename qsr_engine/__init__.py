"""Train large models with local steps under the Quadratic Synchronization Rule (arXiv 2310.14423).

`initialize` takes the place of `deepspeed.initialize`, `zero_init` that of `deepspeed.zero.Init`; the command `qsr`
trains recipes. DeepSpeed and torch are imported when one of these is first used, so that the command line stays quick.
"""

from typing import TYPE_CHECKING, Any

from qsr_engine.config import ConfigError

if TYPE_CHECKING:
    from qsr_engine.engines.deepspeed import initialize, zero_init

__all__ = ["ConfigError", "initialize", "zero_init"]


def __getattr__(name: str) -> Any:
    if name in ("initialize", "zero_init"):
        from qsr_engine.engines import deepspeed

        return getattr(deepspeed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
