"""Averagings that run beside their caller: on a side stream of the GPU, or in a thread on a CPU; one for good."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from qsr_engine.averaging.chunks import beside_compute

THREAD = "qsr averaging"  # begins the name of the thread


class Background:
    """Runs one averaging at a time beside the caller, and lets it wait for single pieces.

    The stream, or the thread, is made for the first averaging and serves all later ones. A program that ends during an
    averaging ends after it.

    Args:
        device: where the pieces are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._run: Future[None] | None = None
        self._error: BaseException | None = None
        self._events: dict[int, torch.cuda.Event] = {}
        self._done: dict[int, threading.Event] = {}

    def begin(self, run: Iterator[int], pieces: Sequence[int]) -> None:
        """Begin an averaging, after finish().

        Args:
            run: gives the index of each piece when it is finished. On a GPU it is driven on the side stream and must
                not wait for the device.
            pieces: the indices that it will give.
        """
        if self._device.type == "cuda":
            self._drive_on_a_side_stream(run)
            return
        self._done = {index: threading.Event() for index in pieces}
        self._thread = self._thread or ThreadPoolExecutor(1, THREAD)
        self._run = self._thread.submit(self._drive, run)

    def _drive(self, run: Iterator[int]) -> None:
        try:
            with torch.no_grad(), beside_compute():
                for index in run:
                    self._done[index].set()
        except BaseException as error:  # raised again where somebody waits
            self._error = error
        finally:
            for event in self._done.values():
                event.set()

    def _drive_on_a_side_stream(self, run: Iterator[int]) -> None:
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for index in run:
                self._events[index] = self._stream.record_event()

    def wait(self, index: int) -> None:
        """Wait for one piece: on a GPU, the current stream does; not for one that is not being averaged.

        Raises what the averaging raised.
        """
        if index in self._events:
            torch.cuda.current_stream().wait_event(self._events[index])
        elif index in self._done:
            self._done[index].wait()
            if self._error is not None:
                raise self._error

    def wait_for_all(self) -> None:
        """Wait for every piece. Raises what the averaging raised."""
        for index in (*self._events, *self._done):
            self.wait(index)

    def finish(self) -> None:
        """Wait for the end of the averaging, if there is one. Raises what it raised, once."""
        try:
            self.wait_for_all()
        finally:
            if self._run is not None:
                self._run.result()
            self._run, self._error, self._events, self._done = None, None, {}, {}

    def close(self) -> None:
        """End the thread, after finish(). Again is harmless."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
