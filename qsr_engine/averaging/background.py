"""An averaging that runs beside its caller: on a side stream of the GPU, or in a thread on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch

from qsr_engine.averaging.chunks import beside_compute


class Background:
    """Runs an averaging beside the caller, and lets it wait for single pieces.

    Args:
        run: gives the index of each piece when it is finished.
        pieces: the indices that it will give.
        device: where they are. On a GPU, `run` is driven on a side stream and must not wait for the device.
    """

    def __init__(self, run: Iterator[int], pieces: Sequence[int], device: torch.device) -> None:
        self._error: BaseException | None = None
        self._events: dict[int, torch.cuda.Event] = {}
        self._done = {index: threading.Event() for index in pieces}
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._drive_on_a_side_stream(run, device)
        else:
            self._thread = threading.Thread(target=self._drive, args=(run,), name="qsr averaging")
            self._thread.start()

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

    def _drive_on_a_side_stream(self, run: Iterator[int], device: torch.device) -> None:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for index in run:
                self._events[index] = stream.record_event()

    def wait(self, index: int) -> None:
        """Wait for one piece: on a GPU, the current stream does; not for one that is not averaged.

        Raises what the averaging raised.
        """
        if index not in self._done:
            return
        if self._events:
            torch.cuda.current_stream().wait_event(self._events[index])
            return
        self._done[index].wait()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait for all pieces. Raises what the averaging raised."""
        for index in self._done:
            self.wait(index)
        if self._thread is not None:
            self._thread.join()
