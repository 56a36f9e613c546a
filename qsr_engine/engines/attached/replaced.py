"""An attribute of somebody else's class, replaced until a block ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is make(what it was); an owner without it (None, of a library that is not imported) is left alone.

    An inherited attribute is the owner's for so long, and inherited again afterwards.
    """
    if not hasattr(owner, name):
        yield
        return
    inherited, before = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, before)
