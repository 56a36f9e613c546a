"""A start with 10,000 ranks, of which this process is one. The others are torch's "fake" process group, in which
collectives end at once and give what this rank gave; so this shows what a rank sends, and does, and nothing about a
network."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.pool import Processes

RANKS, OF_A_HOST = 10_000, 8


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that collectives read and write here."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.bytes += sum(value.nbytes for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


def start_job(worker_size: int) -> tuple[str, int, float]:
    """How the ranks average; bytes of collectives, and seconds, of the start."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import qsr_engine
    from qsr_engine.averaging import choose

    def on_hosts(device: torch.device, needed: int) -> Tensor:
        facts = told(device, needed)
        facts[:, 0] = torch.arange(RANKS) // OF_A_HOST + 1
        facts[:, 1:] = facts[0, 1:]
        return facts

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    told, choose.tell = choose.tell, on_hosts
    config = {
        "train_batch_size": RANKS,
        "qsr": {
            "strategy": "constant",
            "h_base": 2,
            "total_steps": 4,
            "worker_size": worker_size,
            "lr": {"schedule": "constant", "peak": 0.1},
        },
    }
    started = time.perf_counter()
    try:
        with Sent() as sent:
            engine = qsr_engine.initialize_fsdp(
                model=nn.Linear(20, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), config=config
            )
    finally:
        choose.tell = told
    way = engine.local_steps.averager.way
    engine.destroy()
    return way, sent.bytes, time.perf_counter() - started


def test_a_start_of_10_000_ranks(processes: Processes) -> None:
    """It reads five numbers of 8 bytes of each rank: two digests, its host, and what is needed and free there. With a
    list of all ranks of each it was 348 MB, and 82 s."""
    for worker_size, way in ((1, "TwoLevelSharedMemory"), (8, "AllReduce")):
        ((found, sent, seconds),) = processes.run(start_job, ranks=1, worker_size=worker_size)
        assert found == way
        assert 24 * RANKS < sent < 48 * RANKS
        assert seconds < 10, "0.8 s, and what torch imports at the first start, on a busy machine"
