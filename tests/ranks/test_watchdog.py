"""Lost ranks, and the time-outs of process groups, with real ranks; tests/launch/test_lost_ranks.py ends processes."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from qsr_engine.membership.timeouts import _backends
from qsr_engine.membership.watchdog import LostRankError, Watchdog
from tests.support.pool import Processes


def time_outs(*groups: Any) -> list[timedelta]:
    return [backend.options._timeout for group in groups for backend in _backends(group)]


def never_begins_job() -> tuple[list[list[timedelta]], str]:
    """Rank 1 stays away from the first boundary, until it hears that it is lost."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=77))
    across: Any = dist.new_group([0, 1], timeout=timedelta(seconds=88))
    groups = (dist.group.WORLD, across)
    seen = [time_outs(*groups)]
    other, watchdog = Watchdog.of_this_run(60.0, across), Watchdog.of_this_run(1.0)
    seen.append(time_outs(*groups))
    said = ""
    try:
        if dist.get_rank() == 0:
            watchdog.begin(0, 0)
            watchdog.done(1, 0)
        else:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                watchdog.check()
                time.sleep(0.02)
    except LostRankError as error:
        said = str(error)
    dist.barrier()
    if dist.get_rank() == 0:
        try:
            watchdog.check()
        except LostRankError as error:
            said = str(error)
    other.close()
    seen.append(time_outs(*groups))
    watchdog.close()
    return [*seen, time_outs(*groups)], said


def test_a_rank_that_never_takes_its_first_step_is_lost(processes: Processes) -> None:
    """Nobody noticed for seven days, the time-out that a group gets. Two engines lift it, and both give it back."""
    given, lifted = [timedelta(seconds=77), timedelta(seconds=88)], timedelta(days=7)
    for seen, said in processes.run(never_begins_job):
        assert "rank 1 is lost (qsr.faults.timeout_seconds):\n  rank 1 on " in said
        assert ": no progress for 1." in said or ": no progress for 2." in said
        assert seen == [given, [lifted] * 2, [lifted, given[1]], given]
