"""The mean captured in a CUDA graph and replayed at every boundary: packing, all-reduce and unpacking in one launch.

The first run is eager, as NCCL and the allocator must have warmed up; the second captures, and replays from then on.
Capture takes place on a side stream in thread-local mode, so that other threads may call CUDA meanwhile. Replays have
no watchdog: a rank that does not come is waited for without a time-out. Source for both:
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.errors import Group
from qsr_engine.averaging.reducer import Reducer
from qsr_engine.config.strict import ConfigError


class Captured(Reducer):
    """A reducer whose run is captured once and replayed.

    Raises:
        ConfigError: a piece is not on a GPU, or the group's backend is not NCCL.
    """

    def __init__(self, reducer: Reducer, group: Group) -> None:
        devices = {piece.device.type for piece in reducer.pieces}
        backend = dist.get_backend(group)
        if devices - {"cuda"} or "nccl" not in backend:
            where = f"the parameters are on {', '.join(sorted(devices))} with" if devices else "there is"
            raise ConfigError(
                f"qsr.averaging.cuda_graph is true, and {where} the backend {backend}; only NCCL on GPUs can be "
                "captured, so write cuda_graph: false"
            )
        super().__init__(reducer.pieces, reducer.ranks, reducer.bytes_sent)
        self._reducer = reducer
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        atexit.register(self.close)  # a graph that outlives its process group crashes the process at its end

    def _run(self, order: Sequence[int], divisor: int) -> Iterator[tuple[int, Tensor | None]]:
        """`order` is that of the capture. Eager where a rank is left out: the graph's divisor is fixed."""
        if not self.pieces:  # as on a rank whose part of a small model is empty
            return
        if not self._warm or divisor != self.ranks:
            self._warm = True
            yield from self._reducer._run(order, divisor)
            return
        if self._graph is None:
            self._graph = self._capture(order)
        self._graph.replay()
        yield from ((index, None) for index in order)

    def _capture(self, order: Sequence[int]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            for _ in self._reducer.run(order):
                pass
        return graph

    def close(self) -> None:
        """Free the graph; call it before the process group is destroyed. Again is harmless."""
        if self._graph is not None:
            torch.cuda.synchronize()
            self._graph.reset()
            self._graph = None
        atexit.unregister(self.close)
