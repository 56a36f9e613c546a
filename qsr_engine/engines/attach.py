"""Local steps in a training loop that others own: one that calls `deepspeed.initialize` itself, by that name.

    with qsr_engine.attach():                                    # Hugging Face's Trainer
        trainer.train()

    with qsr_engine.attach():                                    # Hugging Face Accelerate
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with qsr_engine.attach():                                    # Lightning
        trainer.fit(module, loader)

Inside the block `deepspeed.initialize` is qsr_engine's, and `deepspeed.zero.Init` partitions over the ranks of a
worker. What the loop then calls (forward, backward, step, save_checkpoint, ...) are methods of the LocalStepEngine that
it was given, and its eval() and train() enter and leave `engine.averaged()`. `train` of the model itself does the same,
since loops evaluate it without the engine. What is changed of the libraries is in engines/attached.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from qsr_engine.config.deepspeed import read_deepspeed_config
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.attached import accelerate, lightning, trainer
from qsr_engine.engines.attached.replaced import replaced
from qsr_engine.engines.deepspeed.engine import LocalStepEngine
from qsr_engine.engines.deepspeed.initialize import initialize, zero_init
from qsr_engine.engines.deepspeed.internals import deepspeed_initialize, deepspeed_zero_init, replace_in_deepspeed

log = logging.getLogger(__name__)


@contextlib.contextmanager
def attach(qsr: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Until the block ends, `deepspeed.initialize` makes an engine that takes local steps.

    Args:
        qsr: the `"qsr"` block, for a loop whose DeepSpeed configuration has none.
    Raises:
        ConfigError: there is no `"qsr"` block, or two; or nothing in the block called `deepspeed.initialize`; or as
            `initialize` says.
        BoundaryError, CollectiveError: the loop ran inside the block, and the ranks could not end its last round.
    """
    engines: list[LocalStepEngine] = []
    called = False

    def initialize_with_block(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        nonlocal called
        called = True
        given = _signature.bind(*args, **kwargs).arguments
        keys = read_deepspeed_config(_configuration(given))
        if given.get("optimizer") is None and not keys.get("optimizer"):
            only_evaluates: tuple[Any, Any, Any, Any] = deepspeed_initialize(**_without_block(given, keys))
            return only_evaluates
        given["config"] = _with_block(keys, qsr)
        given.pop("config_params", None)
        results = initialize(**given)
        results[0].evaluate_the_average()
        engines.append(results[0])
        return results

    def zero_init_with_block(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[Any]:
        given = _zero_signature.bind(*args, **kwargs).arguments
        config = given.pop("config_dict_or_path", None) or given.pop("config", None)
        if config is None or not given.pop("enabled", True) or given.get("data_parallel_group") is not None:
            own: contextlib.AbstractContextManager[Any] = deepspeed_zero_init(*args, **kwargs)
            return own
        keys = _without_auto(read_deepspeed_config(config))
        if not _SIZES & set(keys):
            keys["train_micro_batch_size_per_gpu"] = 1
        return zero_init(_with_block(keys, qsr), **given)

    def end() -> None:
        for engine in engines:
            _end(engine)

    with (
        replace_in_deepspeed(initialize_with_block, zero_init_with_block),
        replaced(nn.Module, "train", lambda train: _showing_the_average(train, engines)),
        accelerate.gives_the_average(engines),
        trainer.takes_local_steps(engines, end),
        lightning.asks_on_boundaries(engines),
        lightning.ends_rounds(end),
    ):
        yield
    if not called:
        raise ConfigError(
            "nothing called deepspeed.initialize inside attach(), so nothing takes local steps; is DeepSpeed chosen in "
            "this loop (Accelerate: a DeepSpeedPlugin, Lightning: a DeepSpeedStrategy), and is the call that sets it "
            "up (accelerator.prepare with the model, trainer.fit) inside the `with`?"
        )
    end()


_signature, _zero_signature = inspect.signature(initialize), inspect.signature(deepspeed_zero_init)


def _configuration(arguments: Mapping[str, Any]) -> Any:
    """The configuration among the arguments of `deepspeed.initialize`, which takes it by three names."""
    candidates = (
        arguments.get("config"),
        arguments.get("config_params"),
        getattr(arguments.get("args"), "deepspeed_config", None),
    )
    return next((config for config in candidates if config is not None), {})


def _with_block(keys: Mapping[str, Any], qsr: Mapping[str, Any] | None) -> dict[str, Any]:
    block: dict[str, Any] = {} if qsr is None else {"qsr": dict(qsr)}
    if block and "qsr" in keys:
        raise ConfigError('there is a "qsr" block in the DeepSpeed configuration and one in attach(qsr=...); leave one')
    if not block and "qsr" not in keys:
        raise ConfigError(
            'the DeepSpeed configuration of this loop has no "qsr" block, so nothing would take local steps; write the '
            'block there, or give it to attach(qsr={"strategy": "qsr", "h_base": 4, ...})'
        )
    return {**keys, **block}


def _without_block(given: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in keys.items() if key != "qsr"}
    return {**{name: value for name, value in given.items() if name != "config_params"}, "config": config}


def _without_auto(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What Hugging Face fills in when it knows the model and the data, whose sizes partitioning does not need."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in keys.items()
        if value != "auto"
    }


_SIZES = {"train_batch_size", "train_micro_batch_size_per_gpu"}


def _showing_the_average(train: Callable[..., Any], engines: Sequence[LocalStepEngine]) -> Callable[..., Any]:
    """Trainer and Lightning call eval() of the model and not of the engine."""

    @functools.wraps(train)
    def show_and_train(module: nn.Module, mode: bool = True) -> Any:
        for engine in engines:
            if engine.module is module:
                engine.show_average(not mode)
        return train(module, mode)

    return show_and_train


def _end(engine: LocalStepEngine) -> None:
    """The loop may be over, where it ran inside the block; before its first step it is still to come."""
    state = engine.local_steps
    if state.step == 0:
        return
    if engine.destroyed or not dist.is_initialized():
        if not state.boundary.same_everywhere:
            raise RuntimeError(
                f"the loop destroyed its engine or the process group after step {state.step}, inside a round of "
                f"{state.period} steps, where every worker has parameters of its own; call engine.end_round() before"
            )
        return
    engine.show_average(False)
    period = state.period
    if engine.end_round() and dist.get_rank() == 0:
        log.warning(
            "the loop is over, and its engine stands after step %d, inside a round of %d steps: the workers were "
            "averaged there, as at a boundary. qsr.total_steps is %d, where a run ends on a boundary by itself",
            state.step,
            period,
            state.qsr.total_steps,
        )
