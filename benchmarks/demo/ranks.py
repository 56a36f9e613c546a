"""Two processes with gloo, in which a function trains one run after another: torch is imported once for all of them."""

from __future__ import annotations

import gc
import os
import socket
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.multiprocessing.spawn import spawn

RANKS = 2
TIMEOUT = timedelta(seconds=60)


def in_ranks(work: Callable[[], object]) -> None:
    """Call a function, which can be pickled, in both ranks, and wait. Raises what one of them raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a rank that ends first would leave the other a page of warnings
    spawn(_rank, (port, work), nprocs=RANKS)  # type: ignore[no-untyped-call]


def _rank(rank: int, port: int, work: Callable[[], object]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=TIMEOUT)
    work()
    dist.destroy_process_group()


def meet_again(name: str) -> None:
    """Both ranks begin a new process group. The groups of earlier engines keep their threads until then, each of which
    wakes up a hundred times a second."""
    rank, store = dist.get_rank(), dist.distributed_c10d._get_default_store()
    gc.collect()
    dist.destroy_process_group()
    gc.collect()
    store = PrefixStore(name, store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
