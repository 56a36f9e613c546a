"""Train large models with local steps under the Quadratic Synchronization Rule (arXiv 2310.14423).

`initialize` takes the place of `deepspeed.initialize`, and `attach` puts it there for a loop that others own; the
command `qsr` trains recipes. DeepSpeed and torch are imported when one of the two is first used, so that the command
line stays quick.
"""

from typing import TYPE_CHECKING, Any

from qsr_engine.config import ConfigError

if TYPE_CHECKING:
    from qsr_engine.engines.attach import attach
    from qsr_engine.engines.deepspeed import initialize

__all__ = ["ConfigError", "attach", "initialize"]


def __getattr__(name: str) -> Any:
    if name == "initialize":
        from qsr_engine.engines.deepspeed import initialize

        return initialize
    if name == "attach":
        from qsr_engine.engines.attach import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
