"""How often the host waits for the device at a boundary. There is no GPU here: what would wait there is counted."""

from __future__ import annotations

from typing import Any

from tests.support import waits
from tests.support.fsdp_engine import start, take_step
from tests.support.pool import Processes
from tests.support.training import QSR


def waits_job(settings: list[dict[str, Any]]) -> list[list[int]]:
    """Of each setting, the waits at every boundary."""
    import torch.distributed as dist

    found = []
    for setting in settings:
        engine = start({**QSR, **setting}, model=waits.normed())
        with waits.at_boundaries() as counts:
            while not engine.local_steps.finished:
                take_step(engine)
        found.append([seen.total() for seen in counts])
        engine.destroy()
        dist.barrier()
    return found


SETTINGS: list[dict[str, Any]] = [
    {},
    {"averaging": {"overlap": "next_forward", "state": ["exp_avg"]}},
    {"averaging": {"overlap": "delayed", "delay_steps": 1}},
    {"averaging": {"wire_dtype": "int8"}, "outer": {"lr": 0.7, "momentum": 0.9}},
    {"faults": {"outlier": {"z": 0.01, "then": "clip", "after_averagings": 1}}},
    {"averaging": {"overlap": "next_forward"}, "faults": {"outlier": {"z": 1e9, "after_averagings": 1}}},
    {"averaging": {"shared_memory": False, "fragments": 2, "mixing": 0.5}, "faults": {"not_finite": "leave_out"}},
]


def test_the_host_waits_once(processes: Processes) -> None:
    """With batch norm, whose buffers are looked at and averaged. At the first boundary the ranks also agree in which
    order the model reads its parameters, where the averaging goes on behind its forward."""
    for found in processes.run(waits_job, settings=SETTINGS):
        for (first, *counts), setting in zip(found, SETTINGS, strict=True):
            assert counts == [1] * len(counts), setting
            assert counts
            assert first == 1 or setting["averaging"]["overlap"] == "next_forward"
