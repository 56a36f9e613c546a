"""Hugging Face's Trainer, whose DeepSpeed integration goes through Accelerate."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.attached.replaced import replaced
from qsr_engine.engines.deepspeed.engine import LocalStepEngine

log = logging.getLogger(__name__)


@contextlib.contextmanager
def takes_local_steps(engines: Sequence[LocalStepEngine], end: Callable[[], None]) -> Iterator[None]:
    """Inside, Trainer meets no other worker between boundaries by itself, and `end` is called when it has trained.

    What does not fit together is said before the first step.
    """

    def trains(train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def train_and_end(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            output = train(trainer, *args, **kwargs)
            end()
            return output

        return train_and_end

    def schedules(create_scheduler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(create_scheduler)
        def check_and_create(trainer: Any, num_training_steps: int, optimizer: Any = None) -> Any:
            if engines:
                _check(engines[-1], num_training_steps)
            return create_scheduler(trainer, num_training_steps, optimizer)

        return check_and_create

    def gets_batches(get_batch_samples: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(get_batch_samples)
        def get_own(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if any(engine.worker_groups for engine in engines):
                _count_own_tokens(trainer.args)
            return get_batch_samples(trainer, *args, **kwargs)

        return get_own

    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    with (
        replaced(trainer, "train", trains),
        replaced(trainer, "create_scheduler", schedules),
        replaced(trainer, "get_batch_samples", gets_batches),
    ):
        yield


def _check(engine: LocalStepEngine, steps: int) -> None:
    """Trainer makes its scheduler once the engine is there and before the first step; `steps`: that it will take."""
    qsr = engine.local_steps.qsr
    if qsr.lr is not None:
        raise ConfigError(
            "Trainer sets the learning rate (learning_rate, lr_scheduler_type), and so does qsr.lr; leave qsr.lr out, "
            "and write the steps of the warm-up as qsr.warmup_steps"
        )
    if steps > qsr.total_steps:
        raise ConfigError(
            f"qsr.total_steps is {qsr.total_steps}, and Trainer is to take {steps} optimizer steps (max_steps, or "
            f"num_train_epochs over the data); write qsr.total_steps {steps}"
        )


def _count_own_tokens(args: Any) -> None:
    """By default Trainer sums the tokens of a step over all ranks, to divide by them: a meeting at every step.

    Every worker averages its loss over its own tokens here, as its gradient is its own.
    """
    if args.average_tokens_across_devices:
        args.average_tokens_across_devices = False
        if args.process_index == 0:
            log.warning(
                "average_tokens_across_devices is True, Trainer's default, and would make all workers meet at every "
                "step: it is False from now on, so that every rank averages its loss over its own tokens"
            )
