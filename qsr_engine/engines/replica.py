"""What one rank trains and a boundary averages: its masters, what derives from them, buffers and optimizer state.

Where DeepSpeed keeps its masters is written in deepspeed/replicas.py, where FSDP keeps them in fsdp/shards.py.
`Parameters` is the plain case: the optimizer holds the model's own parameters.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging import Averager, bucket_bytes, flat_buckets, place_in
from qsr_engine.averaging.chunks import CHUNK
from qsr_engine.averaging.fragments import balanced, by_tensor, check_fragments, cut
from qsr_engine.checkpoint.buffers import persistent_buffers
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.learning_rate import base_rate
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
        return base_rate(self.optimizer.param_groups)

    @abc.abstractmethod
    def masters(self) -> list[Tensor]:
        """The masters, as the optimizer holds them."""

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        """The masters as flat buckets, which averaging changes in place."""
        return [master.detach() for master in self.masters() if master.numel()]

    @property
    @abc.abstractmethod
    def trained(self) -> int:
        """How many parameters of the model the masters are made of."""

    def fragments(self, buckets: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        """Views of the buckets, which together are all of their elements: the fragments that are averaged by turns.

        Here by place: a flat master holds the layers of its group in their order, or this rank's part of each.
        """
        return cut(buckets, count)

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

    def buffers(self) -> dict[str, Tensor]:
        found = persistent_buffers(self.module)
        return {name: b for name, b in found.items() if b.is_floating_point() and b.layout == torch.strided}

    def all_buffers(self) -> list[Tensor]:
        return list(self.module.buffers())

    def state(self, name: str) -> list[Any]:
        states = self.optimizer.state
        return [states[master].get(name) if master in states else None for master in self.masters()]

    def groups(self) -> list[dict[str, Any]]:
        return list(self.optimizer.param_groups)

    def put_state(self, place: int, name: str, value: Any) -> None:
        self.optimizer.state[self.masters()[place]][name] = value

    def frozen(self) -> list[Tensor]:
        untrained = (parameter for parameter in self.module.parameters() if not parameter.requires_grad)
        return [getattr(parameter, "ds_tensor", parameter).detach() for parameter in untrained]

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

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """Their sum over the ranks of a worker that shards its masters; elsewhere the values themselves."""
        return values

    def norms(self) -> dict[str, Tensor]:
        """L2 norms of the worker's masters, "parameter_norm", and of those of STATES that it has, "exp_avg_norm", ...

        In fp64, on the device; nothing waits for it. Collective in a worker that shards its masters.
        """
        parts = [self.masters(), *([v for v in self.state(name) if isinstance(v, Tensor)] for name in STATES)]
        device = parts[0][0].device if parts[0] else torch.device("cpu")
        squares = self.sum_over_shards(torch.stack([sum_of_squares(part, device) for part in parts]))
        names = ["parameter", *STATES]
        return {f"{n}_norm": v for n, part, v in zip(names, parts, squares.sqrt().unbind(), strict=True) if part}

    def parameters(self) -> list[Tensor]:
        """The model's parameters that are made of the masters, where each is made of elements of this rank only."""
        return self.masters()

    @property
    def why_no_overlap(self) -> str | None:
        """Why the next forward cannot wait for single parameters; None where it can."""
        return None


STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # that AdamW and SGD keep, torch's and DeepSpeed's


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of all elements, an fp64 scalar on the device on which the tensors are; 0 of none.

    On a CPU in chunks: over 2e7 elements at once torch's norm is wrong by 1e-3, and over chunks by 1e-6, as fast.
    """
    whole = [tensor.detach().reshape(-1) for tensor in tensors]
    parts = [part for flat in whole for part in torch.split(flat, CHUNK)] if device.type == "cpu" else whole
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(parts)).double().square().sum()


class Parameters(Replica):
    """The optimizer holds the model's parameters: stage 0 in fp32, and a worker of one rank in fp32."""

    def masters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def trained(self) -> int:
        return len(self.masters())

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        return flat_buckets(self.masters(), bucket_bytes)

    def fragments(self, buckets: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        masters = self.masters()
        return by_tensor(buckets, masters, numbers_by_layer(self.module, masters, count), count)

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


def numbers_by_layer(module: nn.Module, parameters: Sequence[Tensor], fragments: int) -> list[int]:
    """The fragment of each parameter: layers as the module registers them, which is about the order of its forward.

    A layer is a module's own parameters; they stay together unless there are more fragments than layers.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    place = {identity: number for number, identity in enumerate(names)}
    in_order = sorted(parameters, key=lambda parameter: place.get(id(parameter), len(place)))
    layers: dict[str, list[Tensor]] = {}
    for parameter in in_order:
        layers.setdefault(names.get(id(parameter), "").rpartition(".")[0], []).append(parameter)
    units = list(layers.values()) if len(layers) >= fragments else [[parameter] for parameter in in_order]
    numbers = balanced([sum(p.numel() * p.element_size() for p in unit) for unit in units], fragments)
    found = {id(p): number for unit, number in zip(units, numbers, strict=True) for p in unit}
    return [found[id(parameter)] for parameter in parameters]


def make_averager(
    replica: Replica, qsr: QSRConfig, across: dist.ProcessGroup, worker: dist.ProcessGroup, device: torch.device
) -> Averager:
    """What is averaged at a boundary: the masters, in place.

    Args:
        across: the ranks that hold the same part of the parameters, one from each worker.
        worker: the ranks of this rank's worker.
        device: of the model, which under offload is not that of the masters.
    Raises:
        ConfigError: averaging.overlap asks for what these masters cannot do, or there are fewer parameters than
            averaging.fragments.
    """
    options = qsr.averaging
    check_fragments(options.fragments, replica.trained)
    if not replica.may_be_shared:
        options = options.model_copy(update={"shared_memory": False})
    buckets = replica.buckets(bucket_bytes(options.bucket_mb, across))
    averager = Averager(
        buckets,
        across,
        options,
        shard_group=worker if replica.sharded else None,
        tensors=replica.masters,
        device=device,
        outer=qsr.outer,
        fragments=replica.fragments(buckets, options.fragments) if options.fragments > 1 else None,
        movement=qsr.faults.outlier is not None,
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


def check_state_names(names: Sequence[str], optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Check averaging.state against the state that an optimizer keeps for a parameter, before any training.

    One step of an optimizer of its class on a vector and a matrix of its own tells what it keeps of either; a class
    that cannot be made from its own defaults is trusted.

    Args:
        device: of that step.
    Raises:
        ConfigError: the optimizer keeps nothing of this name.
    """
    if not names:
        return
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in ((2,), (2, 2))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    accepted = inspect.signature(type(optimizer).__init__).parameters
    try:
        trial = type(optimizer)(
            parameters,
            **{key: value for key, value in optimizer.param_groups[0].items() if key in accepted and key != "params"},
        )
        trial.step()
    except Exception:
        return
    kept = sorted(
        {
            name
            for parameter in parameters
            for name, value in trial.state[parameter].items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }
    )
    unknown = [name for name in names if name not in kept]
    if unknown:
        raise ConfigError(
            f"qsr.averaging.state names {unknown}, and {type(optimizer).__name__} as configured keeps {kept}; write "
            "names among these, or []"
        )
