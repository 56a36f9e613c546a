"""What part A and part B compare, and what they share: models, engines, steps, and figures of a variant."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import qsr_engine
from benchmarks.steps import LEARNING_RATE, Step, adamw, loop_step
from benchmarks.timing import bootstrap

LONG = 10**6  # steps of a round that outlasts the measurement
Row = dict[str, Any]


def blocks_of(model: Any) -> list[nn.Module]:
    """As a user of fully_shard lists them: a transformer's blocks, a ResNet's stages."""
    return list(model.blocks) if hasattr(model, "blocks") else [getattr(model, f"layer{i}") for i in range(1, 5)]


def make_data(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(dist.get_rank())
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def make_engine(model: nn.Module, arguments: argparse.Namespace, qsr: dict[str, Any], **config: Any) -> Any:
    optimizer = config.pop("optimizer", partial(adamw, fused=arguments.fused))
    lr = {"schedule": "constant", "peak": LEARNING_RATE}
    return qsr_engine.initialize_fsdp(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": arguments.batch,
            "gradient_clipping": arguments.clip,
            "qsr": {"total_steps": LONG, "lr": lr, **qsr},
            **config,
        },
    )


def loop_of(model: nn.Module, data: tuple[Tensor, Tensor], arguments: argparse.Namespace) -> Step:
    return loop_step(model, adamw(model.parameters(), arguments.fused), *data, arguments.clip)


def shard_by_hand(model: nn.Module, mesh: DeviceMesh, bf16: bool = False) -> nn.Module:
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = low if bf16 else MixedPrecisionPolicy()
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def figures(times: Tensor, baseline: Tensor) -> Row:
    """The median, and the ratio as said above with its 95 % interval."""
    # quantile() interpolates, as statistics.median does
    ratio, interval = bootstrap(lambda chosen: (times / baseline)[chosen].quantile(0.5, 1), len(times))
    return {
        "milliseconds": times.quantile(0.5).item(),
        "lowest": times.min().item(),
        "highest": times.max().item(),
        "ratio": ratio,
        "interval": interval,
        "all": [round(value, 2) for value in times.tolist()],
    }


def ratio_of(row: Row, baseline: str) -> str:
    low, high = row["interval"]
    return "1" if row["variant"] == baseline else f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
