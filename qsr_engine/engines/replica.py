"""What one rank trains and a boundary averages: its masters, what derives from them, buffers and optimizer state.

Where DeepSpeed keeps its masters is written in deepspeed/replicas.py, where FSDP keeps them in fsdp/shards.py.
`Parameters` is the plain case: the optimizer holds the model's own parameters.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging import Averager, bucket_bytes, flat_buckets, place_in
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.local_steps.averaged import Averaged


class Replica(Averaged, abc.ABC):
    """One rank's part of a worker's replica. Its *masters* are the fp32 tensors that the optimizer updates.

    Args:
        module: the model.
        optimizer: torch's, whose state belongs to the masters.
    """

    sharded = False  # whether a rank holds a part of the masters of its worker only
    overlaps_with = "a worker_size of 1 with ZeRO stage 0, 1 or 2 without offload"  # the next forward
    may_be_shared = True  # whether the masters' memory may move into shared memory, on a CPU

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module = module
        self.optimizer = optimizer

    def largest_rate(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @abc.abstractmethod
    def masters(self) -> list[Tensor]:
        """The masters, as the optimizer holds them."""

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        """The masters as flat buckets, which averaging changes in place."""
        return [master.detach() for master in self.masters() if master.numel()]

    @abc.abstractmethod
    def whole(self, parameter: Tensor) -> Tensor:
        """The master of a parameter in its shape; the parameter itself where it is not trained.

        Collective in a worker that shards its masters.
        """

    @abc.abstractmethod
    def put(self, parameter: Tensor, value: Tensor) -> None:
        """Give the master of a parameter a value that every rank has; refresh() follows."""

    @abc.abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradients of the masters, reduced inside the worker, not yet clipped nor unscaled."""

    def gradients_changed(self) -> None:  # most have nothing to do
        """The gradients have been averaged: bring what was measured on the old ones up to date."""

    def buffers(self) -> list[Tensor]:
        return [buffer for buffer in self.module.buffers() if buffer.is_floating_point()]

    def state(self, name: str) -> list[Tensor | None]:
        states = self.optimizer.state
        return [states[master].get(name) if master in states else None for master in self.masters()]

    def state_to_average(self, name: str) -> list[Tensor]:
        return [
            torch.zeros_like(master) if state is None else state
            for master, state in zip(self.masters(), self.state(name), strict=True)
        ]

    def state_names(self) -> list[str]:
        return list(dict.fromkeys(name for state in self.optimizer.state.values() for name in state))

    def state_tensors(self) -> Iterator[tuple[int, str, Tensor]]:
        for name in self.state_names():
            for place, (master, value) in enumerate(zip(self.masters(), self.state(name), strict=True)):
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == master.shape:
                    yield place, name, value

    def flat_copies(self, buckets: Sequence[Tensor]) -> list[Tensor] | None:
        """Flat low-precision copies, laid out as the buckets; None where the model reads the buckets themselves."""
        return None

    def parameters(self) -> list[Tensor]:
        """The model's parameters that are made of the masters, where each is made of elements of this rank only."""
        return self.masters()

    @property
    def why_no_overlap(self) -> str | None:
        """Why the next forward cannot wait for single parameters; None where it can."""
        return None


class Parameters(Replica):
    """The optimizer holds the model's parameters: stage 0 in fp32, and a worker of one rank in fp32."""

    def masters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        return flat_buckets(self.masters(), bucket_bytes)

    def whole(self, parameter: Tensor) -> Tensor:
        return parameter

    def put(self, parameter: Tensor, value: Tensor) -> None:
        parameter.data.copy_(value)

    def gradients(self) -> list[Tensor]:
        return dense_gradients(self.masters())


def dense_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of parameters; zeros for those not used in this step here, which another worker may have used."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def make_averager(
    replica: Replica, qsr: QSRConfig, across: dist.ProcessGroup, worker: dist.ProcessGroup, device: torch.device
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
    if not replica.may_be_shared:
        options = options.model_copy(update={"shared_memory": False})
    averager = Averager(
        replica.buckets(bucket_bytes(options.bucket_mb, across)),
        across,
        options,
        shard_group=worker if replica.sharded else None,
        tensors=replica.masters,
        device=device,
        outer=qsr.outer,
    )
    if options.overlap == "next_forward":
        _overlap(averager, replica, qsr.worker_size)
    return averager


def _overlap(averager: Averager, replica: Replica, worker_size: int) -> None:
    """Say of which elements of the buckets each parameter of the model is made."""
    why = replica.why_no_overlap
    if replica.sharded and worker_size > 1:
        why = why or (
            f"qsr.worker_size is {worker_size} under ZeRO, where a rank holds a part of the masters, so a parameter is "
            "whole only after a collective inside the worker, for which a forward cannot wait"
        )
    if why:
        raise ConfigError(
            f"qsr.averaging.overlap is 'next_forward', and {why}; write overlap 'none' or 'delayed', or "
            f"{replica.overlaps_with}"
        )
    copies = replica.flat_copies(averager.buckets)
    places = [
        (parameter, *place_in(parameter, copies or averager.buckets))
        for parameter in replica.parameters()
        if parameter.numel()
    ]

    @torch.no_grad()
    def refresh(part: Tensor) -> None:
        if copies is not None:
            bucket, start, stop = place_in(part, averager.buckets)
            copies[bucket][start:stop].copy_(part)

    averager.overlap_with(replica.module, places, refresh)


def check_state_names(names: Sequence[str], replica: Replica) -> None:
    """Check averaging.state against the state that an optimizer keeps for a parameter, before any training.

    One step of an optimizer of its class on a parameter of its own tells what it keeps; a class that cannot be made
    from its own defaults is trusted.

    Raises:
        ConfigError: the optimizer keeps nothing of this name.
    """
    if not names:
        return
    optimizer = replica.optimizer
    parameter = nn.Parameter(torch.zeros(2, device=replica.masters()[0].device))
    parameter.grad = torch.zeros_like(parameter)
    accepted = inspect.signature(type(optimizer).__init__).parameters
    try:
        trial = type(optimizer)(
            [parameter],
            **{key: value for key, value in optimizer.param_groups[0].items() if key in accepted and key != "params"},
        )
        trial.step()
    except Exception:
        return
    kept = sorted(k for k, v in trial.state[parameter].items() if isinstance(v, Tensor) and v.shape == parameter.shape)
    unknown = [name for name in names if name not in kept]
    if unknown:
        raise ConfigError(
            f"qsr.averaging.state names {unknown}, and {type(optimizer).__name__} as configured keeps {kept}; write "
            "names among these, or []"
        )
