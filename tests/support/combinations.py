"""Combinations of ZeRO stage, precision and optimizer: to train one, and what the reference gives for it."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from functools import partial
from typing import Any
from unittest import mock

import torch

from tests.support import reference, training
from tests.support.counting import collectives_across_workers
from tests.support.pool import undo

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16", "bf16, fp32 accumulation", "fp16")
# torch's, DeepSpeed's FusedAdam, and its CPUAdam with offload_optimizer to the CPU.
OPTIMIZERS = ("AdamW", "SGD", "FusedAdam", "offloaded CPUAdam", "offloaded SGD")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "bf16, fp32 accumulation": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 64.0
NO_COMPILER = shutil.which("g++") is None


@dataclasses.dataclass(frozen=True)
class Combination:
    stage: int
    precision: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.stage}-{self.precision}-{self.optimizer}"

    @property
    def refused(self) -> str | None:
        """Words of the error that refuses it; None where it works."""
        if self.stage == 0 and self.optimizer.startswith("offloaded"):
            return "zero_optimization.offload_optimizer is set and the stage is 0"
        if self.stage == 0 and self.precision == "fp16":
            return "fp16 is enabled and ZeRO is off"
        if self.stage == 0 and self.precision == "bf16, fp32 accumulation":
            return "data_types.grad_accum_dtype is fp32 and ZeRO is off"
        return None

    @property
    def compiled(self) -> bool:
        """Whether DeepSpeed compiles an operator for it, which takes a C++ compiler and a minute, once."""
        return self.optimizer in ("FusedAdam", "offloaded CPUAdam")

    @property
    def zero_step(self) -> bool:
        """Stage 0 in low precision makes the optimizer's state by a step with a gradient of zero."""
        return self.stage == 0 and self.precision != "fp32"

    def config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": training.BATCH,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        if self.optimizer.startswith("offloaded"):
            zero["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = self.optimizer == "offloaded CPUAdam"
        if self.precision.startswith("bf16"):
            config["bf16"] = {"enabled": True}
        if self.precision == "bf16, fp32 accumulation":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.precision == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
        if self.compiled:
            config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.05}}
        return config

    @property
    def make_optimizer(self) -> Any:
        """For initialize(); None where the configuration names the optimizer."""
        return None if self.compiled else partial(training.make_optimizer, self.torch_optimizer)

    @property
    def torch_optimizer(self) -> str:
        return "sgd" if self.optimizer.endswith("SGD") else "adamw"


COMBINATIONS = list(itertools.starmap(Combination, itertools.product(STAGES, PRECISIONS, OPTIMIZERS)))


def pretend_fp16() -> None:
    """A mock, since this CPU has no fast fp16: DeepSpeed asks its accelerator before it allows fp16. torch computes
    it all the same. Until the job ends."""
    from deepspeed.accelerator import get_accelerator

    undo.enter_context(mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True))


def start(combination: Combination, qsr: dict[str, Any], **config: Any) -> Any:
    import qsr_engine

    pretend_fp16()
    model = training.make_model(torch.float32)
    return qsr_engine.initialize(
        model=model,
        optimizer=combination.make_optimizer,
        model_parameters=model.parameters(),
        config={**combination.config(), **config, "qsr": qsr},
    )[0]


def take_step(engine: Any, combination: Combination) -> bool:
    import torch.distributed as dist

    dtype = DTYPES[combination.precision] or torch.float32
    inputs, targets = (
        tensor.to(engine.device) for tensor in training.batch(dist.get_rank(), engine.local_steps.step, dtype=dtype)
    )
    engine.backward(training.loss(engine(inputs), targets))
    return bool(engine.step())


def whole_parameters(engine: Any) -> torch.Tensor:
    """What the next forward reads, gathered where stage 3 has partitioned it."""
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return training.flat(parameters).clone()


def whole_masters(engine: Any) -> torch.Tensor:
    """The fp32 masters in the order of the parameters, collected from the ranks of a worker."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization():
        return training.flat([safe_get_full_fp32_param(p) for p in engine.module.parameters()])
    masters = torch.cat([master.detach().reshape(-1) for master in engine._driver.replica.masters()])
    return masters[: sum(p.numel() for p in engine.module.parameters())]


def train_job(combination: Combination, qsr: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Train to the end; count the collectives across workers in every step, forward and backward included."""
    engine = start(combination, qsr, **config)
    counts, ends = [], []
    while not engine.local_steps.finished:
        before = collectives_across_workers(qsr.get("worker_size", 1))
        boundary = take_step(engine, combination)
        if boundary:
            ends.append(engine.local_steps.step)
        counts.append((boundary, collectives_across_workers(qsr.get("worker_size", 1)) - before))
    return {
        "parameters": whole_parameters(engine),
        "masters": whole_masters(engine),
        "counts": counts,
        "ends": ends,
        "skipped": engine.local_steps.costs.skipped_steps,
        "optimizer": type(engine.optimizer).__name__,
    }


def expected(combination: Combination, qsr: dict[str, Any], workers: int, **more: Any) -> torch.Tensor:
    """The masters after training, from the reference; computed once for what the reference can tell apart."""
    precision, zero_step = combination.precision, combination.zero_step
    key = repr((precision, combination.torch_optimizer, zero_step, sorted(qsr.items()), workers, sorted(more.items())))
    if "skipped" in more:  # a function
        return _simulated(combination, qsr, workers, **more)
    if key not in _EXPECTED:
        _EXPECTED[key] = _simulated(combination, qsr, workers, **more)
    return _EXPECTED[key]


_EXPECTED: dict[str, torch.Tensor] = {}


def _simulated(combination: Combination, qsr: dict[str, Any], workers: int, **more: Any) -> torch.Tensor:
    compute = DTYPES[combination.precision]
    models, _ = reference.simulate(
        partial(training.rounded_model, torch.float32, compute),
        partial(training.make_optimizer, combination.torch_optimizer),
        lambda rank, step: [training.batch(rank, step, dtype=compute or torch.float32)],
        qsr,
        workers,
        compute_dtype=compute,
        loss_scale=LOSS_SCALE if combination.precision == "fp16" else 1.0,
        zero_step=combination.zero_step,
        worker_size=qsr.get("worker_size", 1),
        **{"reduce_dtype": torch.float32 if combination.precision == "bf16, fp32 accumulation" else None, **more},
    )
    return training.flat(models[0].parameters())


def assert_like_reference(combination: Combination, results: list[dict[str, Any]], oracle: torch.Tensor) -> None:
    """Bit for bit, the low-precision copies of every rank too.

    But for DeepSpeed's own Adam: its vectorized C++ rounds the formula of torch's in another order, by about 2^-24 a
    step. In fp32 12 such steps stay below 1e-5. In low precision, such a difference now and then rounds a parameter the
    other way, by 2^-8 (bf16) or 2^-11 (fp16) of its size, and the next gradient is as wrong: 12 steps of at most 0.05
    times that.
    """
    compute = DTYPES[combination.precision] or torch.float32
    for result in results:
        assert torch.equal(result["masters"], results[0]["masters"])
        assert torch.equal(result["parameters"], result["masters"].to(compute))
    if combination.compiled:
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 12 * 0.05 * 2.0**-8, torch.float16: 12 * 0.05 * 2.0**-11}
        torch.testing.assert_close(results[0]["masters"], oracle, rtol=0, atol=tolerance[compute])
    else:
        assert torch.equal(results[0]["masters"], oracle)
