"""set_train_batch_size() between rounds: each worker has micro-batches of its own number, in both engines."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import reference, training
from tests.support.combinations import Combination
from tests.support.combinations import start as start_deepspeed
from tests.support.fsdp_engine import mlp, state_of
from tests.support.fsdp_engine import start as start_fsdp
from tests.support.pool import Processes
from tests.support.training import QSR

ENDS = [2, 4, 6, 8, 12]  # of QSR's rounds
NUMBERS = [[1, 3, 2, 1, 2], [2, 1, 1, 3, 1]]  # of micro-batches in a step, by worker and round


def number_of(worker: int, step: int) -> int:
    return NUMBERS[worker][next(place for place, end in enumerate(ENDS) if step < end)]


def job(combination: Combination | None, worker_size: int) -> tuple[list[torch.Tensor], list[int], list[str]]:
    """Train; and what is said of sizes and moments that cannot be."""
    qsr = {**QSR, "worker_size": worker_size}
    engine: Any = start_fsdp(qsr, mlp(), "sgd") if combination is None else start_deepspeed(combination, qsr)
    rank, ranks, refused = dist.get_rank(), dist.get_world_size(), []

    def refuse(size: int) -> None:
        try:
            engine.set_train_batch_size(size)
        except (ValueError, RuntimeError) as error:
            refused.append(f"{type(error).__name__}: {error}")

    refuse(training.BATCH * ranks + 1)
    refuse(0)
    state, seen = engine.local_steps, []
    while not state.finished:
        step = state.step
        number = number_of(rank // worker_size, step)
        if state.on_boundary:
            engine.set_train_batch_size(training.BATCH * ranks * number)
        seen.append(engine.gradient_accumulation_steps())
        for micro in range(number):
            assert state.step == step
            inputs, targets = training.batch(rank, step, micro, dtype=torch.float32)
            engine.backward(training.loss(engine(inputs), targets))
            engine.step()
            if micro == 0 and number > 1 and step == ENDS[0]:
                refuse(training.BATCH * ranks)
        assert state.step == step + 1
    return [value.clone() for value in state_of(engine).values()], seen, refused


@pytest.mark.fast_cells(2, of=7)
@pytest.mark.parametrize(
    ("combination", "worker_size"),
    [
        pytest.param(None, 1, id="fsdp"),
        pytest.param(Combination(1, "fp32", "offloaded SGD"), 1, id="deepspeed 1, offloaded"),
        pytest.param(Combination(0, "fp32", "SGD"), 1, id="deepspeed 0"),
        pytest.param(Combination(2, "fp32", "offloaded SGD"), 1, id="deepspeed 2, offloaded"),
        pytest.param(Combination(3, "fp32", "SGD"), 1, id="deepspeed 3"),
        pytest.param(None, 2, id="fsdp, 2 ranks"),
        pytest.param(Combination(2, "fp32", "SGD"), 2, id="deepspeed 2, 2 ranks"),
    ],
)
def test_the_number_of_micro_batches_changes_at_boundaries(
    processes: Processes, combination: Combination | None, worker_size: int
) -> None:
    """As the reference, whose step has the mean gradient of as many. Gradients are divided before they are added up,
    and in a worker of two ranks averaged after it: 2^-24 relative of each of 12 steps of at most 0.05."""
    results = processes.run(job, ranks=2 * worker_size, combination=combination, worker_size=worker_size)
    models, _ = reference.simulate(
        lambda: training.make_model(torch.float32),
        partial(training.make_optimizer, "sgd"),
        lambda rank, step: [
            training.batch(rank, step, micro, dtype=torch.float32)
            for micro in range(number_of(rank // worker_size, step))
        ],
        QSR,
        2,
        worker_size=worker_size,
    )
    found, wanted = training.flat(results[0][0]), training.flat(models[0].parameters())
    assert (found - wanted).abs().max() <= 1e-6
    for rank, (_, seen, refused) in enumerate(results):
        assert seen == [number_of(rank // worker_size, step) for step in range(ENDS[-1])]
        ranks = 2 * worker_size
        assert refused[0].startswith(
            f"ValueError: train_batch_size {training.BATCH * ranks + 1} does not divide into whole micro-batches"
        )
        assert refused[1].endswith(f"on {ranks} ranks; write {training.BATCH * ranks}")
        if rank < worker_size:
            assert "RuntimeError: set_train_batch_size() after 1 of the 3 micro-batches of step 2" in refused[2]
