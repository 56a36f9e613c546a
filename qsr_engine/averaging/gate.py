"""A model that waits for each parameter when it reads it, for the pieces that it lies in and for no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class _Guarded(dict[str, Any]):
    """The parameters of a module, by name; reading one waits for it.

    It takes the place of `module._parameters`, where every access of torch ends: `module.weight`, also from outside
    of its forward, `state_dict()`, `named_parameters()`. DeepSpeed gathers the parameters of ZeRO-3 in the same way.
    """

    def __init__(self, parameters: Mapping[str, Any], wait: Callable[[Tensor], None]) -> None:
        super().__init__(parameters)
        self._wait = wait

    def _read(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._wait(value)
        return value

    def __getitem__(self, name: str) -> Any:
        return self._read(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._read(super().get(name, default))

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]

    def __iter__(self) -> Iterator[str]:  # overridden, so that dict(self) and {**self} go through __getitem__
        return super().__iter__()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles of the module are plain
        return dict, (self.copy(),)


class _Uses(TorchFunctionMode):
    """Tells of every tensor that a function of torch gets, in this thread, while it is entered."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._tell = tell
        self.on = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._tell(leaf)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.on = True
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        self.on = False
        super().__exit__(*exception)  # type: ignore[no-untyped-call]


class Gate:
    """Lets a model's own reads of its parameters wait, and tells in which order a forward reads them.

    Args:
        module: the model.
        needs: for every parameter that is averaged, the pieces that it lies in.
    """

    def __init__(self, module: nn.Module, needs: Mapping[Tensor, Sequence[int]]) -> None:
        self._module = module
        self.needs = needs
        self._traced = False  # a compiler looked at a read
        self._owners = [
            child for child in module.modules() if any(p is not None and p in needs for p in child._parameters.values())
        ]
        self._hooks: list[Any] = []
        self._plain: list[tuple[nn.Module, dict[str, Any]]] = []  # what `_parameters` was before
        self._seen: dict[Tensor, None] = {}  # the parameters in the order of the recorded forward
        self._hidden: set[Tensor] = set()  # used before it was read, so held by somebody
        self.recorded = False

    def record(self) -> None:
        """Note in which order the model's next forward reads the parameters."""
        uses = _Uses(self._use_unread)

        def begin(module: nn.Module, *_: Any) -> None:
            if module is self._module and not uses.on:  # a copy of the model has the same hooks
                uses.__enter__()

        def end(module: nn.Module, *_: Any) -> None:
            if module is self._module and uses.on:
                uses.__exit__(None, None, None)
                self.recorded = True
                self.remove()

        def note(parameter: Tensor) -> None:
            if torch.compiler.is_compiling():
                self._traced = True
            if uses.on and parameter in self.needs:
                self._seen[parameter] = None

        self._install(note, first=begin)
        self._hooks.append(self._module.register_forward_hook(end, always_call=True))

    def _use_unread(self, tensor: Tensor) -> None:
        """A function got a tensor: if it is a parameter that nobody has read, somebody holds it otherwise."""
        if tensor in self.needs and tensor not in self._seen:
            self._hidden.add(tensor)

    def order(self, pieces: int) -> list[int]:
        """All pieces, in the order in which the recorded forward needs them, after those of `unseen()`."""
        wanted = [index for parameter in (*self.unseen(), *self._seen) for index in self.needs[parameter]]
        return list(dict.fromkeys([*wanted, *range(pieces)]))

    def unseen(self) -> list[Tensor]:
        """The parameters that no read was seen of in the recorded forward, or not before they were used.

        They may be read in ways that cannot be seen (from a list that holds them, by compiled code), so a forward must
        not begin before they are averaged.
        """
        compiled = self.compiled()
        return [p for p in self.needs if compiled or p not in self._seen or p in self._hidden]

    def compiled(self) -> bool:
        """Whether a part of the model is compiled: compiled code reads parameters without asking the module."""
        return self._traced or any(_is_compiled(module) for module in self._module.modules())

    def guard(self, wait: Callable[[int], None]) -> None:
        """From now on, a read of a parameter waits for its pieces, and a forward for those of `unseen()`."""
        unseen = self.unseen()

        def wait_for(parameter: Tensor) -> None:
            for index in self.needs.get(parameter, ()):
                wait(index)

        def begin(module: nn.Module, *_: Any) -> None:
            if module is self._module:
                for parameter in unseen:
                    wait_for(parameter)

        self._install(wait_for, first=begin)

    def remove(self) -> None:
        """Reads go on as if there had never been a gate. Again is harmless."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module, plain in self._plain:
            plain.clear()
            plain.update(dict.items(module._parameters))  # as they are now: a read may have been a replacement
            module.__dict__["_parameters"] = plain
        self._plain.clear()

    def _install(self, wait: Callable[[Tensor], None], first: Callable[..., None]) -> None:
        self.remove()
        self._hooks.append(self._module.register_forward_pre_hook(first))
        for module in self._owners:
            self._plain.append((module, module._parameters))
            module.__dict__["_parameters"] = _Guarded(module._parameters, wait)


def _is_compiled(module: nn.Module) -> bool:
    optimized = getattr(torch._dynamo.eval_frame, "OptimizedModule", ()) if hasattr(torch, "_dynamo") else ()
    compiled = getattr(module, "_compiled_call_impl", None) is not None or isinstance(module, optimized)
    return compiled or hasattr(module.forward, "_torchdynamo_orig_callable")
