"""Runs of workers that come and go, against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.support import reference, training
from tests.support.members import Cluster
from tests.support.training import QSR

ROUNDS = [2, 4, 6, 8, 12]  # where QSR's end
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


def simulated(
    there: dict[str, tuple[int, int]],
    *,
    worker_size: int = 1,
    away: tuple[str, int, int] = ("", 0, 0),
    **more: Any,
) -> tuple[torch.Tensor, list[float]]:
    """What the reference gives.

    Args:
        there: for every worker where the first of its rounds begins, and where the first begins that it is not in.
        away: a worker, and likewise a stretch between that it is not in.
    """
    ranges, names = list(there.values()), list(there)

    def present(worker: int, start: int) -> bool:
        is_away = names[worker] == away[0] and away[1] <= start < away[2]
        return ranges[worker][0] <= start < ranges[worker][1] and not is_away

    models, distances = reference.simulate(
        lambda: training.make_model(torch.float32),
        partial(training.make_optimizer, "adamw"),
        lambda rank, step: [training.batch(10 * (rank // worker_size) + rank % worker_size, step, dtype=torch.float32)],
        {**QSR, **{key: value for key, value in more.items() if key in QSR}},
        len(there),
        worker_size=worker_size,
        present=present,
        **{key: value for key, value in more.items() if key not in QSR},
    )
    return training.flat(models[0].parameters()), distances


def flat(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for of_one in values for value in of_one])


def check_equal(run: Cluster, names: str, expected: torch.Tensor, worker_size: int = 1) -> None:
    """The members ended with the reference's parameters, held the same after every boundary, and took no step twice."""
    for rank in range(worker_size):
        found = [run.boundaries(name, rank) for name in names]
        for step in ROUNDS:
            here = {one[step]["digest"] for one in found if step in one}
            assert len(here) <= 1, f"step {step}: {here}"
    for name in names:
        steps = [line["step"] for line in run.said(name) if line["what"] == "step"]
        assert steps == sorted(set(steps)), f"{name} took {steps}"
        (end,) = (line for line in run.said(name) if line["what"] == "finished")
        # K = 3 adds up in another order than the reference.
        torch.testing.assert_close(flat(end["values"]), expected, rtol=2e-5, atol=2e-6)
