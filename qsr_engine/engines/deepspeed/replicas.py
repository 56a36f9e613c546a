"""Where DeepSpeed's optimizers keep the fp32 masters, the gradients and the state of one rank, and what derives from
them.

    stage 0, fp32                      the parameters themselves (`Parameters`)
    stage 0, bf16 or fp16, FusedAdam   `fp32_groups_flat`, flat (`FlatMasters`)
    stage 0, bf16 or fp16, others      `fp32_groups`, a tensor a parameter (`MasterPerParameter`)
    stages 1 and 2                     `single_partition_of_fp32_groups`, flat, a part of them (`Partition`)
    stage 1, BF16_Optimizer            `fp32_groups_flat_partition`, likewise (`BF16Partition`)
    stage 3                            `fp32_partitioned_groups_flat`, flat, a part of every parameter (`Stage3`)

A master that changed must be followed by what is made from it: low-precision copies, gathered parameters, the
parameters that stage 3 keeps gathered, and its secondary copies. `refresh()` does that, inside the worker. (DeepSpeed's
own `refresh_fp32_params()` goes the other way and would undo an averaging.)
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from qsr_engine.averaging import flat_buckets, place_in
from qsr_engine.averaging.fragments import by_tensor
from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.replica import Parameters, Replica, dense_gradients, numbers_by_layer


class Wrapped(Replica):
    """The masters are those of a wrapper that DeepSpeed has put around torch's optimizer.

    Args:
        device: on which the module computes.
    """

    def __init__(self, module: nn.Module, wrapper: Any, device: torch.device) -> None:
        super().__init__(module, wrapper.optimizer)
        self.wrapper = wrapper
        self.device = device

    @property
    def trained(self) -> int:
        return sum(map(len, trained_groups(self.wrapper)))


class OfStage0(Wrapped):
    """Every rank holds all masters."""

    @abc.abstractmethod
    def master_of(self, parameter: Tensor) -> Tensor:
        """In the parameter's shape; the parameter itself where it has none (frozen)."""

    def whole(self, parameter: Tensor) -> Tensor:
        return self.master_of(parameter)

    def put(self, parameter: Tensor, value: Tensor) -> None:
        self.master_of(parameter).data.copy_(value)

    def gradients(self) -> list[Tensor]:
        return dense_gradients(self.parameters())

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.wrapper.fp16_groups for parameter in group]


class OfZero(Wrapped):
    """Every rank of a worker holds a part of the masters."""

    sharded = True

    def __init__(self, module: nn.Module, wrapper: Any, device: torch.device) -> None:
        super().__init__(module, wrapper, device)
        self._trained = frozenset(parameter for group in trained_groups(wrapper) for parameter in group)

    def whole(self, parameter: Tensor) -> Tensor:
        value: Tensor | None = safe_get_full_fp32_param(parameter) if parameter in self._trained else None
        if value is None and hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return parameter if value is None else value

    def sum_over_shards(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        dist.all_reduce(values, group=self.wrapper.dp_process_group)
        return values

    def put(self, parameter: Any, value: Tensor) -> None:
        if parameter in self._trained:
            if hasattr(parameter, "ds_id"):  # in parts of equal size, the last one padded
                size, ranks = parameter.partition_numel(), dist.get_world_size(parameter.ds_process_group)
                parts = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel())).view(ranks, size)
                part = parts[dist.get_rank(parameter.ds_process_group)]
                safe_set_local_fp32_param(parameter, part.to(self.device))
            else:
                safe_set_full_fp32_param(parameter, value.to(self.device))
        elif hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)


class MasterPerParameter(OfStage0):
    """Stage 0 in bf16 or fp16, FP16_UnfusedOptimizer: a master for every parameter."""

    def masters(self) -> list[Tensor]:
        return [master for group in self.wrapper.fp32_groups for master in group]

    def buckets(self, bucket_bytes: int) -> list[Tensor]:
        return flat_buckets(self.masters(), bucket_bytes)

    def fragments(self, buckets: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        return by_tensor(buckets, self.masters(), numbers_by_layer(self.module, self.parameters(), count), count)

    def master_of(self, parameter: Tensor) -> Tensor:
        pairs = zip(self.parameters(), self.masters(), strict=True)
        return next((master for copy, master in pairs if copy is parameter), parameter)

    @torch.no_grad()
    def refresh(self) -> None:
        torch._foreach_copy_(self.parameters(), self.masters())

    @torch.no_grad()
    def flat_copies(self, buckets: Sequence[Tensor]) -> list[Tensor]:
        """The parameters move into buckets of their own, each to where its master is in the masters' buckets."""
        pairs = list(zip(self.parameters(), self.masters(), strict=True))
        copies = [torch.zeros_like(bucket, dtype=pairs[0][0].dtype) for bucket in buckets]
        for parameter, master in pairs:
            if parameter.numel():
                bucket, start, _ = place_in(master, buckets)
                place = torch.as_strided(copies[bucket], master.shape, master.stride(), start)
                parameter.data = place.copy_(parameter)
        return copies


class FlatMasters(OfStage0):
    """Stage 0 in bf16 or fp16, FP16_Optimizer (FusedAdam): a flat master for every parameter group."""

    def masters(self) -> list[Tensor]:
        return list(self.wrapper.fp32_groups_flat)

    def master_of(self, parameter: Tensor) -> Tensor:
        for group, flat in zip(self.wrapper.fp16_groups, self.masters(), strict=True):
            start = 0
            for copy in group:
                if copy is parameter:
                    return flat[start : start + copy.numel()].view(copy.shape)
                start += copy.numel()
        return parameter

    @torch.no_grad()
    def refresh(self) -> None:
        for copy, master in zip(self.wrapper.fp16_groups_flat, self.masters(), strict=True):
            copy.copy_(master)

    def flat_copies(self, buckets: Sequence[Tensor]) -> list[Tensor]:
        return [copy for copy in self.wrapper.fp16_groups_flat if copy.numel()]


class Partition(OfZero):
    """Stages 1 and 2: every rank of a worker holds a part of the flat masters, on a CPU under offload_optimizer."""

    def masters(self) -> list[Tensor]:
        return list(self.wrapper.single_partition_of_fp32_groups)

    def refresh(self) -> None:
        self.wrapper.update_lp_params()

    def gradients(self) -> list[Tensor]:
        """Under offload DeepSpeed copies them to the CPU behind the backward, and waits for it in its step."""
        if self.wrapper.cpu_offload:
            self.wrapper._wait_for_offload_copies()
            return [master.grad for master in self.masters() if master.grad is not None]
        return [gradient for group in self.wrapper.averaged_gradients.values() for gradient in group]

    def gradients_changed(self) -> None:
        """Under offload DeepSpeed measures norm and overflow while it copies the gradients to the CPU."""
        optimizer = self.wrapper
        if not optimizer.cpu_offload:
            return
        for parameters in optimizer.params_in_partition:
            for identity in map(optimizer.get_param_id, parameters):
                group, _, start, size = optimizer.grad_position[identity]
                gradient = self.masters()[group].grad
                if identity in optimizer.norm_for_param_grads and gradient is not None:
                    norm = gradient.view(-1).narrow(0, start, size).double().norm(2)
                    optimizer.norm_for_param_grads[identity] = norm
        optimizer.local_overflow = not all(bool(g.isfinite().all()) for g in self.gradients())

    def flat_copies(self, buckets: Sequence[Tensor]) -> list[Tensor]:
        return list(self.wrapper.bit16_groups_flat)

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.wrapper.bit16_groups for parameter in group]

    @property
    def why_no_overlap(self) -> str | None:
        if self.wrapper.cpu_offload:
            return "the masters are on the CPU (zero_optimization.offload_optimizer), and their copies elsewhere"
        return None


class BF16Partition(OfZero):
    """Stage 1 in bf16 with gradients accumulated in fp32: DeepSpeed's BF16_Optimizer."""

    def masters(self) -> list[Tensor]:
        return list(self.wrapper.fp32_groups_flat_partition)

    def refresh(self) -> None:
        self.wrapper.update_lp_params()

    def gradients(self) -> list[Tensor]:
        return list(self.wrapper.fp32_groups_gradient_flat_partition)

    def flat_copies(self, buckets: Sequence[Tensor]) -> list[Tensor]:
        return list(self.wrapper.bf16_groups_flat)

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.wrapper.bf16_groups for parameter in group]


class Stage3(OfZero):
    """Stage 3: every rank of a worker holds a part of every parameter, in flat sub-groups."""

    def __init__(self, module: nn.Module, wrapper: Any, device: torch.device) -> None:
        super().__init__(module, wrapper, device)
        self._clear_padding()

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """A part is padded where the ranks of a worker do not divide a parameter. DeepSpeed leaves there what the
        memory held, which can be NaN, and which a boundary would refuse."""
        optimizer = self.wrapper
        for group, master in enumerate(self.masters()):
            start = 0
            for parameter in optimizer.fp16_groups[group]:
                size = parameter.ds_tensor.ds_numel
                before = size * optimizer._get_param_partition_rank(parameter)
                real = min(max(parameter.ds_numel - before, 0), size)
                master[start + real : start + size] = 0
                start += size

    def masters(self) -> list[Tensor]:
        return list(self.wrapper.fp32_partitioned_groups_flat)

    def refresh(self) -> None:
        """As DeepSpeed does at the end of its step."""
        optimizer = self.wrapper
        optimizer._partition_all_parameters()  # a forward since the step may have left some gathered
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    def gradients(self) -> list[Tensor]:
        """Whole under offload too: DeepSpeed copies them on a stream for which its backward waits at its end."""
        return [self.wrapper.grad_partitions_flat_buffer]

    def gradients_changed(self) -> None:
        """Under offload the optimizer's are copies on the CPU, made by way of the GPU, and its step waits for none."""
        if self.wrapper.offload_optimizer:
            self.wrapper._finalize_offload_gradient_accumulation()
            get_accelerator().synchronize()

    def parameters(self) -> list[Tensor]:
        return []

    @property
    def why_no_overlap(self) -> str | None:
        return "stage 3 gathers a parameter by a collective when it is read, for which a forward cannot wait"


def trained_groups(optimizer: Any) -> list[list[Tensor]]:
    """The module's parameters by group of the optimizer, in the order in which they are averaged."""
    attributes = ("fp16_groups", "bit16_groups", "bf16_groups")
    found = next((name for name in attributes if hasattr(optimizer, name)), None)
    groups: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
    return groups if found is None else getattr(optimizer, found)


_KINDS: tuple[tuple[str, type[Wrapped]], ...] = (
    ("fp32_partitioned_groups_flat", Stage3),
    ("single_partition_of_fp32_groups", Partition),
    ("fp32_groups_flat_partition", BF16Partition),
    ("fp32_groups_flat", FlatMasters),
    ("fp32_groups", MasterPerParameter),
)


def replica_of(module: nn.Module, optimizer: Any, device: torch.device) -> Replica:
    """The replica of a DeepSpeed engine's module and optimizer.

    Raises:
        ConfigError: the optimizer is of a kind that is not known here.
    """
    kind = next((kind for attribute, kind in _KINDS if hasattr(optimizer, attribute)), None)
    replica: Replica
    if kind is not None:
        replica = kind(module, optimizer, device)
    elif isinstance(optimizer, torch.optim.Optimizer):
        replica = Parameters(module, optimizer)
    else:
        raise ConfigError(
            f"DeepSpeed made a {type(optimizer).__name__} for this configuration, and where it keeps its fp32 masters "
            "is not known here; write ZeRO stage 0 to 3 with a plain optimizer such as AdamW or SGD"
        )
    _check_frozen(replica)
    strange = {str(m.dtype) for m in replica.masters() if m.dtype not in (torch.float32, torch.float64)}
    if strange:
        raise ConfigError(
            f"the masters are {', '.join(sorted(strange))}, in which averages lose what small steps have changed; "
            "write bf16 or fp16 with fp32 masters (leave out bf16_master_weights_and_grads and the like)"
        )
    return replica


def _check_frozen(replica: Replica) -> None:
    """Raises ConfigError where the optimizer holds a frozen parameter that could not be averaged."""
    frozen = {str(m.dtype) for m in replica.masters() if not m.requires_grad and m.dtype == torch.bfloat16}
    if isinstance(replica, Parameters) and frozen:
        raise ConfigError(
            "the optimizer was given frozen parameters in bfloat16, which take no part in averages; give initialize() "
            "those that are trained: model_parameters=[p for p in model.parameters() if p.requires_grad]"
        )
