"""What replicas ask of DeepSpeed's optimizers before they read; a stand-in has the optimizer's place."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from qsr_engine.engines.deepspeed.replicas import Partition


def test_offloaded_gradients_are_waited_for() -> None:
    """On a GPU DeepSpeed copies them to the CPU behind the backward. The stand-in's copy arrives when it is waited for,
    as the real one does at the latest; no GPU is needed to see that it is."""
    module = nn.Linear(2, 2, bias=False)
    master = nn.Parameter(torch.zeros(4))
    master.grad = torch.full((4,), float("nan"))
    gradient = master.grad
    wrapper = SimpleNamespace(
        optimizer=torch.optim.SGD([master], lr=0.1),
        param_groups=[],
        bit16_groups=[list(module.parameters())],
        cpu_offload=True,
        single_partition_of_fp32_groups=[master],
        _wait_for_offload_copies=lambda: gradient.fill_(3.0),
    )
    (found,) = Partition(module, wrapper, torch.device("cpu")).gradients()
    assert found.tolist() == [3.0] * 4
