"""Loader processes that decode into memory which the rank sees: no batch is copied from one process to another.

torch's DataLoader makes a new piece of shared memory for every batch, and copies the batch into it. Here every loader
process has a few slots, each room for one batch, that live as long as it does: it decodes into a free one and says so,
and the rank sees the slot as a tensor. When nobody holds that tensor or a view of it any more, the slot is free again.

    loader process p     batches p, p + P, p + 2P, ... : wait for a free slot, decode into it, send what is beside it
    rank                 take the batches of the processes in turn, which restores the order
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
import torch

from qsr_engine.data.decoding import Pixels
from qsr_engine.data.errors import DataError

Beside = tuple[list[int], tuple[str, ...]]  # labels, and what was wrong with skipped samples
Produce = Callable[[int, int, Callable[[], Pixels]], Iterator[Beside]]
"""From process p, P, and a function that gives room for a batch, to what lies beside the batches p, p + P, ..."""

# A fork of the training process can deadlock on locks that threads of gloo, NCCL or CUDA hold at that moment. The fork
# server is a fresh process without such threads, and it imports torch once for all loader processes, which then start
# in a tenth of a second: cheap enough for every evaluation. spawn would import torch in each of them.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["qsr_engine.data.loader"])


class _Filled(NamedTuple):
    """Message of a loader process: a batch lies in a slot."""

    slot: int
    beside: Beside


class _Finished(NamedTuple):
    """Message of a loader process: no more batches, or an error; a traceback where it is none of the user's."""

    error: DataError | None = None
    traceback: str | None = None


def run_here(produce: Produce, shape: tuple[int, ...]) -> Iterator[tuple[Pixels, Beside]]:
    """Batches of a shape [B, ...], decoded by this process, each into memory of its own."""
    room: list[Pixels] = []

    def give() -> Pixels:
        room.append(np.empty(shape, np.uint8))
        return room[-1]

    for beside in produce(0, 1, give):
        yield room.pop(), beside


def run_in_processes(
    produce: Produce, shape: tuple[int, ...], processes: int, *, pinned: bool = False
) -> Iterator[tuple[Pixels, Beside]]:
    """The same batches in the same order, decoded by so many loader processes.

    Args:
        pinned: the memory is one that a GPU copies from by itself; where CUDA refuses that, it is not.
    Raises:
        DataError: what a process raised, after the batches before it; or a process was killed.
    """
    # A process decodes into one slot while another one waits; the rank holds the batch that it has, and, of a single
    # process, the one before it too while it asks for the next.
    # One that is copied to a GPU is held one batch longer.
    slots = (4 if processes == 1 else 3) + pinned
    loaders = [_Loader(produce, number, processes, shape, slots) for number in range(processes)]
    if pinned:
        for loader in loaders:
            loader.memory.pin(_register, _unregister)
    try:
        for loader in cycle(loaders):
            message = loader.receive()
            if isinstance(message, _Finished):
                if message.error is not None:
                    raise message.error
                if message.traceback is not None:
                    raise RuntimeError(f"a loader process failed:\n{message.traceback}")
                return
            yield loader.take(message.slot), message.beside
    finally:
        for loader in loaders:
            loader.stop()


class _Loader:
    """One loader process, as the rank sees it."""

    def __init__(self, produce: Produce, number: int, processes: int, shape: tuple[int, ...], slots: int) -> None:
        self.slots, self.taken = slots, 0
        self.memory = _Memory((slots, *shape))
        self.results, results = _CONTEXT.Pipe(duplex=False)
        free, self.free = _CONTEXT.Pipe(duplex=False)
        arguments = (produce, number, processes, self.memory, results, free)
        self.process = _CONTEXT.Process(target=_load, args=arguments, daemon=True)
        self.process.start()
        results.close()
        free.close()

    def receive(self) -> _Filled | _Finished:
        """The next message. Raises DataError where the process has died without one."""
        wait([self.results, self.process.sentinel])
        try:
            if self.results.poll():
                message: _Filled | _Finished = self.results.recv()
                return message
        except EOFError:
            pass
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            raise DataError(f"a loader process could not be started or ended early, with exit code {code}")
        name = signal.Signals(-code).name
        raise DataError(f"a loader process was ended by {name}; was it killed, perhaps for want of memory?")

    def take(self, slot: int) -> Pixels:
        """The batch in a slot, which is given back when nobody holds it any more.

        The process always keeps two slots, so that a rank which collects batches doesn't wait for ever: it gets copies.
        """
        if self.taken + 2 >= self.slots:
            copy = self.memory.slot(slot).copy()
            self._give_back(slot)
            return copy
        pixels = self.memory.slot(slot)
        self.taken += 1
        weakref.finalize(pixels, self._release, slot).atexit = False
        return pixels

    def _release(self, slot: int) -> None:
        self.taken -= 1
        self._give_back(slot)

    def _give_back(self, slot: int) -> None:
        with contextlib.suppress(OSError):  # the process has ended
            self.free.send_bytes(bytes([slot]))

    def stop(self) -> None:
        """End the process; batches that somebody holds stay as they are."""
        self.results.close()
        self.free.close()
        self.process.kill()  # it has nothing to put in order, and SIGTERM may be ignored or wait behind SIGSTOP
        self.process.join()


class _Memory:
    """uint8 memory of a shape [slots, ...] that two processes see.

    Not in /dev/shm, which is small in many containers, and where exceeding it kills the process.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._file = os.memfd_create("qsr_engine")
        try:
            os.posix_fallocate(self._file, 0, int(np.prod(shape)))
        except OSError as error:
            os.close(self._file)
            size = int(np.prod(shape)) / 2**20
            raise DataError(f"there are no {size:.0f} MiB of memory for the batches of a loader process") from error
        self._map()

    def _map(self) -> None:
        self._flat = np.frombuffer(mmap.mmap(self._file, int(np.prod(self.shape))), np.uint8)
        self._all = self._flat.reshape(self.shape)

    def pin(self, register: Callable[[int, int], bool], unregister: Callable[[int], object]) -> None:
        """Register the memory, by address and bytes, and take that back when no slot and no view of one is left."""
        address = self._flat.ctypes.data
        if register(address, self._flat.nbytes):
            weakref.finalize(self._flat, unregister, address).atexit = False  # views of it hold this very array

    def slot(self, number: int) -> Pixels:
        """One slot, an array of its own: it can be told when it dies."""
        pixels: Pixels = self._all[number]
        return pixels

    def __getstate__(self) -> tuple[Any, tuple[int, ...]]:
        return reduction.DupFd(self._file), self.shape

    def __setstate__(self, state: tuple[Any, tuple[int, ...]]) -> None:
        self._file, self.shape = state[0].detach(), state[1]
        self._map()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._file)


def _register(address: int, size: int) -> bool:
    return int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0  # type: ignore[no-untyped-call]


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _load(
    produce: Produce, number: int, processes: int, memory: _Memory, results: Connection, free: Connection
) -> None:
    """What a loader process does. It ends when the rank closes its end of a pipe, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the rank too, which ends this process
    torch.set_num_threads(1)
    slots = deque(range(memory.shape[0]))
    slot = -1

    def room() -> Pixels:
        nonlocal slot
        with _until_the_rank_is_gone():
            slot = slots.popleft() if slots else free.recv_bytes()[0]
        return memory.slot(slot)

    def send(message: _Filled | _Finished) -> None:
        with _until_the_rank_is_gone():
            results.send(message)

    try:
        for beside in produce(number, processes, room):
            send(_Filled(slot, beside))
        send(_Finished())
    except DataError as error:
        send(_Finished(DataError(str(error))))
    except Exception:
        send(_Finished(traceback=traceback.format_exc()))


@contextlib.contextmanager
def _until_the_rank_is_gone() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        sys.exit(0)
