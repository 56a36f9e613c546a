"""LocalSteps without an engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from qsr_engine.averaging import Averager
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import validate
from qsr_engine.local_steps.steps import LocalSteps
from qsr_engine.local_steps.traffic import Traffic

LR = {"schedule": "linear", "peak": 0.1, "warmup_steps": 4}
BLOCKS: list[dict[str, Any]] = [
    {"strategy": "qsr", "h_base": 2, "alpha": 0.15, "h_warmup": 3, "h_max": 12, "total_steps": 31, "lr": LR},
    {"strategy": "qsr", "h_base": 50, "alpha": 0.15, "total_steps": 7, "lr": LR},
    {"strategy": "constant", "h_base": 4, "total_steps": 10, "lr": LR},
    {"strategy": "parallel", "total_steps": 5, "lr": LR},
    {"strategy": "post_local", "h_base": 3, "switch_step": 4, "total_steps": 12, "lr": LR},
    {"strategy": "swap", "h_base": 3, "switch_step": 4, "h_max": 5, "total_steps": 12, "lr": LR},
]


def make(block: dict[str, Any]) -> LocalSteps:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    qsr = validate(QSRConfig, block, where="test")
    averager = Averager([torch.full((4,), float(dist.get_rank()))], None)
    sent = averager.bytes_per_averaging
    return LocalSteps(qsr, averager, digest=1, traffic=Traffic(averaging=sent, parallel=sent))
