"""The time-outs of process groups: lifted while lost ranks are found by their beats, and then as they were."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PATIENCE = timedelta(days=7)
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # the name in torch 2.11
# For each group, how often it is lifted (two engines may share one), and the time-outs of its backends before.
_lifted: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[int, list[timedelta | None]]] = weakref.WeakKeyDictionary()


def lift(groups: Iterable[dist.ProcessGroup | None]) -> Callable[[], None]:
    """Let collectives of these groups wait for as long as they must. None stands for no group.

    Returns:
        Restores what was before, unless somebody else still needs them lifted; call it once.
    """
    there = [weakref.ref(group) for group in dict.fromkeys(groups) if group is not None]
    for reference in there:
        group = reference()
        assert group is not None
        count, before = _lifted.get(group, (0, []))
        _lifted[group] = count + 1, before or [_timeout_of(backend) for backend in _backends(group)]
        _set_timeout(_PATIENCE, group)

    def restore() -> None:
        for reference in there:
            group = reference()
            if group is not None and group in _lifted:
                _restore(group)

    return restore


def _restore(group: dist.ProcessGroup) -> None:
    count, before = _lifted.pop(group)
    if count > 1:
        _lifted[group] = count - 1, before
        return
    with contextlib.suppress(RuntimeError):  # the group is destroyed already
        for backend, timeout in zip(_backends(group), before, strict=True):
            if timeout is not None:
                backend._set_default_timeout(timeout)


def _timeout_of(backend: Any) -> timedelta | None:
    """None where the backend does not tell: it stays lifted."""
    try:
        found: timedelta = backend.options._timeout
    except (AttributeError, RuntimeError):
        return None
    return found


def _backends(group: dist.ProcessGroup) -> list[Any]:
    return list(dict.fromkeys(group._get_backend(device) for device in group._device_types))
