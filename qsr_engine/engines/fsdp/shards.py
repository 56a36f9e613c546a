"""Where FSDP keeps the masters of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qsr_engine.averaging import all_gather_flat
from qsr_engine.engines.replica import Parameters, numbers_by_layer


class Shards(Parameters):
    """FSDP's parameters: this rank's optimizer updates its shard of each, where FSDP keeps it.

    Args:
        mesh: (worker, shard).
        pinned: whether shards are on the CPU for a model on a GPU, and must stay where they are.
    """

    sharded = True
    overlaps_with = "a worker_size of 1 in fp32"

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        pinned: bool,
    ) -> None:
        super().__init__(module, optimizer)
        self._mesh, self._device = mesh, device
        self.may_be_shared = not pinned

    def masters(self) -> list[Tensor]:
        return [local_part(parameter) for parameter in super().masters()]

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        """Each shard is a bucket of its own: FSDP holds its memory, so it does not move."""
        return [shard.view(-1) for shard in self.masters() if shard.numel()]

    def fragments(self, buckets: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        """By whole parameters, so that every rank of a worker averages the same layers."""
        numbers, found = numbers_by_layer(self.module, super().masters(), count), [list[Tensor]() for _ in range(count)]
        held = [number for shard, number in zip(self.masters(), numbers, strict=True) if shard.numel()]
        for bucket, number in zip(buckets, held, strict=True):
            found[number].append(bucket)
        return found

    def refresh(self) -> None:
        """Gathered parameters that a forward without a backward has left are those from before."""
        reshard(self.module)

    def gradients(self) -> list[Tensor]:
        parameters = [parameter for parameter in super().masters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:  # not used in this step here; maybe on another worker
                parameter.grad = torch.zeros_like(parameter)
        return [gradient for p in parameters if (gradient := local_part(p.grad)).numel()]

    def state(self, name: str) -> list[Any]:
        states = self.optimizer.state
        found = [states[p].get(name) if p in states else None for p in super().masters()]
        return [local_part(value) if isinstance(value, Tensor) else value for value in found]

    def put_state(self, place: int, name: str, value: Any) -> None:
        parameter = super().masters()[place]
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == local_part(parameter).shape:
            shape, stride = parameter.shape, parameter.stride()
            value = DTensor.from_local(value, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
        self.optimizer.state[parameter][name] = value

    def frozen(self) -> list[Tensor]:
        return [local_part(p) for p in self.module.parameters() if not p.requires_grad]

    def whole(self, parameter: Tensor) -> Tensor:
        """Gathered inside the worker. FSDP shards rows, the last shards may be short."""
        shard = local_part(parameter)
        if not isinstance(parameter, DTensor):
            return shard
        rows, ranks = -(-parameter.shape[0] // self._mesh.size(1)), self._mesh.size(1)
        padded = torch.zeros(rows, *parameter.shape[1:], dtype=shard.dtype, device=self._device)
        padded[: shard.shape[0]] = shard
        gathered = padded.new_empty(rows * ranks, *parameter.shape[1:])
        all_gather_flat(gathered, padded, group=self._mesh.get_group("shard"))
        return gathered[: parameter.shape[0]]

    def sum_over_shards(self, values: Tensor) -> Tensor:
        values = values.to(self._device)
        dist.all_reduce(values, group=self._mesh.get_group("shard"))
        return values

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """No communication."""
        shard = local_part(parameter)
        if isinstance(parameter, DTensor):
            rows = -(-parameter.shape[0] // self._mesh.size(1))
            value = value[rows * self._mesh.get_local_rank("shard") :][: shard.shape[0]]
        shard.copy_(value)

    @property
    def why_no_overlap(self) -> str | None:
        return "FSDP gathers a parameter by a collective when it is read, for which a forward cannot wait"


class ComputedInCopies(Parameters):
    """The parameters of a worker of one rank that computes in bf16.

    Args:
        refresh: the copies that a forward has left are those from before.
    """

    overlaps_with = "a worker_size of 1 in fp32"

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, refresh: Callable[[], None]) -> None:
        super().__init__(module, optimizer)
        self._refresh = refresh

    def refresh(self) -> None:
        self._refresh()

    @property
    def why_no_overlap(self) -> str | None:
        return "the bf16 copies of all parameters are made when a forward begins"


def local_part(tensor: Any) -> Tensor:
    """This rank's part of a tensor, the very memory that FSDP holds."""
    return cast(Tensor, tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach())


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters, so that the module holds the shards again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
