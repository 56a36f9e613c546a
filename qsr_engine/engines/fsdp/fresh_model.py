"""A model's first values: those of rank 0, on every rank; made there where the model is on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.config.strict import ConfigError

Init = Callable[[nn.Module], None]  # fills what a module holds itself


@torch.no_grad()
def give_values_of_rank_0(
    block: nn.Module, done: set[nn.Module], device: torch.device, init: Init | None, *, contiguous: bool
) -> None:
    """Put a block on the device, with the values that rank 0 has, but for the modules that are done.

    Args:
        init: fills what a module on the meta device holds itself; None is its own reset_parameters().
        contiguous: make parameters contiguous, as FSDP needs them.
    Raises:
        ConfigError: a module on the meta device cannot fill what it holds.
    """
    tensors: dict[int, Tensor] = {}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in block.modules():
        if module in done:
            continue
        if any(tensor.is_meta for tensor in _own(module)):
            _fill(module, device, init, made)
        for parameter in module._parameters.values():
            if parameter is not None:
                there = parameter.data.to(device)
                parameter.data = there.contiguous() if contiguous else there
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device).contiguous()  # an expanded one cannot be written to
        tensors.update((id(tensor), tensor) for tensor in _own(module))
    for tensor in tensors.values():
        there = tensor.detach().contiguous()
        dist.broadcast(there, 0)
        if there.data_ptr() != tensor.data_ptr():
            tensor.data.copy_(there)


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    yield from (buffer for buffer in module._buffers.values() if buffer is not None)


def _fill(module: nn.Module, device: torch.device, init: Init | None, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Give memory to what a module on the meta device holds itself, and values; a filler tells what was left out.

    Args:
        made: what was made of parameters on the meta device so far, since weights may be shared.
    """
    kind = type(module).__name__
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            if parameter not in made:
                value = torch.full_like(parameter, _filler(parameter), device=device)
                made[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.full_like(buffer, _filler(buffer), device=device)
    before = {name: tensor._version for name, tensor in module._buffers.items() if tensor is not None}
    if init is None:
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise ConfigError(
                f"the model is on the meta device, and a {kind} holds tensors and has no reset_parameters(); give "
                "initialize_fsdp(init=...), a function that fills what a module holds itself"
            )
        reset()
    else:
        init(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and _left_out(tensor, before.get(name)):
            raise ConfigError(f"the model is on the meta device, and {name!r} of a {kind} was not filled by its init")


def _filler(tensor: Tensor) -> float:
    """A value that no initialization leaves; of a bool, any."""
    if tensor.is_floating_point() or tensor.is_complex():
        return float("nan")
    return 0 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max


def _left_out(tensor: Tensor, version: int | None) -> bool:
    """Whether a tensor still holds the filler; a bool, whether nothing has written to it."""
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    if tensor.dtype == torch.bool:
        return tensor._version == version
    return bool((tensor == torch.iinfo(tensor.dtype).max).any())
