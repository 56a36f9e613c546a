"""The pool itself: what one job does to its processes, no later job sees."""

from __future__ import annotations

import os
import threading
import time
import weakref
from types import FunctionType
from typing import Any

import pytest
import torch

from qsr_engine.membership.watchdog import Watchdog
from tests.support.combinations import Combination, start, take_step
from tests.support.pool import JobError, Processes, _show_threads
from tests.support.training import QSR


def linear_job() -> torch.Tensor:
    """A product of so many terms that MKL takes their sum in parts, and so another order of adding shows."""
    torch.manual_seed(0)
    inputs, layer = torch.randn(16, 5, 768), torch.nn.Linear(768, 192)
    outputs: torch.Tensor = layer(inputs)
    return outputs.detach()


def stage_3_job() -> torch.Tensor:
    combination = Combination(3, "fp32", "AdamW")
    take_step(start(combination, QSR), combination)
    return linear_job()


def test_after_an_engine_at_stage_3_linear_is_torchs_again(processes: Processes) -> None:
    """Every claim of the same bits stands on it: DeepSpeed replaces the function for as long as the process lives."""
    expected = linear_job()
    assert not torch.equal(processes.run(stage_3_job)[0], expected), "the difference was meant to show"
    assert all(torch.equal(found, expected) for found in processes.run(linear_job))
    assert not torch.equal(processes.run(stage_3_job)[0], expected), "and DeepSpeed replaces it again"


def fp16_job() -> bool:
    from deepspeed.accelerator import get_accelerator

    return isinstance(type(get_accelerator()).is_fp16_supported, FunctionType)


def test_fp16_is_pretended_for_one_job(processes: Processes) -> None:
    processes.run(stage_3_job)
    assert processes.run(fp16_job) == [True, True], "DeepSpeed's own, and no mock"


def proxy_job() -> None:
    class Gone:
        pass

    kept.append(weakref.proxy(Gone()))
    kept.append(Watchdog(None, 0, 1, None, lambda: kept.append("closed")))


def closed_job() -> bool:
    return type(kept[-1]) is str  # not "in", which would ask the proxy too


kept: list[Any] = []


def test_what_a_job_left_open_is_closed_whatever_else_it_left(processes: Processes) -> None:
    """To ask a proxy of an object that is gone for its class is an error; threads of every later job lived on once."""
    processes.run(proxy_job, ranks=1)
    assert processes.run(closed_job, ranks=1) == [True]


def test_a_job_that_hangs_shows_where_every_thread_is(capsys: pytest.CaptureFixture[str]) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="the thread that waits")
    thread.start()
    _show_threads("1")
    over.set()
    thread.join()
    said = capsys.readouterr().err
    assert "the thread that waits of rank 1:\n" in said
    assert "in test_a_job_that_hangs_shows_where_every_thread_is" in said, "this one too"


def dying_job(rank: int, code: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os._exit(code)
    time.sleep(60)  # as ranks wait for one that has died


def ranks_job() -> str:
    return os.environ["RANK"]


def test_a_process_that_dies_is_named_at_once_and_replaced() -> None:
    pool = Processes()
    try:
        begun = time.monotonic()
        with pytest.raises(JobError, match="rank 1 died, with exit code 7"):
            pool.run(dying_job, rank=1, code=7)
        assert time.monotonic() - begun < 50, "nobody waits for the other"
        assert pool.run(ranks_job) == ["0", "1"]
    finally:
        pool.stop()
