"""A pool of processes that tests share: starting one costs time, and its first engine does.

A job is a function of a test module; it runs on the first `ranks` processes of the pool, each with the environment
that a launcher gives (RANK, WORLD_SIZE, ...), and its results come back in the order of the ranks. A process group
that the job started is destroyed after it. A job that exceeds its time limit fails, as one does whose process dies, and
the pool is started anew.
"""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing as mp
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

JOB_SECONDS = 120.0
CONTEXT = mp.get_context("forkserver")  # importing torch and deepspeed takes seconds: once, not in every process
CONTEXT.set_forkserver_preload(["tests.support.preloaded"])
# Engines leave gloo's threads behind, each of which wakes up a hundred times a second: with 700 of them in a process,
# 40 % of two cores went to that. Above this the pool is started anew, which takes a second.
MOST_THREADS = 150


class JobError(AssertionError):
    """A job raised on at least one rank; `by_rank` holds the exception's type name and message, or None."""

    def __init__(self, text: str, by_rank: list[tuple[str, str] | None]) -> None:
        super().__init__(text)
        self.by_rank = by_rank


class Processes:
    """Processes that wait for jobs; more are started when a job asks for more ranks."""

    def __init__(self) -> None:
        self._children: list[tuple[Any, Connection]] = []
        self._crowded = False

    def run(self, job: Callable[..., Any], ranks: int = 2, seconds: float = JOB_SECONDS, **kwargs: Any) -> list[Any]:
        """Results of job(**kwargs) on each rank. Raises JobError if any rank raised or the time ran out."""
        outcomes = self.outcomes(job, ranks, seconds, **kwargs)
        errors = [value if kind == "error" else None for kind, value in outcomes]
        if any(errors):
            text = "\n".join(f"rank {rank}:\n{error[2]}" for rank, error in enumerate(errors) if error)
            raise JobError(text, [error and (error[0], error[1]) for error in errors])
        return [value for _, value in outcomes]

    def outcomes(self, job: Callable[..., Any], ranks: int, seconds: float, **kwargs: Any) -> list[tuple[str, Any]]:
        if self._crowded:
            self.stop()
        while len(self._children) < ranks:
            self._start()
        port = free_port()
        for rank, (_, pipe) in enumerate(self._children[:ranks]):
            with suppress(BrokenPipeError):  # a child that has died is seen below
                pipe.send((job, kwargs, rank_environment(rank, ranks, port), seconds))
        try:
            outcomes = self._collected(ranks, seconds)
        except BaseException:
            self.stop()  # the others may wait for ever, and answers that come later would be taken for another job's
            raise
        self._crowded = any(threads > MOST_THREADS for _, threads in outcomes)
        return [outcome for outcome, _ in outcomes]

    def _collected(self, ranks: int, seconds: float) -> list[tuple[tuple[str, Any], int]]:
        """What each rank sends. Raises JobError as soon as one has died, or when the time is up."""
        found: dict[int, tuple[tuple[str, Any], int]] = {}
        deadline = time.monotonic() + seconds
        while len(found) < ranks:
            missing = {rank: self._children[rank] for rank in range(ranks) if rank not in found}
            watched = [watched for process, pipe in missing.values() for watched in (pipe, process.sentinel)]
            if not wait(watched, max(0.0, deadline - time.monotonic())):
                errors = [f"\nrank {rank}: {value[2]}" for rank, ((kind, value), _) in found.items() if kind == "error"]
                text = f"ranks {[*missing]} gave no result within {seconds} s; the others gave {[*found.values()]}"
                raise JobError(text + "".join(errors), [None] * ranks)
            for rank, (process, pipe) in missing.items():
                if pipe.poll():
                    try:
                        found[rank] = pipe.recv()
                    except EOFError:
                        process.join()
                if not process.is_alive() and rank not in found:
                    raise JobError(f"rank {rank} died, with exit code {process.exitcode}", [None] * ranks)
        return [found[rank] for rank in range(ranks)]

    def _start(self) -> None:
        here, there = mp.Pipe()
        process = CONTEXT.Process(target=_serve, args=(there,))
        process.start()
        there.close()
        self._children.append((process, here))

    def stop(self) -> None:
        for process, pipe in self._children:
            pipe.close()
            process.kill()
            process.join()
        self._children.clear()
        self._crowded = False


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # pytest-xdist's process, each with its own thousand
_ports = itertools.cycle(random.sample(range(12_000 + 1000 * _WORKER, 13_000 + 1000 * _WORKER), 1000))


def free_port() -> int:
    """A port that nobody else takes before rank 0 listens there.

    Linux gives ports from 32768 on to connections, and to listeners that name none: a port from there, free now, may be
    another job's by the time that rank 0 wants it, and the other ranks then wait for whoever has it.
    """
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the ports have no end")


undo = ExitStack()  # of this process: what a job has changed for itself alone; closed after it


def _serve(pipe: Connection) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    random.seed()  # else every process would draw as the one that it was forked from
    mp.set_start_method("fork", force=True)  # as a rank has it that a launcher started
    import cpuinfo  # deepspeed's; every CPUAdam asks it, and it starts a process for its answer
    import torch

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)

    first = True
    while True:
        try:
            job, kwargs, environment, seconds = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        torch.set_num_threads(1)  # a job of one rank may have taken all cores, and sums then round otherwise
        hangs = threading.Timer(
            seconds - min(10, seconds / 2), _show_threads, [environment["RANK"]]
        )  # while there is somebody to read it
        hangs.daemon = True
        hangs.start()
        try:
            outcome: tuple[str, Any] = ("result", job(**kwargs))
        except BaseException as error:  # everything goes back to the test
            outcome = ("error", (type(error).__name__, str(error), traceback.format_exc()))
        hangs.cancel()
        undo.close()
        with suppress(Exception):
            _destroy_engines()
        with suppress(Exception):
            _leave_process_group()
        _restore_linear()
        gc.collect()
        if first:  # so that later searches and collections need not look at all of torch and deepspeed again
            gc.freeze()
            first = False
        pipe.send((outcome, len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0))


def _show_threads(rank: str) -> None:
    """Where every thread is, of a job that hangs. Not faulthandler's dump after a while: it reads the frames of threads
    that go on meanwhile, and has ended a process by that."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        where = "".join(traceback.format_stack(frame))
        print(f"{names.get(ident, 'a thread')} of rank {rank}:\n{where}", file=sys.stderr)


def _destroy_engines() -> None:
    """An engine that nobody destroyed lives for ever, by hooks in autograd, and with it its process groups' threads.

    Its watchdog would find the ranks of that job silent ten minutes later, and end the process in another job.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    from qsr_engine.membership.watchdog import Watchdog

    # By type: isinstance asks a weak proxy for the class of an object that is gone, which is an error, and nothing of
    # this job or of any after it would be closed.
    for found in [found for found in gc.get_objects() if issubclass(type(found), (DeepSpeedEngine, Watchdog))]:
        if isinstance(found, Watchdog):
            found.close()
            continue
        with suppress(Exception):  # one that was not made to its end
            found.destroy()
        for name in list(vars(found)):
            delattr(found, name)


def _leave_process_group() -> None:
    import deepspeed.comm
    import torch.distributed as dist
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    if dist.is_initialized():
        if deepspeed.comm.comm.cdb is not None:
            deepspeed.comm.destroy_process_group()
        else:
            dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    _forget_meshes()
    # Stage 3 numbers parameters and modules through all engines of a process, and compares the numbers between ranks;
    # the processes here differ in the jobs that they have done.
    deepspeed.zero.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def _forget_meshes() -> None:
    """DTensor (torch 2.14) keeps what it has worked out for a mesh, with the names of its groups, and takes the mesh of
    the next job, which has other groups, for the same one."""
    import torch
    from torch.distributed.tensor import DTensor

    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()  # type: ignore[no-untyped-call]
    getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)()


def _restore_linear() -> None:
    """An engine at stage 3 puts a function of DeepSpeed's in the place of torch.nn.functional.linear, for good.

    It adds the bias after the product, where torch begins the sum with it. Last bits differ as soon as MKL takes the
    sum in parts (768 terms do), and what a job computes would depend on the jobs before it.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
    from torch import nn

    nn.functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", nn.functional.linear)
