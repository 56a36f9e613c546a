"""Two processes with gloo, in which a function trains one run after another: torch is imported once for all of them."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

RANKS = 2


def in_ranks(work: Callable[[], object]) -> None:
    """Call a function, which can be pickled, in both ranks, and wait. Raises what one of them raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, (port, work), nprocs=RANKS)  # type: ignore[no-untyped-call]


def _rank(rank: int, port: int, work: Callable[[], object]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    work()
    dist.destroy_process_group()
