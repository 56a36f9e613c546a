"""Fragments and mixing, in both engines, against the reference; and against what torchft does."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging import Averager
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import validate
from qsr_engine.local_steps.header import BoundaryError
from qsr_engine.local_steps.steps import LocalSteps
from tests.support import reference, training
from tests.support.fsdp_engine import config_of
from tests.support.pool import Processes

LR = training.QSR["lr"]
# Rounds of 4, 4 and 2 steps. Of three fragments, they end after steps 1, 2 and 4 of a round of 4, and the last round
# is shorter than there are fragments: 1, 1 and 2, at which the run ends with all of them.
QSR: dict[str, Any] = {"strategy": "constant", "h_base": 4, "total_steps": 10, "lr": LR}
THREE: dict[int, set[int]] = {1: {0}, 2: {1}, 4: {2}, 5: {0}, 6: {1}, 8: {2}, 9: {0, 1}, 10: {0, 1, 2}}
DILOCO = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


def thin() -> nn.Module:
    """Three layers, the last of one row: FSDP gives the second rank of a worker nothing of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(training.FEATURES, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 1))


LAYERS = torch.tensor([0] * 117 + [1] * 18 + [2] * 10)  # the fragment of each element, where there are three


def batch(rank: int, step: int) -> reference.Batch:
    inputs, targets = training.batch(rank, step, dtype=torch.float32)
    return inputs, targets[:, :1]


def start(kind: str, block: dict[str, Any], optimizer: str = "adamw") -> Any:
    import qsr_engine

    arguments: dict[str, Any] = {"model": thin(), "optimizer": partial(training.make_optimizer, optimizer)}
    if kind == "fsdp":
        return qsr_engine.initialize_fsdp(**arguments, config=config_of(block))
    zero: dict[str, Any] = {"zero_optimization": {"stage": int(kind[4])}, "zero_allow_untested_optimizer": True}
    bf16 = {"bf16": {"enabled": True}} if kind.endswith("bf16") else {}
    return qsr_engine.initialize(**arguments, config=config_of(block, **zero, **bf16))[0]


def take_step(engine: Any) -> bool:
    inputs, targets = batch(dist.get_rank(), engine.local_steps.step)
    engine.backward(training.loss(engine(inputs.to(engine_dtype(engine))).float(), targets))
    return bool(engine.step())


def engine_dtype(engine: Any) -> torch.dtype:
    dtype: torch.dtype = next(engine.module.parameters()).dtype
    return dtype


def masters(engine: Any) -> Tensor:
    """Whole, of this rank's worker, in the order of the model."""
    engine.local_steps.finish()
    replica = engine._driver.replica
    return training.flat([replica.whole(p).detach().float() for p in engine.module.parameters()]).clone()


def fragment_of(engine: Any) -> Tensor:
    """The fragment of every element, as this engine cuts its masters; nothing is left out."""
    averager, replica = engine.local_steps.averager, engine._driver.replica
    held = [bucket.clone() for bucket in averager.buckets]
    for bucket in averager.buckets:
        bucket.fill_(-1)
    for number, parts in enumerate(averager._fragments):
        for part in parts:
            part.fill_(number)
    replica.refresh()
    found = masters(engine).to(torch.int64)
    for bucket, value in zip(averager.buckets, held, strict=True):
        bucket.copy_(value)
    replica.refresh()
    return found


def whole_job(rows: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Each row is trained to its end: how it is cut, what the worker holds after each step, and where it averaged."""
    results = {}
    for name, (kind, block) in rows.items():
        engine = start(kind, block)
        numbers, held, distances, sent = fragment_of(engine), {}, {}, {}
        while not engine.local_steps.finished:
            take_step(engine)
            state = engine.local_steps
            held[state.step] = masters(engine)
            distances[state.step], sent[state.step] = state.relative_distance, state.bytes_sent
        results[name] = {
            "numbers": numbers,
            "held": held,
            "distances": distances,
            "sent": sent,
            "averagings": engine.local_steps.averagings,
            "traffic": engine.local_steps.traffic,
            "empty": [p for p, parts in enumerate(engine.local_steps.averager._fragments) if not parts],
        }
    return results


def oracle(block: dict[str, Any], numbers: Tensor) -> tuple[Tensor, list[float]]:
    options = block.get("averaging", {})
    models, distances = reference.simulate(
        thin,
        partial(training.make_optimizer, "adamw"),
        lambda rank, step: [batch(rank, step)],
        block,
        workers=2,
        worker_size=block.get("worker_size", 1),
        outer=block.get("outer"),
        delay=options.get("delay_steps", 0),
        fragment_of=numbers,
        mixing=options.get("mixing", 0.0),
    )
    return training.flat(models[0].parameters()), distances


def three(**more: Any) -> dict[str, Any]:
    return {"averaging": {"fragments": 3, **more}}


SWITCHING: dict[str, Any] = {**QSR, "h_base": 3, "switch_step": 4}
Rows = dict[str, tuple[str, dict[str, Any]]]
ROWS: Rows = {
    "outer and mixing": ("zero0", {**QSR, **three(mixing=0.25), "outer": DILOCO}),
    "delayed, mixing": ("zero0", {**QSR, **three(overlap="delayed", delay_steps=1, mixing=0.25)}),
    "fsdp, swap": ("fsdp", {**SWITCHING, "strategy": "swap", **three()}),
}
OF_TWO: Rows = {
    "fsdp, empty parts": ("fsdp", {**QSR, **three(shared_memory=False), "worker_size": 2, "outer": DILOCO}),
    "zero3, mixing": ("zero3", {**QSR, **three(mixing=0.25), "worker_size": 2}),
}
MORE: Rows = {
    "plain": ("zero0", {**QSR, **three()}),
    "next_forward, mixing": ("zero0", {**QSR, **three(overlap="next_forward", mixing=0.25)}),
    "qsr, mixing alone": ("zero0", {**training.QSR, "averaging": {"mixing": 0.5}}),
    "zero2, by place, gloo": ("zero2", {**QSR, **three(shared_memory=False, bucket_mb=1e-4)}),
    "fsdp, post_local, outer": ("fsdp", {**SWITCHING, "strategy": "post_local", **three(), "outer": DILOCO}),
}
MORE_OF_TWO: Rows = {
    "zero1": ("zero1", {**QSR, **three(), "worker_size": 2}),
    "zero2, outer": ("zero2", {**QSR, **three(mixing=0.25), "worker_size": 2, "outer": DILOCO}),
    "fsdp, delayed": ("fsdp", {**QSR, **three(overlap="delayed", delay_steps=2), "worker_size": 2}),
}


@pytest.mark.parametrize(
    ("rows", "worker_size"),
    [
        pytest.param(ROWS, 1, id="workers of one rank"),
        pytest.param(OF_TWO, 2, id="workers of two"),
        pytest.param(MORE, 1, id="more of one", marks=pytest.mark.slow),
        pytest.param(MORE_OF_TWO, 2, id="more of two", marks=pytest.mark.slow),
    ],
)
def test_they_equal_the_reference(processes: Processes, rows: Rows, worker_size: int) -> None:
    results = processes.run(whole_job, ranks=2 * worker_size, rows=rows)
    for name, (kind, block) in rows.items():
        first, second = results[0][name], results[worker_size][name]
        numbers, options = first["numbers"], block["averaging"]
        assert int(numbers.min()) == 0, name
        if kind in ("zero0", "fsdp") and "fragments" in options:
            assert torch.equal(numbers, LAYERS), name
        one_row = kind == "fsdp" and worker_size == 2  # whose second rank has nothing of the last layer
        assert [r[name]["empty"] for r in results] == ([[], [2]] * 2 if one_row else [[]] * len(results)), name
        total = block["total_steps"]
        end, distances = oracle(block, numbers)
        # AdamW in fp32, gradients of several ranks: as the tests of the engines without fragments.
        torch.testing.assert_close(first["held"][total], end, rtol=0, atol=1e-5, msg=name)
        for result in results:
            assert torch.equal(result[name]["held"][total], first["held"][total]), name
        if options.get("overlap") != "delayed":
            seen = list(dict.fromkeys(d for d in first["distances"].values() if d is not None))
            assert seen == pytest.approx(distances, rel=5e-3), name  # of 3e-3 and more, in which fp32 rounds 1e-5
        if block["strategy"] == "constant" and options.get("overlap") != "delayed":
            assert_same_where_due(first, second, mixing="mixing" in options)
            assert first["averagings"] == 3, "rounds: in each, everything is averaged once"
            each = first["traffic"].fragments
            by_now = [sum(each[p] for at, due in THREE.items() if at <= step for p in due) for step in range(1, 11)]
            assert list(first["sent"].values()) == by_now, name


def assert_same_where_due(first: dict[str, Any], second: dict[str, Any], *, mixing: bool) -> None:
    """After its boundary a fragment is the same on all workers, bit for bit, and the others are not."""
    for step, held in first["held"].items():
        for fragment in range(3):
            here = first["numbers"] == fragment
            same = torch.equal(held[here], second["held"][step][here])
            assert same == (fragment in THREE.get(step, ()) and (not mixing or step == 10)), (step, fragment)


def resumed_job(folder: str, rows: dict[str, tuple[str, dict[str, Any]]], saved_at: list[int]) -> list[str]:
    """What did not go on to the same bits, or was not the average where the model was one."""
    wrong = []
    for name, (kind, block) in rows.items():
        alone, engine = start(kind, block), start(kind, block)
        traces = {}
        while not alone.local_steps.finished:
            take_step(alone)
            traces[alone.local_steps.step] = masters(alone)
        while not engine.local_steps.finished:
            step = engine.local_steps.step
            if step in saved_at:
                own = masters(engine)
                with engine.averaged():
                    mean = masters(engine)
                everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
                dist.all_gather(everyone, own)
                if not torch.allclose(mean, torch.stack(everyone).mean(0), rtol=1e-6, atol=1e-7):
                    wrong.append(f"{name}: the average at {step}")
                engine.save_checkpoint(folder, tag=f"{name}-{step}")
            take_step(engine)
            if not torch.equal(masters(engine), traces[engine.local_steps.step]):
                wrong.append(f"{name}: step {step}")
        for step in saved_at:
            other = start(kind, block)
            other.load_checkpoint(folder, tag=f"{name}-{step}")
            while not other.local_steps.finished:
                take_step(other)
                if not torch.equal(masters(other), traces[other.local_steps.step]):
                    wrong.append(f"{name}: from {step}, step {other.local_steps.step}")
    return wrong


RESUMED: dict[str, tuple[str, dict[str, Any], list[int]]] = {  # and where it was saved
    "fast": ("zero2", {**QSR, **three(mixing=0.25), "outer": DILOCO}, [3]),
    "delayed": ("fsdp", {**QSR, **three(mixing=0.25, overlap="delayed", delay_steps=3), "worker_size": 2}, [1, 3, 4]),
    "outer": ("zero3", {**QSR, **three(mixing=0.25), "outer": DILOCO, "worker_size": 2}, [1, 3, 4, 9]),
    "int8": ("zero0-bf16", {**QSR, **three(mixing=0.25, wire_dtype="int8")}, [1, 3, 4, 9]),
}


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("name", RESUMED)
def test_an_engine_goes_on_from_any_step(processes: Processes, tmp_path: Path, name: str) -> None:
    """Between two fragments of a round, on its end, and in the last round."""
    kind, block, saved_at = RESUMED[name]
    ranks, rows = 2 * block.get("worker_size", 1), {name: (kind, block)}
    results = processes.run(resumed_job, ranks=ranks, folder=str(tmp_path), rows=rows, saved_at=saved_at)
    assert results == [[]] * ranks


# --------------------------------------------------------------------------------------------- without an engine


def bare(block: dict[str, Any], bucket: Tensor, digest: int = 1) -> LocalSteps:
    """Local steps on one bucket, of which each element is a fragment."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    qsr = validate(QSRConfig, block, where="test")
    parts = [[bucket[p : p + 1]] for p in range(qsr.averaging.fragments)]
    return LocalSteps(qsr, Averager([bucket], None, qsr.averaging, outer=qsr.outer, fragments=parts), digest)


OPTIONS: dict[str, dict[str, Any]] = {
    "outer, mixing": {"outer": DILOCO, **three(mixing=0.25)},
    "delayed": three(mixing=0.25, overlap="delayed", delay_steps=3),
    "int8": {"outer": DILOCO, **three(mixing=0.25, wire_dtype="int8", shared_memory=False)},
}


def on(state: LocalSteps, bucket: Tensor, saved: list[Any]) -> list[Tensor]:
    """To the end: what the bucket holds after each step. What a checkpoint has before each step is added to `saved`."""
    held = []
    while not state.finished:
        saved.append(copy.deepcopy((bucket, state.state_dict(), state.averager_state())))
        state.begin_forward()
        state.begin_update()
        bucket += 0.1 * torch.randn(3, generator=torch.Generator().manual_seed(10 * state.step + dist.get_rank()))
        state.advance()
        held.append(bucket.clone())
    return held


def any_step_job() -> list[str]:
    """Where a run that goes on from a step does not hold the same bits."""
    wrong = []
    for name, options in OPTIONS.items():
        block, bucket, saved = {**QSR, **options}, torch.ones(3), list[Any]()
        alone = on(bare(block, bucket), bucket, saved)
        for step, (value, position, carried) in enumerate(saved):
            bucket = torch.ones(3)
            state = bare(block, bucket)
            bucket.copy_(value)
            state.load_state_dict(position)
            state.averager.restart()
            state.averager.load_state_dict(carried, inside_round=not state.boundary.same_everywhere)
            if not all(map(torch.equal, on(state, bucket, []), alone[step:])):
                wrong.append(f"{name}: from {step}")
    return wrong


def test_it_goes_on_from_any_step(processes: Processes) -> None:
    assert processes.run(any_step_job) == [[], []]


def torchft_job() -> dict[float, list[list[float]]]:
    found: dict[float, list[list[float]]] = {}
    for mixing in (0.0, 0.5, 1.0):
        bucket = torch.ones(2)
        options = {"fragments": 2, "mixing": mixing, "shared_memory": False}
        block = {"strategy": "constant", "h_base": 6, "total_steps": 18, "lr": {"schedule": "constant", "peak": 1.0}}
        state = bare({**block, "outer": {"lr": 2.0}, "averaging": options}, bucket)
        found[mixing] = []
        for _ in range(15):
            bucket -= 2.0  # rate 1, gradient 2
            state.advance()
            found[mixing].append(bucket.tolist())
    return found


# What torchft's two fragments hold after each of 15 steps of H 6 with an outer rate of 2, for each mixing: its golden
# histories of October 2025 (pytorch/torchft, test_fixtures/, diloco_mocked_updates 0 to 2).
TORCHFT: dict[float, tuple[list[float], list[float]]] = {
    0.0: (
        [-1, -3, -11, -13, -15, -17, -19, -21, -35, -37, -39, -41, -43, -45, -59],
        [-1, -3, -5, -7, -9, -23, -25, -27, -29, -31, -33, -47, -49, -51, -53],
    ),
    0.5: (
        [-1, -3, -8, -10, -12, -14, -16, -18, -24.5, -26.5, -28.5, -30.5, -32.5, -34.5, -40.25],
        [-1, -3, -5, -7, -9, -17, -19, -21, -23, -25, -27, -32, -34, -36, -38],
    ),
    1.0: ([*range(-1, -30, -2)], [*range(-1, -30, -2)]),
}


def test_it_is_what_torchft_does(processes: Processes) -> None:
    for found in processes.run(torchft_job):
        for mixing, (first, second) in TORCHFT.items():
            assert found[mixing] == [[a, b] for a, b in zip(first, second, strict=True)], mixing


def faults_job() -> dict[str, Any]:
    """A worker that is left out at a fragment's boundary; one that disagrees there; rounds that are ended by hand."""
    results: dict[str, Any] = {}
    options = {"fragments": 2, "mixing": 0.5}
    block = {**QSR, "total_steps": 9, "averaging": options}
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for bad in (0, 1):  # the fragment that is due after step 2, and the other one
        bucket = torch.tensor([10.0, 20.0]) + rank
        state = bare({**block, "faults": {"not_finite": "leave_out"}}, bucket)
        state.advance()
        if rank == 1:
            bucket[bad] = float("nan")
        state.advance()
        results[f"left out, {bad}"] = (bucket.tolist(), dict(state.costs.left_out))
    bucket = torch.tensor([10.0, 20.0]) + rank
    state = bare(block, bucket, digest=1 + rank)
    state.advance()
    try:
        state.advance()
    except BoundaryError as error:
        results["disagrees"] = (state.step, str(error), bucket.tolist())
    bucket = torch.tensor([10.0, 20.0]) + rank
    state, ended = bare({**block, "total_steps": 12}, bucket), []
    while state.step < 5:
        state.advance()
        if state.step in (3, 5):
            bucket += rank
            ended.append((state.step, state.end_round(), bucket.tolist(), state.boundary.same_everywhere))
    state.advance()
    while not state.on_boundary:
        bucket += rank
        state.advance()
    before = state.boundary.same_everywhere
    results["by hand"] = [*ended, (before, state.end_round(), bucket.tolist(), state.boundary.same_everywhere)]
    results["again"] = state.end_round()
    state, stops = bare({**block, "faults": {"on_signal": "finish_round"}}, bucket), []
    if rank == 0:
        state.request_stop()
    for _ in range(4):
        state.advance()
        stops.append(state.stopping)
    state.end_round()
    results["stops"] = [*stops, state.stopping]
    return results


def test_faults_and_ends_of_rounds(processes: Processes) -> None:
    results = processes.run(faults_job, ranks=3)
    # Rank 1 is left out: the mean of 10 and 12, and of 20 and 22, whole for rank 1 and half of it for the others.
    for bad in (0, 1):
        assert [r[f"left out, {bad}"] for r in results] == [
            ([10.5, 20.5], {1: 1}),
            ([11.0, 21.0], {1: 1}),
            ([11.5, 21.5], {1: 1}),
        ]
    for rank, result in enumerate(results):
        step, text, bucket = result["disagrees"]
        assert step == 2, "at the first fragment's own boundary"
        assert "digest of the configuration" in text
        assert bucket == [10.0 + rank, 20.0 + rank], "nothing was averaged"
        # By hand everything is averaged, and nothing mixed: 10, 11, 12 and then 1 more each time for each rank.
        assert result["by hand"] == [
            (3, True, [12.0, 22.0], True),
            (5, True, [13.0, 23.0], True),
            (False, False, results[0]["by hand"][2][2], True),
        ]
        assert result["again"] is False
        assert result["stops"] == [False, False, False, True, True], "at the end of the round, not at a fragment's"


def refused_job(folder: str) -> list[str]:
    from qsr_engine.checkpoint import CheckpointError

    said = []
    for kind in ("zero0", "zero2", "fsdp"):
        try:
            start(kind, {**QSR, "averaging": {"fragments": 7}})
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    engine = start("fsdp", {**QSR, **three(overlap="delayed", delay_steps=3)})
    take_step(engine)
    engine.save_checkpoint(folder, tag="under way")
    other = start("fsdp", {**QSR, "averaging": {"fragments": 2, "overlap": "delayed", "delay_steps": 3}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            other.load_checkpoint(folder, tag="under way")
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_is_refused(processes: Processes, tmp_path: Path) -> None:
    for *more, other in processes.run(refused_job, folder=str(tmp_path)):
        for text in more:
            assert text.startswith("ConfigError: qsr.averaging.fragments is 7, and 6 parameters are trained"), text
            assert text.endswith("write 6 or fewer")
        assert "under way of a run with averaging.fragments 3, and this run has 2; write 3" in other
        assert len(more) == 3
