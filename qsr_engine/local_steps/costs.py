"""What local steps have cost so far: counts, bytes and seconds, over restarts too."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Costs:
    """Counters of one rank; bytes are those that left its worker, from all ranks of it (see traffic)."""

    averagings: int = 0
    bytes_sent: int = 0
    seconds_averaging: float = 0.0  # that steps waited for averagings
    parallel_bytes_so_far: int = 0  # that would have left the worker by now under `parallel`
    skipped_steps: int = 0  # of this worker, because its gradients overflowed; they count as steps
    skipped_steps_of_all_workers: int = 0  # as told at the last boundary
    left_out: dict[int, int] = dataclasses.field(default_factory=dict)  # times that a worker was, by its number
    clipped: dict[int, int] = dataclasses.field(default_factory=dict)  # times that its movement was, likewise
    late: int = 0  # movements of late members that averages have taken in (membership.grace_seconds)
    seconds_waiting: float = 0.0  # of averaging: in this process, for the last worker to come to a boundary

    def leave_out(self, workers: list[int]) -> None:
        """Workers are left out of one more averaging."""
        self.left_out = _one_more(self.left_out, workers)

    def clip(self, workers: list[int]) -> None:
        """The movement of workers is clipped once more."""
        self.clipped = _one_more(self.clipped, workers)

    def state_dict(self) -> dict[str, Any]:
        state = dataclasses.asdict(self)
        del state["seconds_waiting"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


def _one_more(times: dict[int, int], workers: list[int]) -> dict[int, int]:
    return {**times, **{worker: times.get(worker, 0) + 1 for worker in workers}}
