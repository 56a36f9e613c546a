"""Train large models with local steps under the Quadratic Synchronization Rule (arXiv 2310.14423).

`initialize` takes the place of `deepspeed.initialize`; the command `qsr` trains recipes. DeepSpeed and torch are
imported when `initialize` is first used, so that the command line stays quick.
"""

from typing import TYPE_CHECKING, Any

from qsr_engine.config import ConfigError

if TYPE_CHECKING:
    from qsr_engine.engines.deepspeed import initialize

__all__ = ["ConfigError", "initialize"]


def __getattr__(name: str) -> Any:
    if name == "initialize":
        from qsr_engine.engines.deepspeed import initialize

        return initialize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
