"""The DeepSpeed engine on models with buffers, shared and frozen parameters, and several groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support import training
from tests.support.deepspeed_engine import start, step
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


def group_job(groups: list[dict[str, Any]]) -> None:
    import qsr_engine

    model = nn.ModuleList(nn.Linear(2, 2) for _ in groups)
    parameters = [{"params": list(module.parameters()), **group} for module, group in zip(model, groups, strict=True)]
    qsr_engine.initialize(
        model=model, optimizer=torch.optim.SGD(parameters, lr=0.1), config={"train_batch_size": 8, "qsr": QSR}
    )


def test_groups_with_other_learning_rates_are_refused(processes: Processes) -> None:
    with pytest.raises(JobError, match=r"learning rates \[0.01, 0.1\], and qsr.lr sets one for all"):
        processes.run(group_job, groups=[{"lr": 0.01}, {}])
    with pytest.raises(JobError, match=r"has the lr_scale '0.5', and it is a factor on the learning rate; write a num"):
        processes.run(group_job, groups=[{"lr_scale": "0.5"}, {}])


def moved_job(way: str) -> str:
    """The model's storage is replaced after initialize(), on rank 1 only."""
    import torch.distributed as dist

    from qsr_engine.local_steps.header import BoundaryError

    engine = start(QSR)
    weight = next(engine.module.parameters())
    if dist.get_rank() == 1:
        if way == "data":
            weight.data = weight.data.clone()
        elif way == "to":
            engine.module.to(torch.float64).to(torch.float32)
        else:
            engine.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    try:
        step(engine)
        step(engine)
    except BoundaryError as error:
        return str(error)
    return "it averaged"


@pytest.mark.parametrize(("way", "count"), [("data", 1), ("to", 6), ("group", 1)])
def test_parameters_that_left_the_buckets_are_an_error_on_every_rank(
    processes: Processes, way: str, count: int
) -> None:
    for said in processes.run(moved_job, way=way):
        assert f"after step 2, {count} of the parameters are no longer where they are averaged, on rank 1" in said


def order_job(orders: list[list[int]]) -> None:
    import torch.distributed as dist

    import qsr_engine

    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    dist.init_process_group("gloo")
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD([parameters[place] for place in orders[dist.get_rank()]], lr=0.1)
    qsr_engine.initialize(model=model, optimizer=optimizer, config={"train_batch_size": 8, "qsr": QSR})


def test_parameters_in_another_order_are_refused(processes: Processes) -> None:
    """Parameter groups made from a set come in another order in every process; layers would be mixed up."""
    processes.run(order_job, orders=[[2, 1, 0], [2, 1, 0]])
    with pytest.raises(JobError) as caught:
        processes.run(order_job, orders=[[0, 1, 2, 3], [2, 1, 0, 3]])
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "AgreementError"
        assert "optimizer.group 0.parameter 0: '0.weight' on rank 0; '1.weight' on rank 1" in error[1]


def buffers_job(strategy: str, buffers: str, worker_size: int) -> list[torch.Tensor]:
    """Running statistics after a run, and after an evaluation would have asked for their average."""
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(training.FEATURES, 6), norm, nn.Linear(6, training.OUTPUTS))
    assert norm.running_mean is not None
    block = {"strategy": strategy, "h_base": 2, "total_steps": 4, "lr": QSR["lr"], "worker_size": worker_size}
    engine = start({**block, "averaging": {"buffers": buffers}}, model)
    while not engine.local_steps.finished:
        step(engine)
    after_run = norm.running_mean.clone()
    engine.local_steps.boundary.buffers.average()
    return [after_run, norm.running_mean.clone()]


@pytest.mark.parametrize(
    ("strategy", "buffers", "worker_size", "equal"),
    [
        ("constant", "average", 1, [True, True]),
        ("constant", "average", 2, [True, True]),
        ("constant", "local", 1, [False, False]),
        ("parallel", "average", 1, [False, True]),  # DeepSpeed's own data parallel leaves them to each rank
    ],
)
def test_batch_norm_statistics(
    processes: Processes, strategy: str, buffers: str, worker_size: int, equal: list[bool]
) -> None:
    ranks = 2 * worker_size
    first, *others = processes.run(
        buffers_job, ranks=ranks, strategy=strategy, buffers=buffers, worker_size=worker_size
    )
    for other in others:
        assert [torch.equal(a, b) for a, b in zip(first, other, strict=True)] == equal


def tied_job() -> list[torch.Tensor]:
    """Shared weights, a frozen parameter, and a parameter that takes no part in the loss."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(training.FEATURES, training.OUTPUTS)
            self.decoder = nn.Linear(training.FEATURES, training.OUTPUTS)
            self.decoder.weight = self.encoder.weight
            self.frozen = nn.Parameter(torch.full((training.OUTPUTS,), 0.1), requires_grad=False)
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.encoder(inputs) + self.decoder(inputs)
            return outputs * self.frozen

    import torch.distributed as dist

    model = Net()
    engine = start({"strategy": "constant", "h_base": 3, "total_steps": 6, "lr": QSR["lr"]}, model)
    before: list[torch.Tensor] = []
    original = engine.local_steps.averager.average

    def spy(*args: Any) -> None:
        gathered = [torch.empty_like(model.encoder.weight) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, model.encoder.weight.detach().contiguous())
        before[:] = gathered
        original(*args)

    engine.local_steps.averager.average = spy
    while not engine.local_steps.finished:
        step(engine)
    assert model.decoder.weight is model.encoder.weight
    return [torch.stack(before).mean(0), model.encoder.weight.detach(), model.frozen.detach(), model.unused.detach()]


def test_shared_frozen_and_unused_parameters(processes: Processes) -> None:
    for mean, weight, frozen, unused in processes.run(tied_job):
        assert torch.equal(weight, mean), "averaged once, not twice"
        assert torch.equal(frozen, torch.full((training.OUTPUTS,), 0.1))
        assert torch.equal(unused, torch.ones(2))


def mask_job(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    model = training.make_model(torch.float32)
    constant = torch.linspace(-3, 3, 50).to(dtype)
    constant[0] = torch.finfo(dtype).min
    model.register_buffer("mask", constant.clone())
    engine = start(QSR, model)
    while not engine.local_steps.finished:
        step(engine)
    return constant, engine.module.mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_buffer_that_is_the_same_everywhere_keeps_its_bits(processes: Processes, dtype: torch.dtype) -> None:
    """Averaged in its own type, the sum of an attention mask's smallest numbers was minus infinity."""
    for constant, found in processes.run(mask_job, ranks=3, dtype=dtype):
        assert torch.equal(constant, found)


def groups_job() -> list[int]:
    import qsr_engine

    model = training.make_model(torch.float32)
    backbone, head = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizer = torch.optim.SGD([{"params": backbone, "lr": 0.0}, {"params": head, "lr": 0.01}])
    qsr = {"strategy": "qsr", "h_base": 2, "alpha": 0.03, "total_steps": 40, "warmup_steps": 0}
    config = {"train_micro_batch_size_per_gpu": training.BATCH, "qsr": qsr}
    engine = qsr_engine.initialize(model=model, optimizer=optimizer, config=config)[0]
    return [engine.local_steps.period]


def test_h_follows_the_largest_learning_rate_of_the_groups(processes: Processes) -> None:
    """A frozen first group, of learning rate 0, would make one round of the whole run."""
    assert processes.run(groups_job) == [[9], [9]]


def adagrad_job() -> None:
    import qsr_engine

    model = training.make_model(torch.float32)
    config = {"train_micro_batch_size_per_gpu": training.BATCH, "qsr": QSR, "bf16": {"enabled": True}}
    qsr_engine.initialize(
        model=model, optimizer=torch.optim.Adagrad, model_parameters=model.parameters(), config=config
    )


def channels_last_job() -> None:
    start(QSR, nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (adagrad_job, "Adagrad makes its state for the parameters that it is given"),
        (channels_last_job, r"the parameter '0.weight' is not contiguous \(channels_last\?\)"),
    ],
)
def test_what_deepspeed_itself_cannot_do_is_refused(processes: Processes, job: Any, words: str) -> None:
    with pytest.raises(JobError, match=words):
        processes.run(job)
