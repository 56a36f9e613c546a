"""Hosts that are pretended: the processes of a job believe to be on the hosts it names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from tests.support.pool import undo

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


def files_of_its_own() -> None:
    """This rank believes to see other files than the others do, as on a host of its own. Until the job ends."""
    from qsr_engine.checkpoint import write

    undo.enter_context(mock.patch.object(write, "_files_seen", return_value=f"host {os.environ['RANK']}"))


WAYS: dict[str, dict[str, Any]] = {
    "TwoLevelSharedMemory": {},  # it is chosen by the topology alone
    "TwoLevelCollectives": {"two_level": True, "shared_memory": False},
}
