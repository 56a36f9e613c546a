"""A checkpoint of a run with another layout: another number of workers, another engine, or another model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.buckets import PIECE
from qsr_engine.averaging.errors import Group
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
    spelled = f"{_spelled(found)}. " if found else ""
    state = {
        "mean": "Every worker's optimizer starts from the mean of the saved workers' states.",
        "fresh": "The optimizer starts anew, without the state that was saved.",
    }[source]
    log.warning(
        "%s: %sThe parameters, the step and the scheduler are taken over. %s Random states start anew, so "
        "this is not the run that was saved; a script sees to it itself where its data goes on.",
        folder,
        spelled,
        state,
    )


def warn_of_average(folder: Path, step: int) -> None:
    """On rank 0: the parameters are not those that any worker had."""
    if dist.get_rank() == 0:
        log.warning(
            "%s: it is from inside a round, where every worker had parameters of its own; the run goes on from their "
            "average at step %d, which begins a new round",
            folder,
            step,
        )


def warn_of_other_configuration(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """On rank 0: a run may go on with another configuration, but not in silence."""
    warn_of_other_options(folder, found_in(saved, now))


def warn_of_other_options(folder: Path, found: Found) -> None:
    if found and dist.get_rank() == 0:
        log.warning("%s: the run goes on with another configuration: %s", folder, _spelled(found, "; "))


def to_load(saved: int, worker: int, workers: int) -> list[tuple[int, bool]]:
    """The saved workers whose states a worker loads for their mean, one after another, and whether each counts.

    Every worker loads as many, since it may meet the others in it, and the last saved one last. They share the saved
    ones where that means less to read than if each loaded all of them.
    """
    rounds = math.ceil(saved / workers)
    if saved <= rounds + 1:
        return [(one, True) for one in range(saved)]
    mine = range(worker, saved, workers)
    return [*((one, True) for one in mine), *[(saved - 1, False)] * (rounds - len(mine) + 1)]


@torch.no_grad()
def mean_of_states(replica: Averaged, loaded: Iterable[bool], saved: int, group: Group) -> None:
    """Leave the mean of the saved workers' optimizer states in the optimizer.

    State that is not floating point (step counters as integers) and single numbers are those of the last one loaded;
    workers have counted the same steps but for overflows. The sums are on the host, in fp64: 8 bytes an element.

    Args:
        loaded: loads workers of to_load() one after another, and yields after each whether it counts.
        saved: how many workers were saved.
        group: the ranks that hold the same part of the parameters, one from each worker.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    counted = 0
    for counts in loaded:
        counted += counts
        for place, name, value in replica.state_tensors() if counts else ():
            if (place, name) not in sums:
                sums[place, name] = torch.zeros_like(value, dtype=torch.float64, device="cpu")
            sums[place, name].add_(value.cpu())
    for place, name, value in replica.state_tensors():
        total = sums.pop((place, name), None)
        if total is None:
            total = torch.zeros_like(value, dtype=torch.float64, device="cpu")
        dense = value.is_contiguous() and total.is_contiguous()
        parts = (
            zip(*(torch.split(t.view(-1), PIECE // 8) for t in (total, value)), strict=True)
            if dense
            else [(total, value)]
        )
        for part, there in parts:
            exact = part.to(there.device).contiguous()
            if counted < saved:
                dist.all_reduce(exact, group=group)
            there.copy_(exact.div_(saved))


def _spelled(found: Found, between: str = ", ") -> str:
    return between.join(f"{key} was {then!r} and is {now!r}" for key, (then, now) in sorted(found.items()))
