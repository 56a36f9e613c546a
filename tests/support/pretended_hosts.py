"""Hosts that are pretended: the processes of a job believe to be on the hosts it names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

TWO_OF_TWO = [0, 0, 1, 1]  # the host of each rank
APART = [0, 1, 0, 1]


@contextlib.contextmanager
def pretended(hosts: list[int]) -> Iterator[None]:
    """This process believes to be on the host that the list gives for its rank."""
    from qsr_engine.averaging import choose

    true = choose._host
    choose._host = lambda: (*(true() or ()), f"pretended {hosts[int(os.environ['RANK'])]}")
    try:
        yield
    finally:
        choose._host = true


def on_hosts(hosts: list[int], what: Callable[..., Any], **kwargs: Any) -> Any:
    """A job: another one on pretended hosts."""
    with pretended(hosts):
        return what(**kwargs)
