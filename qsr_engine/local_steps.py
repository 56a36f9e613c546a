"""The state machine of a round: it counts steps, asks the rule for the period, and averages at the boundary.

    begin a round          H = period(step, lr of this step)
    H optimizer steps      of the worker's own optimizer; no communication between workers
    boundary               headers exchanged, parameters averaged; the next round begins

An engine calls `advance()` after each of its optimizer steps (not micro-batches). In a `parallel` round the engine
averages the gradients itself, and its boundary exchanges nothing. Strategies that change mode during a run follow
from the schedule: `mode` says what the current step is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from qsr_engine.averaging import Averager, Header, average_packed, exchange_headers
from qsr_engine.config import QSRConfig
from qsr_engine.schedule import Mode, Round, learning_rate, mode, period


class LocalSteps:
    """Position in the run, and what its averagings cost so far.

    Args:
        qsr: the run.
        averager: the parameters, in buckets, and the group of ranks to average over.
        digest: of the configuration; it travels in the boundary header.
        optimizer_lr: reads the optimizer's learning rate; asked only where the configuration has no `lr` block.
        buffers: floating-point tensors averaged beside the parameters (batch-norm statistics); they do not move.
        after_averaging: called once the parameters are averaged; refreshes what derives from them.
        parallel_bytes: bytes that a rank sends at one step of `parallel`.
    """

    def __init__(
        self,
        qsr: QSRConfig,
        averager: Averager,
        digest: int,
        *,
        optimizer_lr: Callable[[], float],
        buffers: list[torch.Tensor] | None = None,
        after_averaging: Callable[[], None] = lambda: None,
        parallel_bytes: int = 0,
    ) -> None:
        self.qsr = qsr
        self.averager = averager
        self._optimizer_lr = optimizer_lr
        self._digest = digest
        self._buffers = buffers or []
        self._after_averaging = after_averaging
        self._parallel_bytes = parallel_bytes
        self.step = 0
        self.round = 0
        self.averagings = 0
        self.bytes_sent = 0
        self.seconds_averaging = 0.0
        self.relative_distance: float | None = None
        self._buffers_differ = False
        self._round = self._begin()

    @property
    def period(self) -> int:
        """H of the current round; after the last step, of the last round."""
        return self._round.length

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        if self.qsr.lr is None:
            return self._optimizer_lr()
        return learning_rate(self.qsr.lr, self.step, self.qsr.total_steps)

    @property
    def finished(self) -> bool:
        return self.step >= self.qsr.total_steps

    @property
    def mode(self) -> Mode:
        """Whether the current step averages gradients (`parallel`) or is a local step."""
        return self._round.mode

    @property
    def on_boundary(self) -> bool:
        """Whether the parameters are the same on every worker: between two rounds, at the start and at the end."""
        return self.finished or self.step == self._round.start

    @property
    def parallel_bytes_so_far(self) -> int:
        """Bytes that a rank would have sent by now under `parallel`."""
        return self.step * self._parallel_bytes

    def advance(self) -> bool:
        """Count one optimizer step; at the end of the round, average. Returns True at a boundary.

        Raises:
            BoundaryError: on every rank, as exchange_headers() says; nothing was averaged.
            RuntimeError: the run has ended already.
        """
        if self.finished:
            raise RuntimeError(f"the run ended at step {self.step} (qsr.total_steps); it takes no further step")
        self.step += 1
        self._buffers_differ = True
        if self.mode == "parallel":
            self.bytes_sent += self._parallel_bytes
        if self.step < self._round.start + self._round.length:
            return False
        if self.mode == "local":
            if self.averager.buckets[0].is_cuda:
                torch.cuda.synchronize()  # so that steps still under way do not count as averaging
            started = time.perf_counter()
            self._average()
            self.seconds_averaging += time.perf_counter() - started
        self.averagings += 1
        if not self.finished:
            self.round += 1
            self._round = self._begin()
        return True

    def _begin(self) -> Round:
        return Round(self.step, period(self.qsr, self.step, self.learning_rate), mode(self.qsr, self.step))

    def _average(self) -> None:
        buckets = self.averager.buckets
        header = Header(
            self.step,
            self.period,
            self.learning_rate,
            self._digest,
            self.averager.sum_of_squares(),
            self.averager.moved(),
        )
        headers = exchange_headers(header, buckets[0].device)
        self.averager.average()
        self.relative_distance = self.averager.relative_distance(headers)
        self.bytes_sent += self.averager.bytes_per_averaging + self.average_buffers()
        self._after_averaging()

    def average_buffers(self) -> int:
        """Average the buffers over all ranks; after a `parallel` round, an evaluation asks for it.

        Also inside a worker: its ranks average gradients, and each has seen batches of its own.

        Returns:
            Bytes that this rank sent.
        """
        sent = average_packed(self._buffers, None, _BUFFER_BUCKET_BYTES) if self._buffers_differ else 0
        self._buffers_differ = False
        return sent

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on, as plain numbers; the round is part of it."""
        state = {key: getattr(self, key) for key in _STATE}
        return {**state, "round_start": self._round.start, "period": self.period, "mode": self.mode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict(), also from the middle of a round.

        On a boundary the next round begins by the rule of this run, which may differ from the one that was saved.

        Raises:
            ValueError: keys are missing or unknown, or the state lies outside this run.
        """
        expected = {*_STATE, "round_start", "period", "mode"}
        if set(state) != expected:
            raise ValueError(f"a local-step state has the keys {sorted(expected)}; found {sorted(state)}")
        if not 0 <= state["round_start"] <= state["step"] <= self.qsr.total_steps:
            raise ValueError(
                f"the state is at step {state['step']} of a round that began at step {state['round_start']}, and this "
                f"run has {self.qsr.total_steps} steps"
            )
        end = state["round_start"] + state["period"]
        if state["step"] > state["round_start"] and end > self.qsr.total_steps:
            raise ValueError(
                f"the state is inside a round that ends at step {end}, and this run has {self.qsr.total_steps} steps; "
                "go on from a state that was saved on a boundary"
            )
        for key in _STATE:
            setattr(self, key, state[key])
        if state["step"] == state["round_start"] and not self.finished:
            self._round = self._begin()
        else:
            self._round = Round(state["round_start"], state["period"], state["mode"])


_STATE = ("step", "round", "averagings", "bytes_sent", "seconds_averaging", "relative_distance")
_BUFFER_BUCKET_BYTES = 16_000_000
