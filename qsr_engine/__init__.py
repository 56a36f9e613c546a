"""Train large models with local steps under the Quadratic Synchronization Rule (arXiv 2310.14423).

`initialize` takes the place of `deepspeed.initialize`, and `attach` puts it there for a loop that others own;
`zero_init` takes the place of `deepspeed.zero.Init`; the command `qsr` trains recipes. DeepSpeed and torch are imported
when one of these is first used, so that the command line stays quick.
"""

from typing import TYPE_CHECKING, Any

from qsr_engine.config import ConfigError

if TYPE_CHECKING:
    from qsr_engine.engines.attach import attach
    from qsr_engine.engines.deepspeed import initialize, zero_init

__all__ = ["ConfigError", "attach", "initialize", "zero_init"]


def __getattr__(name: str) -> Any:
    if name in ("initialize", "zero_init"):
        from qsr_engine.engines import deepspeed

        return getattr(deepspeed, name)
    if name == "attach":
        from qsr_engine.engines.attach import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
