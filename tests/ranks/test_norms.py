"""Norms that engines measure, against slow ones that are computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import training
from tests.support.combinations import pretend_fp16
from tests.support.counting import collectives_across_workers
from tests.support.fsdp_engine import start, start_deepspeed, take_step
from tests.support.pool import Processes
from tests.support.training import QSR

CELLS: list[tuple[int | None, str, float, dict[str, Any]]] = [  # ZeRO stage or FSDP, optimizer, clipping, more
    (0, "sgd", 0.1, {}),
    (2, "adamw", 0.0, {"fp16": {"enabled": True, "loss_scale": 64.0}}),
    (3, "adamw", 0.1, {}),
    (None, "sgd", 0.0, {}),
    (None, "adamw", 0.1, {}),
]


def norms_job(stage: int | None, optimizer: str, clip: float, more: dict[str, Any]) -> dict[str, Any]:
    """Two steps inside a round of a worker of two ranks. What was measured at the first, and what it is by hand."""
    import torch.distributed as dist

    pretend_fp16()
    qsr = {**QSR, "strategy": "constant", "alpha": None, "h_base": 4, "worker_size": 2}
    qsr["lr"] = {"schedule": "constant", "peak": 0.05}
    model, more = training.make_model(torch.float32), {**more, "gradient_clipping": clip}
    if stage is None:
        engine = start(qsr, model, optimizer, **more)
    else:
        engine = start_deepspeed(qsr, model, optimizer, stage, **more)
    crossed = collectives_across_workers(2)
    engine.measure_next_step()
    dtype = next(engine.module.parameters()).dtype
    if dtype == torch.float32:
        take_step(engine)
    else:
        inputs, targets = training.batch(dist.get_rank(), 0, dtype=dtype)
        engine.backward(training.loss(engine(inputs).float(), targets.float()))
        engine.step()
    measured = engine.measured()
    masters = training.flat(engine._driver.replica.whole(p) for p in engine.module.parameters())
    if dtype == torch.float32:
        take_step(engine)
    crossed = collectives_across_workers(2) - crossed
    by_hand = training.make_model(torch.float64)
    for rank in (dist.get_rank() // 2 * 2, dist.get_rank() // 2 * 2 + 1):
        inputs, targets = training.batch(rank, 0)
        (training.loss(by_hand(inputs), targets) / 2).backward()  # type: ignore[no-untyped-call]
    gradient = training.flat(p.grad for p in by_hand.parameters())
    return {
        "measured": measured,
        "masters": float(masters.double().norm()),
        "gradient": gradient,
        "crossed": crossed,
        "later": engine.measured(),
    }


def job() -> list[dict[str, Any]]:
    return [norms_job(*cell) for cell in CELLS]


def test_norms_are_those_of_the_whole_worker_before_clipping_and_of_its_own(processes: Processes) -> None:
    """By hand: after the first step Adam's m is 0.1 of the clipped gradient, and v 0.001 of its square."""
    results = processes.run(job, ranks=4)
    for number, (_, optimizer, clip, more) in enumerate(CELLS):
        found = [rank[number] for rank in results]
        near = 2e-3 if more else 1e-5
        for rank, result in enumerate(found):
            measured, gradient = result["measured"], result["gradient"]
            clipped = gradient * min(1.0, clip / float(gradient.norm())) if clip else gradient
            wanted = {"gradient_norm": float(gradient.norm()), "parameter_norm": result["masters"]}
            if optimizer == "adamw":
                wanted |= {"exp_avg_norm": 0.1 * float(clipped.norm())}
                wanted |= {"exp_avg_sq_norm": 0.001 * float(clipped.square().norm())}
            else:
                decayed = clipped + 1e-3 * training.flat(training.make_model().parameters())
                wanted |= {"momentum_buffer_norm": float(decayed.norm())}
            wanted |= {"loss_scale": 64.0} if more else {}
            assert measured == pytest.approx(wanted, rel=near), (number, rank)
            assert result["crossed"] == 0
            assert result["later"].keys() <= {"loss_scale"} or more, "measured where it is asked for only"
        assert found[0]["measured"] == found[1]["measured"]
        assert found[0]["measured"] != found[2]["measured"], "workers have their own"
