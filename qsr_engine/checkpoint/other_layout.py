"""A checkpoint of a run with another layout: another number of workers, another engine, or another model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.config.digest import differences
from qsr_engine.local_steps.averaged import Averaged

log = logging.getLogger(__name__)
_SAME_MODEL = ("model",)  # of a layout: what must be the same for anything to be taken over


Found = Mapping[str, tuple[Any, Any]]  # keys whose values differ: (saved, now)


def found_in(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Found:
    """What differs between two layouts or configurations."""
    return {key: (then, here) for key, then, here in differences(saved, now)}


def check_same_model(folder: Path, found: Found) -> None:
    """Raises CheckpointError if the checkpoint is of another model."""
    if any(key in found for key in _SAME_MODEL):
        raise CheckpointError(
            f"{folder}: it is the checkpoint of another model (names, types or shapes of parameters and buffers "
            "differ); give the folder of this run"
        )


def optimizer_state_from(folder: Path, found: Found, on_other_workers: str, may_differ: frozenset[str]) -> str:
    """What happens to the optimizer's state in a run with another layout: "mean" or "fresh".

    Raises:
        CheckpointError: the mean was asked for, and more differs than what may.
    """
    if on_other_workers == "fresh":
        return "fresh"
    others = {key: values for key, values in found.items() if key not in may_differ}
    if others:
        spelled = _spelled(others)
        raise CheckpointError(
            f"{folder}: {spelled}, so the workers' optimizer states do not fit this run and cannot be averaged; write "
            "qsr.on_other_workers 'fresh' to take the parameters and start the optimizer anew, or go on as before"
        )
    return "mean"


def warn_of_other_layout(folder: Path, found: Found, source: str) -> None:
    """On rank 0, loudly: what was taken over and what was not."""
    if dist.get_rank() != 0:
        return
    spelled = _spelled(found)
    state = {
        "mean": "Every worker's optimizer starts from the mean of the saved workers' states.",
        "fresh": "The optimizer starts anew, without the state that was saved.",
    }[source]
    log.warning(
        "%s: %s. The parameters, the step and the scheduler are taken over. %s Random states start anew, so "
        "this is not the run that was saved; a script sees to it itself where its data goes on.",
        folder,
        spelled,
        state,
    )


def warn_of_other_configuration(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """On rank 0: a run may go on with another configuration, but not in silence."""
    found = found_in(saved, now)
    if found and dist.get_rank() == 0:
        log.warning("%s: the run goes on with another configuration: %s", folder, _spelled(found, "; "))


@torch.no_grad()
def mean_of_states(replica: Averaged, loaded: Iterable[None]) -> None:
    """Leave the mean of the saved workers' optimizer states in the optimizer.

    State that is not floating point (step counters as integers) and single numbers are those of the last one loaded;
    workers have counted the same steps but for overflows.

    Args:
        loaded: loads the saved workers one after another, and yields after each.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    workers = 0
    for _ in loaded:
        workers += 1
        for place, name, value in replica.state_tensors():
            key = (place, name)
            sums[key] = sums.get(key, 0.0) + value.to(torch.float64, copy=True)
    for place, name, value in replica.state_tensors():
        value.copy_(sums[place, name] / workers)


def _spelled(found: Found, between: str = ", ") -> str:
    return between.join(f"{key} was {then!r} and is {now!r}" for key, (then, now) in sorted(found.items()))
