"""What the DeepSpeed engine promises beside its results: silence between boundaries, agreement, errors, checkpoints."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.support import training
from tests.support.counting import collectives_across_workers
from tests.support.deepspeed_engine import STAGE_1, count_job, start, step
from tests.support.pool import JobError, Processes
from tests.support.training import QSR

# -------------------------------------------------------------------- invariant 1: silence between boundaries


@pytest.mark.fast_cells(3)
@pytest.mark.parametrize(("clip", "shared"), [(0.0, True), (1.0, False)])
@pytest.mark.parametrize(("worker_size", "ranks"), [(1, 2), (2, 4)])
@pytest.mark.parametrize("config", [{}, STAGE_1], ids=["stage0-fp32", "stage1-bf16"])
def test_no_collective_crosses_workers_between_boundaries(
    processes: Processes, config: dict[str, Any], worker_size: int, ranks: int, clip: float, shared: bool
) -> None:
    qsr = {**QSR, "worker_size": worker_size, "averaging": {"shared_memory": shared}}
    results = processes.run(count_job, ranks=ranks, qsr=qsr, config=config, clip=clip)
    for counts in results:
        assert [count for boundary, count in counts if not boundary] == [0] * (len(counts) - 5)
        # The model is one bucket. In shared memory: the header and two meetings. Through gloo: the header, two messages
        # to the one other worker and two from it, and the sum of the squares.
        assert [count for boundary, count in counts if boundary] == [3 if shared else 6] * 5


def test_the_counter_sees_data_parallel(processes: Processes) -> None:
    """The count above can fail: under `parallel`, every step reduces over all ranks."""
    counts = processes.run(count_job, qsr={**QSR, "strategy": "parallel"}, config={}, clip=0.0)[0]
    assert all(boundary and count >= 1 for boundary, count in counts)


# ------------------------------------------------------------------------------- starting and agreeing


def start_job(per_rank: list[dict[str, Any]], seeds: list[int], hidden: list[int]) -> torch.Tensor:
    import os

    rank = int(os.environ["RANK"])
    torch.manual_seed(seeds[rank])
    model = nn.Sequential(nn.Linear(training.FEATURES, hidden[rank]), nn.Linear(hidden[rank], training.OUTPUTS))
    engine = start({**QSR, **per_rank[rank]}, model)
    return training.flat(engine.module.parameters())


def test_all_workers_start_from_the_parameters_of_rank_0(processes: Processes) -> None:
    first, second, third = processes.run(start_job, ranks=3, per_rank=[{}] * 3, seeds=[1, 2, 3], hidden=[5] * 3)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize(
    ("odd", "hidden", "words"),
    [
        ({"alpha": 0.05}, 5, "config.qsr.alpha: 0.045 on rank 0; 0.05 on rank 1"),
        ({"lr": {**QSR["lr"], "peak": 0.06}}, 5, "config.qsr.lr.peak: 0.05 on rank 0; 0.06 on rank 1"),
        ({}, 6, "model.0.weight: 'float32 [5, 12]' on rank 0; 'float32 [6, 12]' on rank 1"),
    ],
)
def test_ranks_started_differently_are_told_so(
    processes: Processes, odd: dict[str, Any], hidden: int, words: str
) -> None:
    with pytest.raises(JobError) as caught:
        processes.run(start_job, seconds=60, per_rank=[{}, odd], seeds=[0, 0], hidden=[5, hidden])
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "AgreementError"
        assert words in error[1]


FOLLOWING = {"warmup_steps": 0, **{key: value for key, value in QSR.items() if key != "lr"}}
PLATEAU, ADAMW = torch.optim.lr_scheduler.ReduceLROnPlateau, torch.optim.AdamW


def half_frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3).bfloat16().requires_grad_(False), nn.Linear(3, 3))


def refused_job(arguments: dict[str, Any]) -> str:
    import qsr_engine

    try:
        sgd = partial(training.make_optimizer, "sgd")
        qsr_engine.initialize(**{"model": nn.Linear(3, 3), "optimizer": sgd, **arguments})
    except qsr_engine.ConfigError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs config="),
        ({"config": {"qsr": {**QSR, "worker_size": 3}, "train_batch_size": 8}}, "worker_size is 3 and there are 2"),
        ({"config": {"qsr": QSR, "train_batch_size": 7}}, "train_batch_size is 7"),
        ({"config": {"qsr": QSR, "train_batch_size": 8}, "optimizer": None}, "there is no optimizer"),
        ({"config": {"qsr": QSR, "train_batch_size": 8}, "model": nn.ReLU()}, "the ReLU has no parameter to train"),
        ({"config": {"qsr": QSR, "train_batch_size": 8}, "mpu": 3}, "initialize(mpu=...)"),
        ({"config": {"qsr": QSR, "train_batch_size": 8}, "lr_scheduler": 3}, "both qsr.lr and lr_scheduler"),
        ({"config": {"qsr": QSR, "train_batch_size": 8, "fp16": {"enabled": True}}}, "fp16 is enabled"),
        (
            {"config": {"qsr": FOLLOWING, "train_batch_size": 8}, "lr_scheduler": PLATEAU},
            "ReduceLROnPlateau needs a metric at every step",
        ),
        (
            {
                "config": {
                    "qsr": FOLLOWING,
                    "train_batch_size": 8,
                    "scheduler": {"type": "ReduceLROnPlateau", "params": {}},
                }
            },
            "ReduceLROnPlateau needs a metric at every step",
        ),
        (
            {
                "config": {"qsr": QSR, "train_batch_size": 8},
                "model": nn.Embedding(3, 4, sparse=True),
                "optimizer": ADAMW,
            },
            "the model has sparse gradients, which AdamW does not take",
        ),
        (
            {"config": {"qsr": QSR, "train_batch_size": 8}, "model": half_frozen()},
            "frozen parameters in bfloat16, which take no part in averages; give initialize() those that are trained",
        ),
    ],
)
def test_wrong_arguments(processes: Processes, arguments: dict[str, Any], words: str) -> None:
    for message in processes.run(refused_job, arguments=arguments):
        assert words in message


def no_launcher_job() -> str:
    import os

    rank = os.environ.pop("RANK")
    try:
        return refused_job({"config": {"qsr": QSR, "train_batch_size": 8}})
    finally:
        os.environ["RANK"] = rank


def test_a_process_without_launcher_is_told_how_to_start(processes: Processes) -> None:
    assert "was not started by a launcher" in processes.run(no_launcher_job, ranks=1)[0]


def surface_job(path: str) -> dict[str, Any]:
    """As a DeepSpeed user calls it: args with a configuration file, training_data, a batch over all ranks."""
    import deepspeed

    import qsr_engine

    data = torch.utils.data.TensorDataset(torch.arange(24.0).view(24, 1))
    model = nn.Linear(1, 1)
    engine, optimizer, loader, scheduler = qsr_engine.initialize(
        Namespace(deepspeed_config=path), model, None, model.parameters(), training_data=data
    )
    seen = torch.cat([batch[0] for batch in loader]).flatten().tolist()
    return {
        "is_deepspeed": isinstance(engine, deepspeed.DeepSpeedEngine),
        "same_optimizer": optimizer is engine.optimizer,
        "scheduler": scheduler,
        "batch": engine.train_batch_size(),
        "clipping": engine.gradient_clipping(),
        "lr": optimizer.param_groups[0]["lr"],
        "seen": seen,
    }


def test_the_surface_is_deepspeeds(processes: Processes, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "lr": 1.0}}
    path.write_text(json.dumps({"train_batch_size": 8, "optimizer": optimizer, "qsr": QSR}))
    results = processes.run(surface_job, path=str(path))
    for result in results:
        assert result["is_deepspeed"]
        assert result["same_optimizer"]
        assert result["scheduler"] is None
        assert result["batch"] == 8
        assert result["clipping"] == 1.0, "DeepSpeed's own default"
        assert result["lr"] == QSR["lr"]["min"], "the first step of the warm-up"
    assert sorted(results[0]["seen"] + results[1]["seen"]) == list(range(24)), "every sample at one worker only"


def monitored_job(folder: str) -> None:
    place = {"enabled": True, "output_path": folder, "job_name": "run"}
    engine = start(QSR, tensorboard=place, csv_monitor={**place, "job_name": "csv"})
    while not engine.local_steps.finished:
        step(engine)


def test_deepspeeds_own_monitor_shows_the_local_steps(processes: Processes, tmp_path: Path) -> None:
    processes.run(monitored_job, folder=str(tmp_path))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    periods = events.Scalars("Train/LocalSteps/period")
    assert [event.step for event in periods] == [2 * training.BATCH * end for end in (2, 4, 6, 8, 12)]
    assert [event.value for event in events.Scalars("Train/LocalSteps/averagings")] == [1, 2, 3, 4, 5]
    assert all(event.value > 0 for event in events.Scalars("Train/LocalSteps/relative_distance"))
    written = {tag for tag in events.Tags()["scalars"] if "LocalSteps" in tag}
    assert len(written) >= 7
    for tag in written:
        scalars = events.Scalars(tag)
        rows = list(csv.reader((tmp_path / "csv" / f"{tag.replace('/', '_')}.csv").open()))[1:]
        assert [int(step) for step, _ in rows] == [event.step for event in scalars], tag
        assert [float(value) for _, value in rows] == pytest.approx([event.value for event in scalars]), tag


def two_engines_job(together: bool, config: dict[str, Any]) -> list[torch.Tensor]:
    """A local and a parallel engine and a plain DeepSpeed engine in one process, one after another or in turns."""
    import deepspeed

    plain_config = {"train_micro_batch_size_per_gpu": training.BATCH, "gradient_clipping": 1.0, **config}
    results = []
    engines = []
    for strategy in ({**QSR, "strategy": "parallel"}, QSR, None):
        if strategy is None:
            model = training.make_model(torch.float32)
            engine = deepspeed.initialize(
                model=model, optimizer=training.make_optimizer("sgd", model.parameters()), config=plain_config
            )[0]
            engine.optimizer.param_groups[0]["lr"] = 0.05
        else:
            engine = start(strategy, **config)
        engines.append(engine)
        if not together:
            for number in range(12):
                step(engine, number)
    if together:
        for number in range(12):
            for engine in engines:
                step(engine, number)
    for engine in engines:
        results.append(training.flat(engine.module.parameters()))
    return results


@pytest.mark.parametrize("config", [{}, STAGE_1], ids=["stage0-fp32", "stage1-bf16"])
def test_engines_in_one_process_do_not_disturb_one_another(processes: Processes, config: dict[str, Any]) -> None:
    """DeepSpeed keeps its groups in a global variable; a plain engine that found ours would not reduce at all."""
    apart = processes.run(two_engines_job, together=False, config=config)
    together = processes.run(two_engines_job, together=True, config=config)
    for one, other in zip([*apart, *together], [*together, *apart[::-1]], strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def adversaries(local: bool) -> list[Any]:
    """A generator and its discriminator, an engine each."""
    import deepspeed

    zero: dict[str, Any] = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    qsr = {**QSR, "lr": {"schedule": "constant", "peak": 0.05}, "strategy": "constant", "alpha": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        models = [training.make_model(torch.float32), nn.Linear(training.OUTPUTS, 1)]
    if local:
        return [start(qsr, model, **zero) for model in models]
    config = {"train_micro_batch_size_per_gpu": training.BATCH, "gradient_clipping": 1.0, **zero}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3) for model in models]
    pairs = zip(models, optimizers, strict=True)
    return [deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0] for model, optimizer in pairs]


def adversaries_job(kinds: list[bool]) -> list[dict[str, Any]]:
    """They train in turns; the generator's loss goes through the discriminator."""
    import torch.distributed as dist

    found = []
    for local in kinds:
        generator, discriminator = adversaries(local)
        crossed = []
        for number in range(4):
            before = collectives_across_workers(worker_size=1)
            inputs, real = training.batch(dist.get_rank(), number, dtype=torch.float32)
            judged = discriminator(torch.cat([real, generator(inputs).detach()]))
            truth = torch.arange(2.0).repeat_interleave(training.BATCH)[:, None]
            discriminator.backward((judged - truth).square().mean())
            discriminator.step()
            discriminator.module.requires_grad_(False)
            generator.backward(discriminator.module(generator(inputs)).square().mean())
            discriminator.module.requires_grad_(True)
            if not generator.step():
                crossed.append(collectives_across_workers(worker_size=1) - before)
        ends = [training.flat(engine.module.parameters()) for engine in (generator, discriminator)]
        found.append({"ends": ends, "crossed": crossed})
    return found


def test_two_engines_that_train_each_other(processes: Processes) -> None:
    """One worker alone gives DeepSpeed's own bits; two are silent between boundaries, and equal on them."""
    ((own, plain),) = processes.run(adversaries_job, ranks=1, kinds=[True, False])
    (first,), (second,) = processes.run(adversaries_job, kinds=[True])
    for one, other in ((own, plain), (first, second)):
        assert all(torch.equal(a, b) for a, b in zip(one["ends"], other["ends"], strict=True))
    assert first["crossed"] == second["crossed"] == [0, 0]


def offload_job() -> tuple[str, list[torch.Tensor]]:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    engines = [start(QSR, zero_optimization={"stage": 1}, zero_allow_untested_optimizer=True) for _ in range(2)]
    with pytest.raises(RuntimeError) as caught:
        engines[0].offload_states()
    for engine in engines:
        while not engine.local_steps.finished:
            if engine is engines[0]:
                engine.offload_states(include=[OffloadStateTypeEnum.optim_states], pin_memory=False)
                engine.reload_states()
            step(engine)
    return str(caught.value), [training.flat(engine.module.parameters()) for engine in engines]


def test_parameters_stay_where_boundaries_average_them(processes: Processes) -> None:
    """The optimizer's states may be moved out of the way and back."""
    for said, (moved, stayed) in processes.run(offload_job):
        assert "would move hp_params and lp_params" in said
        assert "write include=[OffloadStateTypeEnum.optim_states, " in said
        assert torch.equal(moved, stayed)


# ------------------------------------------------------------------------------------------- learning rates


def scheduler_job(odd_rank: bool) -> list[tuple[int, float]]:
    """The learning rate comes from DeepSpeed's own scheduler."""
    import torch.distributed as dist

    qsr = {key: value for key, value in QSR.items() if key != "lr"}
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.04, "warmup_num_steps": 4, "warmup_type": "linear"}}
    engine = start({**qsr, "warmup_steps": 4, "alpha": 0.12}, scheduler=scheduler)
    seen = []
    while not engine.local_steps.finished:
        if odd_rank and dist.get_rank() == 1 and engine.local_steps.step == 5:
            engine.optimizer.param_groups[0]["lr"] = 0.01
        seen.append((engine.local_steps.period, engine.get_lr()[0]))
        step(engine)
    return seen


def test_without_an_lr_block_the_period_follows_the_scheduler(processes: Processes) -> None:
    seen = processes.run(scheduler_job, odd_rank=False)[0]
    assert [period for period, _ in seen] == [2, 2, 2, 2, *[8] * 8][:12], "(0.12 / 0.04)^2 = 9, cut to what remains"
    assert seen[-1][1] == pytest.approx(0.04)


# --------------------------------------------------------------------------------------------- boundaries


def poisoned_job(steps_before: int) -> tuple[str, torch.Tensor]:
    """Rank 1 meets a NaN; what do the ranks say, and what are their parameters then?"""
    import torch.distributed as dist

    from qsr_engine.local_steps.header import BoundaryError

    engine = start(QSR)
    for _ in range(steps_before):
        step(engine)
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(engine.module.parameters())[0, 0] = float("nan")
    try:
        while True:
            step(engine)
    except BoundaryError as error:
        return str(error), training.flat(engine.module.parameters())


def test_a_nan_reaches_no_other_worker(processes: Processes) -> None:
    (said, healthy), (said_too, _) = processes.run(poisoned_job, steps_before=5)
    assert said == said_too
    assert "not finite (NaN or infinity) on rank 1" in said
    assert healthy.isfinite().all()


def past_the_end_job() -> str:
    engine = start(QSR)
    for _ in range(12):
        step(engine)
    before = training.flat(engine.module.parameters())
    try:
        step(engine, number=12)
    except RuntimeError as error:
        assert torch.equal(before, training.flat(engine.module.parameters()))
        return str(error)
    return "it went on"


def test_a_step_past_the_end_is_refused_and_changes_nothing(processes: Processes) -> None:
    assert "the run ended at step 12, which is qsr.total_steps" in processes.run(past_the_end_job)[0]


# --------------------------------------------------------------------------------------- data, buffers, groups


def data_job() -> list[list[int]]:
    """The samples that each rank gets from the engine's own loader, for training and for evaluation."""
    engine = start(QSR)
    data = torch.arange(32)
    loaders = [engine.deepspeed_io(data, batch_size=4), engine.deepspeed_io(data, batch_size=4, route="eval")]
    return [[int(sample) for batch in loader for sample in batch] for loader in loaders]


def test_the_engines_loader_divides_the_data_among_all_ranks(processes: Processes) -> None:
    """DeepSpeed's would give every worker the same samples."""
    first, second = processes.run(data_job)
    for one, other in zip(first, second, strict=True):
        assert sorted(one + other) == list(range(32))
    assert first[0] != sorted(first[0]), "training data are shuffled"


def iterable_job() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    start(QSR).deepspeed_io(Stream())


def test_data_without_a_length_are_refused(processes: Processes) -> None:
    with pytest.raises(JobError, match="a Stream has no length"):
        processes.run(iterable_job)
