"""The FSDP engine (and DeepSpeed's beside it) on small real models, and what the reference gives for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.support import reference, training
from tests.support.counting import collectives_across_workers
from tests.support.training import QSR

LR = QSR["lr"]
BF16: dict[str, Any] = {"bf16": {"enabled": True}}


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return training.make_model(dtype)


def vit() -> nn.Module:
    """Three blocks of a real vision transformer, with sizes that two ranks do not divide evenly."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 18, "depth": 3, "num_heads": 3}
    model: nn.Module = VisionTransformer(**sizes, mlp_ratio=1.5, num_classes=training.OUTPUTS)
    return model


def resnet() -> nn.Module:
    """A real ResNet with batch norm, narrow."""
    torch.manual_seed(7)
    layers, channels = (2, 2, 1, 1), (4, 6, 8, 8)
    model: nn.Module = ResNet(BasicBlock, layers, num_classes=training.OUTPUTS, channels=channels, stem_width=4)
    return model


class OneRow(nn.Module):
    """A single parameter of one row, of which the second rank of a worker holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.weight = nn.Parameter(torch.randn(1, training.FEATURES))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = nn.functional.linear(inputs, self.weight) * torch.ones(training.OUTPUTS)
        return outputs


class Adapted(nn.Module):
    """A frozen base in bf16 with an adapter in fp32, as LoRA makes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.base = nn.Linear(training.FEATURES, training.OUTPUTS, dtype=torch.bfloat16).requires_grad_(False)
        self.down = nn.Linear(training.FEATURES, 2, bias=False)
        self.up = nn.Linear(2, training.OUTPUTS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        adapted: torch.Tensor = self.up(self.down(inputs.to(self.down.weight.dtype)))
        base: torch.Tensor = self.base(inputs.to(self.base.weight.dtype))
        return adapted + base.to(adapted.dtype)


def wide() -> nn.Module:
    """A model of 256 kB, beside which headers are little."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(training.FEATURES, 4000), nn.Tanh(), nn.Linear(4000, training.OUTPUTS))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "vit": vit,
    "resnet": resnet,
    "one row": OneRow,
    "adapted": Adapted,
    "wide": wide,
}


def image_batch(rank: int, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1_000_000 * rank + 1_000 * step + micro)
    images = torch.randn(training.BATCH, 3, 8, 8, generator=generator)
    return images, images.mean((2, 3)).sin()


def batch_of(model: str, rank: int, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    if model not in ("vit", "resnet"):
        return training.batch(rank, step, micro, dtype=torch.float32)
    return image_batch(rank, step, micro)


def config_of(qsr: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": training.BATCH, "gradient_clipping": 0.0, "qsr": qsr, **more}


def start(
    qsr: dict[str, Any], model: nn.Module | None = None, optimizer: str = "adamw", given: Any = None, **config: Any
) -> Any:
    import qsr_engine

    arguments = {"optimizer": partial(training.make_optimizer, optimizer), **(given or {})}
    made = mlp() if model is None else model
    return qsr_engine.initialize_fsdp(model=made, config=config_of(qsr, **config), **arguments)


def start_deepspeed(qsr: dict[str, Any], model: nn.Module, optimizer: str, stage: int, **config: Any) -> Any:
    import qsr_engine

    return qsr_engine.initialize(
        model=model,
        optimizer=partial(training.make_optimizer, optimizer),
        config=config_of(qsr, zero_optimization={"stage": stage}, zero_allow_untested_optimizer=True, **config),
    )[0]


def take_step(engine: Any, model: str = "mlp") -> bool:
    import torch.distributed as dist

    boundary = False
    for micro in range(engine.gradient_accumulation_steps()):
        batch = batch_of(model, dist.get_rank(), engine.local_steps.step, micro)
        inputs, targets = (tensor.to(engine.device) for tensor in batch)
        engine.backward(training.loss(engine(inputs).float(), targets))
        boundary = engine.step()
    return bool(boundary)


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """The averaged model, on rank 0, with the layers of DeepSpeed's and FSDP's engine alike."""
    state: dict[str, torch.Tensor] = engine.averaged_state_dict()
    return state


def fingerprint(engine: Any) -> float:
    """Of what this rank holds; ranks with the same place in their worker must have the same."""
    return float(engine.local_steps.averager.sum_of_squares())


def train_job(
    qsr: dict[str, Any],
    model: str = "mlp",
    optimizer: str = "adamw",
    stage: int | None = None,
    given: Any = None,
    **config: Any,
) -> dict[str, Any]:
    """Train to the end, with DeepSpeed where a stage is given; count the collectives across workers in every step."""
    made = MODELS[model]()
    if stage is None:
        engine = start(qsr, made, optimizer, given, **config)
    else:
        engine = start_deepspeed(qsr, made, optimizer, stage)
    worker_size = qsr.get("worker_size", 1)
    counts, ends = [], []
    while not engine.local_steps.finished:
        before = collectives_across_workers(worker_size)
        boundary = take_step(engine, model)
        counts.append((boundary, collectives_across_workers(worker_size) - before))
        if boundary:
            ends.append(engine.local_steps.step)
    return {
        "state": state_of(engine),
        "fingerprint": fingerprint(engine),
        "counts": counts,
        "ends": ends,
        "masters": type(engine._driver.replica).__name__,
        "way": engine.local_steps.averager.way,
    }


def expected(
    qsr: dict[str, Any], workers: int, model: str = "mlp", optimizer: str = "adamw", accumulation: int = 1, **more: Any
) -> dict[str, torch.Tensor]:
    """The model after training, from the reference."""
    compute = more.get("compute_dtype") or torch.float32

    def micro_batch(rank: int, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = batch_of(model, rank, step, micro)
        return inputs.to(compute), targets

    models, _ = reference.simulate(
        MODELS[model],
        partial(training.make_optimizer, optimizer),
        lambda rank, step: [micro_batch(rank, step, micro) for micro in range(accumulation)],
        qsr,
        workers,
        worker_size=qsr.get("worker_size", 1),
        loss=lambda outputs, targets: training.loss(outputs.float(), targets),
        average_buffers=True,
        **more,
    )
    return {name: tensor.detach() for name, tensor in models[0].state_dict().items()}


def furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models, in all parameters and buffers."""
    assert set(found) == set(wanted)
    return max(float((found[name].double() - value.double()).abs().max()) for name, value in wanted.items())


def assert_silent(results: list[dict[str, Any]], worker_size: int) -> None:
    """No collective crosses workers between boundaries, and after one all workers hold the same."""
    for rank, result in enumerate(results):
        assert all(count == 0 for boundary, count in result["counts"] if not boundary)
        assert all(count > 0 for boundary, count in result["counts"] if boundary)
        assert result["fingerprint"] == results[rank % worker_size]["fingerprint"]


SWITCHING = {"h_base": 3, "switch_step": 5, "total_steps": 12, "lr": LR}
STRATEGIES: dict[str, dict[str, Any]] = {
    "qsr": QSR,
    "constant": {"strategy": "constant", "h_base": 3, "total_steps": 12, "lr": LR},
    "parallel": {"strategy": "parallel", "total_steps": 12, "lr": LR},
    "post_local": {"strategy": "post_local", **SWITCHING},
    "swap": {"strategy": "swap", **SWITCHING},
}


ENDS = {
    "qsr": [2, 4, 6, 8, 12],
    "constant": [3, 6, 9, 12],
    "parallel": [*range(1, 13)],
    "post_local": [1, 2, 3, 4, 5, 8, 11, 12],
    "swap": [3, 5, 12],
}


def scheduled(step: int) -> float:
    """A schedule of the caller's own."""
    return 0.04 - 0.003 * step
