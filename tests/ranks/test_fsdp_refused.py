"""What the FSDP engine refuses, and errors that every rank gets."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import training
from tests.support.fsdp_engine import (
    BF16,
    Adapted,
    config_of,
    mlp,
    start,
    take_step,
)
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


def refused_job(model: str, given: dict[str, Any], config: dict[str, Any]) -> None:
    models: dict[str, Any] = {
        "mlp": mlp,
        "adapted": WithItsOptimizer,
        "bf16": lambda: mlp().bfloat16(),
        "frozen": lambda: mlp().requires_grad_(False),
        "scalar": lambda: nn.ParameterDict({"a": nn.Parameter(torch.tensor(1.0))}),
        "meta": lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(2, device="meta"))}),
        "sparse": lambda: nn.Embedding(3, 4, sparse=True),
        "compiled": lambda: torch.compile(mlp()),
        "integers": integers_on_meta,
        "empty": lambda: nn.ParameterList([nn.Parameter(torch.ones(0, 4)), nn.Parameter(torch.ones(2))]),
        "none": lambda: None,
    }
    import qsr_engine

    arguments = {"optimizer": partial(training.make_optimizer, "sgd"), "config": {**config_of(QSR), **config}, **given}
    qsr_engine.initialize_fsdp(model=models[model](), **arguments)


class WithItsOptimizer(Adapted):
    """of_all() finds it."""

    made: list[nn.Module] = []

    def __init__(self) -> None:
        super().__init__()
        self.made[:] = [self]


def of_all(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(WithItsOptimizer.made[0].parameters(), lr=0.1)


def not_an_optimizer(parameters: Any) -> str:
    return "sgd"


def of_some(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameters[0], parameters[2], parameters[4]], lr=0.1)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


WITHOUT_LR = {"warmup_steps": 3, **{key: value for key, value in QSR.items() if key != "lr"}}


class Indexed(nn.Module):
    """A buffer of integers, which a model on the meta device leaves to init."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, device="meta"))
        self.register_buffer("index", torch.zeros(3, dtype=torch.int64, device="meta"))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


def integers_on_meta() -> nn.Module:
    return Indexed()


def of_another_model(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(mlp().parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("model", "given", "config", "words"),
    [
        ("mlp", {}, {"zero_optimization": {"stage": 3}}, "zero_optimization: the FSDP engine does not read it"),
        ("mlp", {}, {"fp16": {"enabled": True}}, "fp16: the FSDP engine does not read it; there is no loss scaling"),
        ("mlp", {}, {"csv_monitor": {"enabled": True}}, "csv_monitor: the FSDP engine does not read it; write tensor"),
        ("mlp", {}, {"optimizer": {"type": "AdamW"}}, "optimizer: the FSDP engine does not read it; give initialize"),
        ("mlp", {}, {"gradient_cliping": 1.0}, "gradient_cliping: unknown key; did you mean 'gradient_clipping'"),
        ("mlp", {}, {"fsdp": {"reshard": True}}, "fsdp.reshard: unknown key; did you mean 'reshard_after_forward'"),
        ("mlp", {}, {"fsdp": {"cpu_offload": True}}, "fsdp.cpu_offload is true, and the model is on the CPU already"),
        ("mlp", {}, {"train_batch_size": 7}, "train_batch_size is 7, which is not a multiple"),
        ("mlp", {}, {"qsr": {**QSR, "worker_size": 3}}, "qsr.worker_size is 3 and there are 2 ranks"),
        ("mlp", {"config": None}, {}, "needs config=..."),
        ("mlp", {}, {"qsr": None}, "config: qsr: found None"),
        ("mlp", {"wrap": "blocks"}, {}, "wrap is 'blocks'; give classes of modules"),
        (
            "mlp",
            {"optimizer": of_some},
            {},
            "the optimizer has not got 3 parameters that take gradients, such as",
        ),
        ("mlp", {"optimizer": torch.optim.LBFGS}, {}, "LBFGS calls the model several times in a step"),
        ("mlp", {"lr_scheduler": plateau}, {"qsr": WITHOUT_LR}, "ReduceLROnPlateau needs a metric at every step"),
        (
            "mlp",
            {},
            {"qsr": {**QSR, "averaging": {"overlap": "next_forward"}}, **BF16},
            "or a worker_size of 1 in fp32",
        ),
        ("none", {}, {}, "model is a NoneType; give a torch.nn.Module"),
        ("sparse", {}, {}, "the model has sparse gradients"),
        ("compiled", {}, {}, "the model was made by torch.compile; give the model itself"),
        ("integers", {}, {}, "'index' of a Indexed was not filled by its init"),
        ("empty", {}, {"qsr": {**QSR, "worker_size": 2}}, "the parameter '0' has no elements"),
        ("mlp", {"optimizer": "adamw"}, {}, "optimizer is a str; give a function of the parameters"),
        ("mlp", {"optimizer": not_an_optimizer}, {}, "gave a str; it must give a torch.optim.Optimizer"),
        ("mlp", {"optimizer": of_another_model}, {}, "parameters that the model does not have now"),
        ("mlp", {"lr_scheduler": of_another_model}, {}, "both qsr.lr and lr_scheduler"),
        ("mlp", {"wrap": [nn.Conv2d]}, {}, "wrap chooses no module of the Sequential"),
        ("mlp", {}, {"qsr": {**QSR, "averaging": {"state": ["exp_avg"]}}}, "SGD as configured keeps"),
        ("bf16", {}, {}, "the trained parameters are bfloat16; give them in float32"),
        ("adapted", {"optimizer": of_all}, {}, "the optimizer has got 2 frozen parameters that are not float32"),
        ("frozen", {}, {}, "has no parameter to train"),
        ("scalar", {}, {}, "the parameter 'a' has the shape []"),
        ("meta", {}, {}, "a ParameterDict holds tensors and has no reset_parameters()"),
    ],
)
def test_what_is_refused_says_why(
    processes: Processes, model: str, given: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobError) as caught:
        processes.run(refused_job, model=model, given=given, config=config)
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "ConfigError"
        assert words in error[1]


def disagreeing_job() -> None:
    start({**QSR, "h_base": 2 + int(os.environ["RANK"])})


def after_the_end_job() -> None:
    engine = start({**QSR, "total_steps": 4})
    while not engine.local_steps.finished:
        take_step(engine)
    take_step(engine)


def sharded_job() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = mlp()
    fully_shard(model)
    start(QSR, model)


def replicated_job() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    start(QSR, nn.parallel.DistributedDataParallel(mlp()))


@pytest.mark.parametrize(
    ("job", "kind", "words"),
    [
        (sharded_job, "ConfigError", "the model is sharded already; leave fully_shard out"),
        (
            replicated_job,
            "ConfigError",
            "the model is a DistributedDataParallel, which reduces",
        ),
        (disagreeing_job, "AgreementError", "config.qsr.h_base: 2 on rank 0; 3 on rank 1"),
        (after_the_end_job, "RuntimeError", "the run ended at step 4, which is qsr.total_steps"),
    ],
)
def test_errors_that_every_rank_gets(processes: Processes, job: Any, kind: str, words: str) -> None:
    with pytest.raises(JobError) as caught:
        processes.run(job)
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == kind
        assert words in error[1]
