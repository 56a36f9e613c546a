"""Models that local steps cannot train under DeepSpeed are refused by the name of what is in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qsr_engine.config.strict import ConfigError
from qsr_engine.engines.deepspeed.compiled_models import with_plain_names
from qsr_engine.engines.deepspeed.models import check_model, check_sparse_gradients


def moe() -> nn.Module:
    from deepspeed.moe.layer import MoE

    return MoE(4, nn.Linear(4, 4), num_experts=2)  # type: ignore[no-any-return]


def sequence() -> nn.Module:
    from deepspeed.sequence.layer import DistributedAttention

    return DistributedAttention(nn.Linear(4, 4), None)  # type: ignore[no-any-return]


def tensor_parallel() -> nn.Module:
    from deepspeed.module_inject.layers import LinearLayer

    return LinearLayer(nn.Linear(4, 4), None, name="sharded")  # type: ignore[no-any-return]


def pipeline() -> nn.Module:
    """Its class without its constructor, which needs a process group: that is all that is looked at."""
    from deepspeed.runtime.pipe import PipelineModule

    stages: nn.Module = PipelineModule.__new__(PipelineModule)
    nn.Module.__init__(stages)
    return stages


def expert() -> nn.Module:
    layer: Any = nn.Linear(4, 4)
    layer.bias.allreduce = False
    return layer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (moe, r"the module '1' is a deepspeed\.moe\.layer\.MoE, which keeps other experts on every rank"),
        (sequence, r"the module '1' is a deepspeed\.sequence\.layer\.DistributedAttention"),
        (tensor_parallel, r"the module '1' is a deepspeed\.module_inject\.layers\.TensorParallel_Layer"),
        (pipeline, r"the module '1' is a deepspeed\.runtime\.pipe\.module\.PipelineModule"),
        (expert, r"the parameter '1\.bias' has allreduce=False"),
    ],
)
def test_what_is_spread_over_ranks_is_named(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_model(nn.Sequential(nn.Linear(4, 4), make()))


def test_a_compiled_model_has_plain_names_and_stays_compiled() -> None:
    """At the top and inside, for torch's own modules too."""
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    names, inputs = list(model.state_dict()), torch.randn(3, 4)
    expected = model(inputs)
    model[1] = torch.compile(model[1], backend=backend)
    whole: Any = torch.compile(model, backend=backend)
    plain: Any = with_plain_names(whole.eval())
    assert list(plain.state_dict()) == names
    assert not plain.training
    assert torch.equal(plain(inputs), expected)
    assert len(compiled) == 1
    assert torch.equal(plain[1](inputs), model[1](inputs))
    assert len(compiled) == 2, "the part is compiled by itself too"


@pytest.mark.parametrize(
    ("stage", "strategy", "kind", "words"),
    [
        (1, "constant", torch.optim.SGD, "the module '0' has sparse gradients, which ZeRO stage 1 does not take"),
        (3, "parallel", torch.optim.SGD, "ZeRO stage 3 does not take; write sparse=False, or stage 0"),
        (0, "post_local", torch.optim.SGD, "'post_local' does not average before its switch"),
        (0, "constant", torch.optim.AdamW, "AdamW does not take; write sparse=False"),
        (0, "constant", torch.optim.SGD, None),
        (0, "parallel", torch.optim.SparseAdam, None),
    ],
)
def test_sparse_gradients_are_refused_where_a_step_would_fail(
    stage: int, strategy: str, kind: Any, words: str | None
) -> None:
    model = nn.Sequential(nn.Embedding(3, 4, sparse=True), nn.Linear(4, 4))
    optimizer = kind(model.parameters(), lr=0.1)
    check_sparse_gradients(nn.Linear(4, 4), optimizer, stage, strategy)
    if words is None:
        check_sparse_gradients(model, optimizer, stage, strategy)
        return
    with pytest.raises(ConfigError, match=words):
        check_sparse_gradients(model, optimizer, stage, strategy)
