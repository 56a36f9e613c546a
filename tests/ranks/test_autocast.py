"""torch.autocast over parameters in fp32: DeepSpeed's block `torch_autocast`, and torch's own around a forward."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import reference, training
from tests.support.combinations import whole_masters
from tests.support.counting import collectives_across_workers
from tests.support.deepspeed_engine import start
from tests.support.heard import messages_of_this_job
from tests.support.pool import Processes
from tests.support.training import QSR

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OVERFLOW_AT = 3


def small_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Small enough for fp16 times the 65536 with which scaling begins."""
    return training.loss(outputs.float(), targets) / 64


class Autocast(nn.Module):
    """The model of the reference: its forward is that of the small model under autocast."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = training.make_model(torch.float32), dtype

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", self.dtype):
            return self.inner(x)


def expected(dtype: str, overflow: bool = False, **more: Any) -> Tensor:
    models, _ = reference.simulate(
        lambda: Autocast(DTYPES[dtype]),
        partial(training.make_optimizer, "sgd"),
        lambda rank, step: [training.batch(rank, step, dtype=torch.float32)],
        QSR,
        2,
        loss=small_loss,
        loss_scale=2.0**16 if dtype == "float16" else 1.0,
        skipped=lambda worker, step: overflow and worker == 0 and step == OVERFLOW_AT,
        **more,
    )
    return training.flat(models[0].parameters())


def begin(stage: int, dtype: str, worker_size: int, clip: float, block: bool = True) -> Any:
    zero: dict[str, Any] = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    autocast: dict[str, Any] = {"torch_autocast": {"enabled": True, "dtype": dtype}} if block else {}
    return start({**QSR, "worker_size": worker_size}, **zero, **autocast, gradient_clipping=clip)


def train(engine: Any, outside: torch.dtype | None = None, overflow: bool = False, folder: str = "") -> dict[str, Any]:
    import torch.distributed as dist

    size, crossed, rates = engine.local_steps.qsr.worker_size, [], []
    while not engine.local_steps.finished:
        step, before = engine.local_steps.step, collectives_across_workers(engine.local_steps.qsr.worker_size)
        inputs, targets = training.batch(dist.get_rank(), step, dtype=torch.float32)
        with torch.autocast("cpu", outside, enabled=outside is not None):
            outputs = engine(inputs)
        loss = small_loss(outputs, targets)
        engine.backward(loss * float("inf") if overflow and step == OVERFLOW_AT and dist.get_rank() == 0 else loss)
        rates.append(engine.get_lr()[0])
        if not engine.step():
            crossed.append(collectives_across_workers(size) - before)
        elif folder and engine.local_steps.step == 4:
            engine.save_checkpoint(folder)
    costs = engine.local_steps.costs
    return {
        "masters": whole_masters(engine),
        "crossed": crossed,
        "rates": rates,
        "outputs": str(outputs.dtype),
        "scaled": bool(getattr(engine.optimizer, "dynamic_loss_scale", False)),
        "skipped": (costs.skipped_steps, costs.skipped_steps_of_all_workers),
    }


def stages_job(stages: list[int], dtypes: list[str], worker_size: int) -> dict[str, dict[str, Any]]:
    cells = [(stage, dtype) for stage in stages for dtype in dtypes]
    found = {f"{stage} {dtype}": train(begin(stage, dtype, worker_size, 0.0)) for stage, dtype in cells}
    if worker_size > 1:
        return found
    plain = train(begin(1, "", worker_size, 0.0, block=False))  # after the others, which DeepSpeed has not forgotten
    outside = train(begin(1, "", worker_size, 0.0, block=False), outside=torch.bfloat16)
    return {**found, "no autocast": plain, "outside bfloat16": outside}


def test_autocast_at_every_stage(processes: Processes) -> None:
    """As the reference, bit for bit, and with no collective across workers; an engine without it is without it."""
    first, second = processes.run(stages_job, stages=[0, 1, 2, 3], dtypes=[*DTYPES], worker_size=1)
    oracles = {dtype: expected(dtype) for dtype in DTYPES}
    for name, found in first.items():
        assert found["crossed"] == second[name]["crossed"] == [0] * 7
        assert found["scaled"] == (name in ("1 float16", "2 float16", "3 float16"))
        assert torch.equal(found["masters"], second[name]["masters"])
        if name == "no autocast":
            assert found["outputs"] == "torch.float32"
            continue
        dtype = name.split()[1]
        assert found["outputs"] == f"torch.{dtype}"
        assert torch.equal(found["masters"], oracles[dtype]), name


def test_autocast_in_workers_of_several_ranks(processes: Processes) -> None:
    """ZeRO reduces the gradients of linear layers in bf16 there, as without local steps: 2^-8 of 12 steps of at most
    0.05."""
    job: dict[str, Any] = {"stages": [0, 2, 3], "dtypes": ["bfloat16"], "worker_size": 2}
    results = processes.run(stages_job, ranks=4, **job)
    oracle = expected("bfloat16", worker_size=2)
    for stage in (0, 2, 3):
        for result in results:
            found = result[f"{stage} bfloat16"]
            assert found["crossed"] == [0] * 7
            assert torch.equal(found["masters"], results[0][f"{stage} bfloat16"]["masters"])
            torch.testing.assert_close(found["masters"], oracle, rtol=0, atol=12 * 0.05 * 2.0**-8)
            assert torch.equal(found["masters"], oracle) == (stage == 0)


def overflow_job(folder: str) -> list[dict[str, Any]]:
    found = []
    for stage in (0, 1, 3):
        said = messages_of_this_job()
        own = f"{folder}/{stage}"
        result = train(begin(stage, "float16", 1, 0.01), overflow=True, folder=own)
        heard = [message for message in said if "overflowed" in message]
        resumed = begin(stage, "float16", 1, 0.01)
        resumed.load_checkpoint(own)
        scaler = resumed.torch_autocast_z0_gradscaler if stage == 0 else resumed.optimizer.loss_scaler
        scale = scaler.get_scale() if stage == 0 else scaler.cur_scale
        again = torch.equal(train(resumed)["masters"], result["masters"])
        found.append({**result, "said": heard, "scale": scale, "again": again})
    return found


def test_an_overflow_in_fp16_autocast(processes: Processes, tmp_path: Path) -> None:
    """One worker skips its update and lowers its scale; the step counts, and all keep the rate. Gradients are clipped
    when they are no longer scaled (1e-6 relative of 12 steps, as DeepSpeed divides). The scale is resumed."""
    results = processes.run(overflow_job, folder=str(tmp_path))
    oracle = expected("float16", overflow=True, clip=0.01)
    unclipped = expected("float16", overflow=True)
    assert (oracle - unclipped).abs().max() > 1e-3, "the clipping was meant to matter"
    for rank, result in enumerate(results):
        for number, found in enumerate(result):
            torch.testing.assert_close(found["masters"], oracle, rtol=0, atol=1e-6)
            assert torch.equal(found["masters"], results[0][number]["masters"])
            assert found["rates"] == results[0][0]["rates"]
            assert found["crossed"] == [0] * 7
            assert found["skipped"] == (1 - rank, 1)
            assert len(found["said"]) == 1 - rank
            assert found["scale"] == 2.0 ** (15 + rank)
            assert found["again"]


def unscaled_job() -> str:
    try:
        train(begin(1, "", 1, 0.0, block=False), outside=torch.float16)
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


def test_fp16_outside_has_no_scaling_and_is_refused(processes: Processes) -> None:
    for said in processes.run(unscaled_job):
        assert 'write "torch_autocast": {"enabled": true, "dtype": "float16"}' in said
