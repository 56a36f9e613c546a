"""Train large models with local steps under the Quadratic Synchronization Rule (arXiv 2310.14423).

`initialize` takes the place of `deepspeed.initialize`, and `attach` puts it there for a loop that others own;
`zero_init` takes the place of `deepspeed.zero.Init`. `initialize_fsdp` does the same on PyTorch's own sharding, without
DeepSpeed. The command `qsr` trains recipes. DeepSpeed and torch are imported when one of these is first used, so that
the command line stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qsr_engine.config.strict import ConfigError
from qsr_engine.membership.hosts import HostError

if TYPE_CHECKING:
    from qsr_engine.data.loader import EvalLoader, TrainLoader
    from qsr_engine.engines.attach import attach
    from qsr_engine.engines.deepspeed.initialize import initialize, zero_init
    from qsr_engine.engines.fsdp.initialize import initialize_fsdp
    from qsr_engine.engines.muon import MuonWithAdamW

__all__ = [
    "ConfigError",
    "EvalLoader",
    "HostError",
    "MuonWithAdamW",
    "TrainLoader",
    "attach",
    "initialize",
    "initialize_fsdp",
    "zero_init",
]

_PLACES = {
    "EvalLoader": "qsr_engine.data.loader",
    "MuonWithAdamW": "qsr_engine.engines.muon",
    "TrainLoader": "qsr_engine.data.loader",
    "attach": "qsr_engine.engines.attach",
    "initialize": "qsr_engine.engines.deepspeed.initialize",
    "initialize_fsdp": "qsr_engine.engines.fsdp.initialize",
    "zero_init": "qsr_engine.engines.deepspeed.initialize",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
