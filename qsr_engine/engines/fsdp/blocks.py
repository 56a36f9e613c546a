"""Which parts of a model are gathered, checkpointed and compiled as one: its blocks.

A transformer's blocks and a ResNet's stages are found by themselves, from how the model is built: children of one
container (nn.Sequential, nn.ModuleList, or any module where there are none) that are of the same class and have
children of their own. Where several containers hold such children of the same class, as the four stages of a ResNet do,
each container is a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from qsr_engine.config.strict import ConfigError

Wrap = type[nn.Module] | Iterable[type[nn.Module]] | Callable[[nn.Module], bool]
_CONTAINERS = (nn.Sequential, nn.ModuleList)


def find_blocks(model: nn.Module, wrap: Wrap | None = None) -> list[nn.Module]:
    """The blocks of a model, inner ones before those that hold them; the model itself is none.

    Args:
        wrap: a class or classes whose modules are blocks, or a function that says of a module whether it is one; None
            finds them.
    Raises:
        ConfigError: `wrap` chooses nothing, or a module without a forward of its own.
    """
    if wrap is None:
        chosen = list(_found(model))
    else:
        is_block = _predicate(wrap)
        chosen = [module for module in model.modules() if module is not model and is_block(module)]
        if not chosen:
            raise ConfigError(
                f"wrap chooses no module of the {type(model).__name__}; give classes of its blocks, or leave it out"
            )
        for module in chosen:
            if not _has_forward(module):
                raise ConfigError(
                    f"wrap chooses a {type(module).__name__}, which has no forward of its own; choose what it holds"
                )
    shared = _shared_parameters(model)
    chosen = [m for m in chosen if any(True for _ in m.parameters()) and not _shares(m, shared)]
    depth = {module: name.count(".") for name, module in model.named_modules()}
    return sorted(dict.fromkeys(chosen), key=lambda module: -depth[module])


def _predicate(wrap: Wrap) -> Callable[[nn.Module], bool]:
    if isinstance(wrap, str):
        raise ConfigError(f"wrap is {wrap!r}; give classes of modules, or a function of a module")
    if isinstance(wrap, type):
        wrap = [wrap]
    if callable(wrap):
        return wrap
    classes = tuple(wrap)
    return lambda module: isinstance(module, classes)


def _found(model: nn.Module) -> Iterator[nn.Module]:
    containers = list(_containers(model, _CONTAINERS)) or list(_containers(model, (nn.Module,)))
    holders = Counter(kind for _, _, kind in containers)
    for container, children, kind in containers:
        if holders[kind] > 1 and isinstance(container, nn.Sequential):
            yield container
        else:
            yield from children


def _containers(
    module: nn.Module, classes: tuple[type[nn.Module], ...]
) -> Iterator[tuple[nn.Module, list[nn.Module], type[nn.Module]]]:
    """(container of one of these classes, its blocks, their class), the outermost ones."""
    if isinstance(module, classes):
        kinds = Counter(type(child) for child in module.children() if _is_composite(child))
        if kinds:
            kind, count = kinds.most_common(1)[0]
            if count > 1:
                yield module, [child for child in module.children() if type(child) is kind], kind
                return
    for child in module.children():
        yield from _containers(child, classes)


def _is_composite(module: nn.Module) -> bool:
    """It has children, a forward of its own, and parameters."""
    return _has_forward(module) and any(True for _ in module.children()) and any(True for _ in module.parameters())


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _shared_parameters(model: nn.Module) -> dict[int, int]:
    """How often each parameter stands in the model, by its id."""
    counts = Counter(
        id(parameter)
        for _, module in model.named_modules(remove_duplicate=False)  # a module may stand in several places
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {identity: count for identity, count in counts.items() if count > 1}


def _shares(block: nn.Module, shared: dict[int, int]) -> bool:
    """Whether a parameter of the block stands outside of it too: FSDP would untie it, so the block is left whole."""
    if not shared:
        return False
    inside = _shared_parameters(block)
    own = {id(parameter) for parameter in block.parameters()}
    return any(identity in own and inside.get(identity, 1) < count for identity, count in shared.items())
