"""Loops around the FSDP engine as FSDP's users write them: loss.backward(), parameters frozen and unfrozen on the way,
clipping by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qsr_engine.engines.fsdp.shards import local_part
from tests.support import training
from tests.support.fsdp_engine import BF16, MODELS, STRATEGIES, batch_of, expected, furthest, mlp, start, state_of
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


class WithLoss(nn.Module):
    """Returns its loss beside what it is made of, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.inner(inputs)
        return {"logits": outputs, "loss": training.loss(outputs.float(), targets.float())}


def loss_backward_job(qsr: dict[str, Any], inside: bool, accumulation: int, **config: Any) -> dict[str, torch.Tensor]:
    """Train with `loss.backward()`, with a loss of the loop's or of the model's own."""
    engine = start(qsr, WithLoss() if inside else mlp(), "sgd", gradient_accumulation_steps=accumulation, **config)
    while not engine.local_steps.finished:
        for micro in range(accumulation):
            inputs, targets = batch_of("mlp", dist.get_rank(), engine.local_steps.step, micro)
            loss = engine(inputs, targets)["loss"] if inside else training.loss(engine(inputs).mul_(1).float(), targets)
            loss.backward()
            engine.step()
    return {name.removeprefix("inner."): value for name, value in state_of(engine).items()}


@pytest.mark.parametrize(
    ("strategy", "worker_size", "inside", "accumulation", "config"),
    [("qsr", 1, False, 1, BF16), ("qsr", 1, True, 2, {}), ("parallel", 2, False, 2, {})],
    ids=["copies", "a loss of the model's own", "HSDP"],
)
def test_loss_backward_is_the_engines_backward(
    processes: Processes, strategy: str, worker_size: int, inside: bool, accumulation: int, config: dict[str, Any]
) -> None:
    """In bf16 the copies' gradients did not reach the optimizer, in silence. The engine divides by the micro-batches
    of a step, as DeepSpeed's does. Under HSDP in another order than the reference: 1e-6."""
    qsr = {**STRATEGIES[strategy], "worker_size": worker_size}
    job: dict[str, Any] = {"qsr": qsr, "inside": inside, "accumulation": accumulation, **config}
    found = processes.run(loss_backward_job, ranks=2 * worker_size, **job)[0]
    low: dict[str, Any] = {"compute_dtype": torch.bfloat16, "gradient_dtype": torch.float32} if config else {}
    wanted = expected(qsr, 2, optimizer="sgd", accumulation=accumulation, **low)
    assert furthest(found, wanted) <= (1e-6 if strategy == "parallel" else 0)


def autocast(model: nn.Module) -> nn.Module:
    """The model under torch.autocast in bf16."""
    plain = model.forward
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(plain)
    return model


def autocast_job(worker_size: int, **config: Any) -> tuple[dict[str, torch.Tensor], set[str], str]:
    """Train under an autocast around forward and loss; the model, the types of gradients, and what fp16 is told."""
    engine = start({**QSR, "worker_size": worker_size}, optimizer="sgd", **config)
    types = set()
    while not engine.local_steps.finished:
        inputs, targets = batch_of("mlp", dist.get_rank(), engine.local_steps.step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training.loss(engine(inputs).float(), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        types |= {str(p.grad.dtype) for p in engine.module.parameters() if p.grad is not None}
        engine.step()
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(RuntimeError) as refused:
        engine(inputs)
    return state_of(engine), types, str(refused.value)


@pytest.mark.parametrize("worker_size", [1, 2])
def test_autocast_around_a_forward(processes: Processes, worker_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, gradients and averages in fp32, bit for bit as a plain loop has them; clipped, too."""
    results = processes.run(autocast_job, ranks=2 * worker_size, worker_size=worker_size, gradient_clipping=0.05)
    monkeypatch.setitem(MODELS, "mlp", lambda: autocast(mlp()))
    wanted = expected({**QSR, "worker_size": worker_size}, 2, optimizer="sgd", clip=0.05)
    found, types, refused = results[0]
    assert types == {"torch.float32"}
    assert furthest(found, wanted) <= (0 if worker_size == 1 else 1e-6)
    assert "under torch.autocast in float16" in refused


LAYERS = ("0", "3")  # of mlp(): its first and its last one


def frozen_job(worker_size: int, **config: Any) -> list[dict[str, Any]]:
    """Three steps: with the first layer frozen since before the start, with nothing frozen, with the last one frozen.
    What has a gradient after the backward, its norm as a loop finds it that clips by hand, and what has changed."""
    model: Any = mlp()
    model[0].requires_grad_(False)
    all_of_them = {"optimizer": lambda _: training.make_optimizer("adamw", model.parameters())}
    engine = start({**QSR, "worker_size": worker_size}, model, given=all_of_them, **config)
    found = []
    for frozen in ("0", "none", "3"):
        for layer in LAYERS:
            model.get_submodule(layer).requires_grad_(layer != frozen)
        before = {name: local_part(parameter).clone() for name, parameter in engine._named.items()}
        inputs, targets = batch_of("mlp", dist.get_rank(), engine.local_steps.step)
        with torch.no_grad():
            engine(inputs)
        training.loss(engine(inputs).float(), targets).backward()  # type: ignore[no-untyped-call]
        with_gradient = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        norm = float(local_part(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        engine.step()
        changed = {n.partition(".")[0] for n, p in engine._named.items() if not torch.equal(local_part(p), before[n])}
        found.append({"with_gradient": with_gradient, "norm": norm, "changed": changed})
    return found


@pytest.mark.parametrize(("worker_size", "config"), [(1, BF16), (2, BF16)], ids=["copies", "shards"])
def test_parameters_are_frozen_and_unfrozen_on_the_way(
    processes: Processes, worker_size: int, config: dict[str, Any]
) -> None:
    """The copies of a worker of one rank used to keep what they had been made with, and a loop that clips by hand to
    find those in place of the masters."""
    for result in processes.run(frozen_job, ranks=2 * worker_size, worker_size=worker_size, **config):
        for step, trained in zip(result, ({"2", "3"}, {"0", "2", "3"}, {"0", "2"}), strict=True):
            assert step["with_gradient"] == step["changed"] == trained
            assert step["norm"] > 0


def unknown_job() -> None:
    model: Any = mlp()
    model[0].requires_grad_(False)
    engine = start(QSR, model)
    model[0].requires_grad_(True)
    inputs, targets = batch_of("mlp", 0, 0)
    engine.backward(training.loss(engine(inputs), targets))
    engine.step()


def test_a_parameter_that_the_optimizer_has_not_got_is_not_left_untrained_in_silence(processes: Processes) -> None:
    with pytest.raises(JobError, match=r"'0.weight' takes gradients at step 0, and the optimizer has not got it"):
        processes.run(unknown_job, ranks=1)
