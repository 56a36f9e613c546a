"""Local steps in a training loop that others own: one that calls `deepspeed.initialize` itself, by that name.

    with qsr_engine.attach():                                    # Hugging Face Accelerate
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with qsr_engine.attach():                                    # Lightning
        trainer.fit(module, loader)

Inside the block `deepspeed.initialize` is qsr_engine's. What the loop then calls (forward, backward, step,
save_checkpoint, ...) are methods of the LocalStepEngine that it was given. One thing more is replaced: Lightning asks
all ranks before every batch whether rank 0 has received SIGTERM, and here it asks on boundaries.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qsr_engine.config.deepspeed import read_deepspeed_config
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.deepspeed.engine import LocalStepEngine
from qsr_engine.engines.deepspeed.initialize import initialize
from qsr_engine.engines.deepspeed.internals import replace_deepspeed_initialize


@contextlib.contextmanager
def attach(qsr: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Until the block ends, `deepspeed.initialize` makes an engine that takes local steps.

    Args:
        qsr: the `"qsr"` block, for a loop whose DeepSpeed configuration has none.
    Raises:
        ConfigError: there is no `"qsr"` block, or two; or nothing in the block called `deepspeed.initialize`; or as
            `initialize` says.
        RuntimeError: the loop ran inside the block and ended inside a round, so that every worker has parameters of
            its own.
    """
    engines: list[LocalStepEngine] = []

    def initialize_with_block(*args: Any, **kwargs: Any) -> tuple[LocalStepEngine, Any, Any, Any]:
        given = _signature.bind(*args, **kwargs).arguments
        given["config"] = _with_block(_configuration(given), qsr)
        given.pop("config_params", None)
        results = initialize(**given)
        engines.append(results[0])
        return results

    with replace_deepspeed_initialize(initialize_with_block), _lightning_asks_on_boundaries(engines):
        yield
    if not engines:
        raise ConfigError(
            "nothing called deepspeed.initialize inside attach(), so nothing takes local steps; is DeepSpeed chosen in "
            "this loop (Accelerate: a DeepSpeedPlugin, Lightning: a DeepSpeedStrategy), and is the call that sets it "
            "up (accelerator.prepare with the model, trainer.fit) inside the `with`?"
        )
    for engine in engines:
        _check_end(engine)


_signature = inspect.signature(initialize)


def _configuration(arguments: Mapping[str, Any]) -> Any:
    """The configuration among the arguments of `deepspeed.initialize`, which takes it by three names."""
    candidates = (
        arguments.get("config"),
        arguments.get("config_params"),
        getattr(arguments.get("args"), "deepspeed_config", None),
    )
    return next((config for config in candidates if config is not None), {})


def _with_block(config: Any, qsr: Mapping[str, Any] | None) -> dict[str, Any]:
    block: dict[str, Any] = {} if qsr is None else {"qsr": dict(qsr)}
    keys = read_deepspeed_config(config)
    if block and "qsr" in keys:
        raise ConfigError('there is a "qsr" block in the DeepSpeed configuration and one in attach(qsr=...); leave one')
    if not block and "qsr" not in keys:
        raise ConfigError(
            'the DeepSpeed configuration of this loop has no "qsr" block, so nothing would take local steps; write the '
            'block there, or give it to attach(qsr={"strategy": "qsr", "h_base": 4, ...})'
        )
    return {**keys, **block}


@contextlib.contextmanager
def _lightning_asks_on_boundaries(engines: Sequence[LocalStepEngine]) -> Iterator[None]:
    """Lightning 2.6 broadcasts from rank 0 before every batch; between boundaries that would make every worker wait.

    It has two names on PyPI. One that is not imported, or has no such broadcast, is left alone.
    """

    def on_boundaries(original: Any) -> Any:
        def ask(loop: Any) -> None:
            if all(engine.local_steps.on_boundary for engine in engines):
                original(loop)

        return ask

    replaced = []
    for module in ("lightning.pytorch.loops.training_epoch_loop", "pytorch_lightning.loops.training_epoch_loop"):
        loop = getattr(sys.modules.get(module), "_TrainingEpochLoop", None)
        original = getattr(loop, _LIGHTNING_ASKS, None)
        if original is not None:
            replaced.append((loop, original))
            setattr(loop, _LIGHTNING_ASKS, on_boundaries(original))
    try:
        yield
    finally:
        for loop, original in replaced:
            setattr(loop, _LIGHTNING_ASKS, original)


_LIGHTNING_ASKS = "_broadcast_sigterm_tensor"


def _check_end(engine: LocalStepEngine) -> None:
    """The loop may be over, where it ran inside the block; before its first step it is still to come."""
    state = engine.local_steps
    if state.step == 0 or state.finished:
        return
    if not state.on_boundary or state.qsr.averaging.overlap != "none":
        raise RuntimeError(
            f"the loop ended at step {state.step}, and not all workers have the same parameters there: it is "
            + ("on a boundary whose averaging overlaps the next steps" if state.on_boundary else "inside a round")
            + f"; end it at qsr.total_steps, {state.qsr.total_steps} (Lightning: max_steps={state.qsr.total_steps})"
        )
