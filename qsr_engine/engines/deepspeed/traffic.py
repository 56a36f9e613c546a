"""What leaves a worker at a step of `parallel` with this engine's model, types and ZeRO stage."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from qsr_engine.local_steps.traffic import deepspeed_parallel_bytes

_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def parallel_bytes(engine: DeepSpeedEngine, worker_size: int) -> int:
    """Bytes that leave a worker at one step of DeepSpeed's own data parallel over all ranks, with such an engine.

    Args:
        engine: whatever ranks it reduces over now.
        worker_size: ranks of a worker.
    """
    stage, zero = int(engine.zero_optimization_stage()), engine._config.zero_config
    gradients, gathered, kept = Counter[str](), Counter[str](), Counter[str]()
    for parameter in engine.module.parameters():
        numel, trained = int(getattr(parameter, "ds_numel", parameter.numel())), parameter.requires_grad
        if trained:
            gradients[_NAMES[_reduced_in(engine, parameter)]] += numel
        if trained or stage == 3:
            small = getattr(parameter, "ds_persist", False)
            dtype = torch_autocast.get_comm_dtype(parameter) if stage == 3 else parameter.dtype
            (kept if small else gathered)[_NAMES[dtype]] += numel
    passes = None
    if stage == 3 and not zero.reduce_scatter and zero.contiguous_gradients:
        passes = 2
    elif stage in (1, 2) and zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce:
        passes = 1
    return deepspeed_parallel_bytes(
        gradients,
        dist.get_world_size() // worker_size,
        worker_size,
        zero_stage=stage,
        gathered=gathered,
        kept=kept,
        accumulation=int(engine.gradient_accumulation_steps()),
        gradient_passes=passes,
        reuse_distance=int(zero.max_reuse_distance),
    )


def _reduced_in(engine: Any, parameter: nn.Parameter) -> torch.dtype:
    """BF16_Optimizer has no type of its own: the engine reduces its gradients."""
    zero = hasattr(engine.optimizer, "communication_data_type")
    dtype: torch.dtype = engine.optimizer.get_param_comm_dtype(parameter) if zero else engine.communication_data_type
    return dtype
