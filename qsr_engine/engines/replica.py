"""What an optimizer updates and a boundary averages: the masters of one rank, and what derives from them.

`Masters` is what both engines ask; where DeepSpeed keeps its masters is written in deepspeed/replicas.py, where FSDP
keeps them in fsdp.py. `Parameters` is the plain case: the optimizer is torch's and holds the model's own parameters.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging import Averager, LeftOut, average_packed, bucket_bytes, flat_buckets, place_in
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError


class Masters(abc.ABC):
    """The fp32 parameters that this rank's optimizer updates."""

    sharded = False  # whether a rank holds a part of the masters of its worker only
    overlaps_with = "a worker_size of 1 with ZeRO stage 0, 1 or 2 without offload"  # the next forward
    may_be_shared = True  # whether their memory may move into shared memory, on a CPU

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer  # DeepSpeed's, or torch's
        self.module: nn.Module = engine.module

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose state belongs to the masters."""
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    @abc.abstractmethod
    def held(self) -> list[Tensor]:
        """The masters, as the optimizer holds them."""

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        """The masters as flat buckets, which averaging changes in place."""
        return [master.detach() for master in self.held() if master.numel()]

    def master_of(self, parameter: Tensor) -> Tensor:
        """The master of a parameter at stage 0, in its shape; the parameter itself where it has none (frozen)."""
        raise NotImplementedError("sharded masters are read through the engine, since no rank holds them whole")

    @abc.abstractmethod
    def refresh(self) -> None:
        """The masters have changed: bring what derives from them up to date. Collective inside the worker."""

    @abc.abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradients of the masters, reduced inside the worker, not yet clipped nor unscaled."""

    def gradients_changed(self) -> None:
        """The gradients have been averaged: bring what DeepSpeed measured on the old ones up to date."""
        return

    def state(self, name: str) -> list[Tensor | None]:
        """The optimizer's state of this name, for each of held(); None where it has none (yet)."""
        states = self.base_optimizer.state
        return [states[master].get(name) if master in states else None for master in self.held()]

    def state_to_average(self, name: str) -> list[Tensor]:
        """The state of this name for each of held(), zeros where it has none here: another worker may have some."""
        return [
            torch.zeros_like(master) if state is None else state
            for master, state in zip(self.held(), self.state(name), strict=True)
        ]

    def state_tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        """(number among held(), name, value) of the state that has a master's shape, which workers can average."""
        names = dict.fromkeys(name for state in self.base_optimizer.state.values() for name in state)
        for name in names:
            for place, (master, value) in enumerate(zip(self.held(), self.state(name), strict=True)):
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == master.shape:
                    yield place, name, value

    def copies(self, buckets: Sequence[Tensor]) -> list[Tensor] | None:
        """Flat low-precision copies, laid out as the buckets; None where the model reads the buckets themselves."""
        return None

    def parameters(self) -> list[Tensor]:
        """The model's parameters that are made of the masters, where each is made of elements of this rank only."""
        return self.held()

    @property
    def why_no_overlap(self) -> str | None:
        """Why the next forward cannot wait for single parameters; None where it can."""
        return None


class Parameters(Masters):
    """The optimizer is torch's and holds the model's parameters: stage 0 in fp32, and a worker of one rank in fp32."""

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def held(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        return flat_buckets(self.held(), bucket_bytes)

    def master_of(self, parameter: Tensor) -> Tensor:
        return parameter

    def refresh(self) -> None:
        return

    def gradients(self) -> list[Tensor]:
        return dense_gradients(self.held())


def make_averager(
    masters: Masters, qsr: QSRConfig, across: dist.ProcessGroup, worker: dist.ProcessGroup, device: torch.device
) -> Averager:
    """What is averaged at a boundary: the masters, in place.

    Args:
        across: the ranks that hold the same part of the parameters, one from each worker.
        worker: the ranks of this rank's worker.
        device: of the model, which under offload is not that of the masters.
    Raises:
        ConfigError: averaging.overlap asks for what these masters cannot do.
    """
    options = qsr.averaging
    if not masters.may_be_shared:
        options = options.model_copy(update={"shared_memory": False})
    averager = Averager(
        masters.buckets(bucket_bytes(options.bucket_mb, across)),
        across,
        options,
        shard_group=worker if masters.sharded else None,
        tensors=masters.held,
        device=device,
        outer=qsr.outer,
    )
    if options.overlap == "next_forward":
        _overlap(averager, masters, qsr.worker_size)
    return averager


def _overlap(averager: Averager, masters: Masters, worker_size: int) -> None:
    """Say of which elements of the buckets each parameter of the model is made."""
    why = masters.why_no_overlap
    if masters.sharded and worker_size > 1:
        why = why or (
            f"qsr.worker_size is {worker_size} under ZeRO, where a rank holds a part of the masters, so a parameter is "
            "whole only after a collective inside the worker, for which a forward cannot wait"
        )
    if why:
        raise ConfigError(
            f"qsr.averaging.overlap is 'next_forward', and {why}; write overlap 'none' or 'delayed', or "
            f"{masters.overlaps_with}"
        )
    copies = masters.copies(averager.buckets)
    places = [
        (parameter, *place_in(parameter, copies or averager.buckets))
        for parameter in masters.parameters()
        if parameter.numel()
    ]

    @torch.no_grad()
    def refresh(part: Tensor) -> None:
        if copies is not None:
            bucket, start, stop = place_in(part, averager.buckets)
            copies[bucket][start:stop].copy_(part)

    averager.overlap_with(masters.module, places, refresh)


@torch.no_grad()
def replace_state(masters: Masters, qsr: QSRConfig, across: dist.ProcessGroup, left_out: LeftOut) -> int:
    """Give the workers that are left out of an averaging the mean of the others' optimizer state.

    What is not finite in their parameters has been in their moments first, and has made others huge. Zeros would not
    do: Adam corrects its moments by a count of steps, and with zeros late in a run its steps are six times too large.
    Every rank must call it. The others' state stays as it is, and so do counts and averaging.state, which are averaged
    by themselves. What has not a master's shape (Adafactor's) becomes zero where it is not finite.

    Returns:
        Bytes that this rank sent.
    """
    names: list[set[str]] = [set()] * dist.get_world_size(across)
    dist.all_gather_object(names, {name for _, name, _ in masters.state_tensors()}, group=across)
    capacity, sent = bucket_bytes(qsr.averaging.bucket_mb, across), 0
    for name in sorted(set().union(*names) - set(qsr.averaging.state)):
        sent += average_packed(masters.state_to_average(name), across, capacity, left_out, give=True)
    if left_out.here:
        for name in dict.fromkeys(name for state in masters.base_optimizer.state.values() for name in state):
            for value in masters.state(name):
                if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                    value.zero_()
    return sent


def dense_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    found = list(_made_dense(parameters))
    return [gradient for gradient in found if gradient is not None]


def _made_dense(parameters: Sequence[Tensor]) -> Iterator[Tensor | None]:
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:  # not used in this step here; maybe on another worker
            parameter.grad = torch.zeros_like(parameter)
        yield parameter.grad


def check_state_names(names: Sequence[str], masters: Masters) -> Sequence[str]:
    """Check averaging.state against the state that an optimizer keeps for a parameter, before any training.

    One step of an optimizer of its class on a parameter of its own tells what it keeps; a class that cannot be made
    from its own defaults is trusted.

    Raises:
        ConfigError: the optimizer keeps nothing of this name.
    """
    if not names:
        return names
    optimizer = masters.base_optimizer
    parameter = nn.Parameter(torch.zeros(2, device=masters.held()[0].device))
    parameter.grad = torch.zeros_like(parameter)
    accepted = inspect.signature(type(optimizer).__init__).parameters
    try:
        trial = type(optimizer)(
            [parameter],
            **{key: value for key, value in optimizer.param_groups[0].items() if key in accepted and key != "params"},
        )
        trial.step()
    except Exception:
        return names
    kept = sorted(k for k, v in trial.state[parameter].items() if isinstance(v, Tensor) and v.shape == parameter.shape)
    unknown = [name for name in names if name not in kept]
    if unknown:
        raise ConfigError(
            f"qsr.averaging.state names {unknown}, and {type(optimizer).__name__} as configured keeps {kept}; write "
            "names among these, or []"
        )
    return names
