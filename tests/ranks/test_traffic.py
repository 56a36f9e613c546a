"""What the engines say that leaves a worker, against the formulas, and against what they really send: every collective
is counted, with its payload and its group."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from qsr_engine.averaging.buckets import pieces_in_place, small_first
from qsr_engine.local_steps import traffic
from qsr_engine.local_steps.traffic import (
    Elements,
    averaging_bytes,
    bytes_percent,
    deepspeed_parallel_bytes,
    fsdp_parallel_bytes,
    split,
)
from qsr_engine.planning.layout import averaged_tensors
from tests.support import training
from tests.support.counting import bytes_leaving
from tests.support.pool import Processes

COUNT = 4096  # elements of the model, which blocks, ranks and cache lines divide
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
TWICE: dict[str, Any] = {"gradient_accumulation_steps": 2}
ONCE = {"stage3_param_persistence_threshold": 0}
AGAIN = {**ONCE, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}  # what is prefetched is kept, too


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run, and what its formulas are asked for.

    Args:
        stage: of ZeRO; None is the FSDP engine.
        computes: the type that the model computes in.
        options: of the formula of DeepSpeed's `parallel`.
    """

    stage: int | None
    computes: str = "fp32"
    worker_size: int = 2
    averaging: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def one_averaging(self) -> int:
        wire, states = self.averaging.get("wire_dtype", "fp32"), len(self.averaging.get("state", ()))
        masters, sharded = {"fp32": COUNT}, self.stage != 0
        return averaging_bytes(masters, 2, self.worker_size, sharded=sharded, wire=wire, states=states)

    def gradients(self) -> int:
        """Averaged before the switch of post_local."""
        masters = {"fp32" if self.stage is None else self.computes: COUNT}
        return averaging_bytes(masters, 2, self.worker_size, sharded=self.stage != 0)

    def parallel(self) -> int:
        if self.stage is None:
            return fsdp_parallel_bytes({"fp32": COUNT}, 2)
        own: Elements = {self.computes: COUNT}
        parts = {"gathered": own, **self.options}
        return deepspeed_parallel_bytes(own, 2, self.worker_size, zero_stage=self.stage, **parts)


SETTINGS = {
    "zero0": Setting(0),
    "zero1-bf16": Setting(1, "bf16", averaging={"state": ["exp_avg"]}, config=BF16),
    "zero3-bf16-once": Setting(
        3, "bf16", averaging={"wire_dtype": "bf16"}, config=BF16 | TWICE, zero=ONCE, options={"accumulation": 2}
    ),
    "fsdp-int8": Setting(None, averaging={"wire_dtype": "int8"}, config=TWICE),
}
MORE = {
    "zero2-int8": Setting(2, averaging={"wire_dtype": "int8"}, config=TWICE, options={"accumulation": 2}),
    "zero3-kept": Setting(3, options={"gathered": {}, "kept": {"fp32": COUNT}}),
    "zero3-again": Setting(3, zero=AGAIN, options={"reuse_distance": 0}),
    "fsdp-bf16": Setting(None, "bf16", averaging={"state": ["exp_avg"]}, config=BF16),
}
ALONE = {
    "zero0-bf16-int8": Setting(0, "bf16", 1, averaging={"wire_dtype": "int8"}, config=BF16),
    "zero1": Setting(1, worker_size=1),
    "fsdp": Setting(None, worker_size=1, averaging={"wire_dtype": "bf16"}),
}


def start(setting: Setting, strategy: dict[str, Any]) -> Any:
    import qsr_engine

    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Tanh(), nn.Linear(32, 64, bias=False))
    local = strategy["strategy"] != "parallel"
    qsr = {
        "lr": {"schedule": "constant", "peak": 0.01},
        "worker_size": setting.worker_size,
        **({"averaging": {"shared_memory": False, **setting.averaging}} if local else {}),
        **strategy,
    }
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0, **setting.config, "qsr": qsr}
    optimizer = partial(training.make_optimizer, "adamw")
    if setting.stage is None:
        return qsr_engine.initialize_fsdp(model=model, optimizer=optimizer, config=config)
    config |= {"zero_optimization": {"stage": setting.stage, **setting.zero}, "zero_allow_untested_optimizer": True}
    return qsr_engine.initialize(model=model, optimizer=optimizer, config=config)[0]


def steps(setting: Setting, strategy: dict[str, Any], sent: Counter[str]) -> dict[str, Any]:
    """What was counted in each step, and what the engine said."""
    counted, said = [], []
    engine = start(setting, strategy)
    dtype = torch.bfloat16 if setting.computes == "bf16" and setting.stage is not None else torch.float32
    while not engine.local_steps.finished:
        sent.clear()
        before = engine.local_steps.bytes_sent
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(torch.ones(4, 64, dtype=dtype)).float().square().mean())
            engine.step()
        counted.append(sum(sent.values()))
        said.append(engine.local_steps.bytes_sent - before)
    return {"counted": counted, "said": said, "percent": engine.local_steps.bytes_percent}


def traffic_job(settings: dict[str, Setting], worker_size: int) -> dict[str, list[dict[str, Any]]]:
    switched = {"strategy": "post_local", "switch_step": 1, "h_base": 1, "total_steps": 2}
    parallel = {"strategy": "parallel", "total_steps": 2}
    with bytes_leaving(worker_size) as sent:
        return {name: [steps(s, strategy, sent) for strategy in (switched, parallel)] for name, s in settings.items()}


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(4, SETTINGS), pytest.param(4, MORE, marks=pytest.mark.slow), (2, ALONE)],
    ids=["2 x 2", "2 x 2 more", "2 x 1"],
)
def test_what_leaves_a_worker(processes: Processes, ranks: int, settings: dict[str, Setting]) -> None:
    size = ranks // 2
    results = processes.run(traffic_job, ranks=ranks, settings=settings, worker_size=size)
    for name, setting in settings.items():
        local, parallel = ([result[name][run] for result in results] for run in (0, 1))
        expected = [setting.gradients(), setting.one_averaging()]
        for one in local:
            assert (name, one["said"]) == (name, expected)
            assert one["percent"] == pytest.approx(bytes_percent(sum(expected), 2 * setting.parallel()))
        for one in parallel:
            assert (name, one["said"]) == (name, [setting.parallel()] * 2)
            assert one["percent"] == 100
        for runs, known in ((local, expected), (parallel, [setting.parallel()] * 2)):
            for worker in (runs[:size], runs[size:]):
                counted = [sum(step) for step in zip(*(rank["counted"] for rank in worker), strict=True)]
                assert (name, counted[-1]) == (name, known[-1]), "stage 3 knows its modules from the second step on"
                assert (name, counted[:-1]) == (name, known[:-1]) or setting.stage == 3


ODD = ((33, 7), (33,), (300, 33), (5, 300), (5,))  # which neither blocks nor ranks divide
PIECE_MB = 0.012  # 3,000 elements


def odd_job(worker_size: int) -> dict[str, int]:
    """What the engines say of an averaging in int8 on a model of odd shapes, by ZeRO stage."""
    import torch.distributed as dist

    import qsr_engine

    averaging = {"shared_memory": False, "wire_dtype": "int8", "bucket_mb": PIECE_MB}
    qsr = {"strategy": "constant", "h_base": 1, "total_steps": 1, "lr": {"schedule": "constant", "peak": 0.1}}
    found = {}
    for stage in (None, 0, 1, 3):  # FSDP with a worker of one rank is laid out as 0, and 2 as 1
        model = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in ODD])
        model.append(nn.Parameter(torch.ones(40, 300), requires_grad=False))  # as under adapters: it stays at home
        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0}
        config |= {"qsr": {**qsr, "worker_size": worker_size, "averaging": averaging}}
        optimizer = partial(training.make_optimizer, "sgd")
        if stage is None:
            engine = qsr_engine.initialize_fsdp(model=model, optimizer=optimizer, config=config)
        else:
            config |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            given: dict[str, Any] = {"optimizer": optimizer, "model_parameters": trained, "config": config}
            engine = qsr_engine.initialize(model=model, **given)[0]
        found[str(stage)] = engine.local_steps.traffic.averaging
        engine.destroy()
        dist.barrier()
    return found


def test_a_plan_rounds_up_to_blocks_as_the_engines_do(processes: Processes) -> None:
    worker_size = 2
    elements: Elements = {"fp32": sum(torch.Size(shape).numel() for shape in ODD)}
    piece = int(PIECE_MB * 1e6)
    told = processes.run(odd_job, ranks=2 * worker_size, worker_size=worker_size)
    for name, found in told[0].items():
        stage = None if name == "None" else int(name)
        tensors = averaged_tensors([ODD], stage, worker_size, piece)
        sizes = {"sharded": stage != 0, "tensors": tensors, "piece": piece}
        assert (name, averaging_bytes(elements, 2, worker_size, wire="int8", **sizes)) == (name, found)  # type: ignore[arg-type]
        less = averaging_bytes(elements, 2, worker_size, wire="int8", sharded=stage != 0) < found
        assert less == (stage in (None, 0)), "the others average one flat tensor"
    assert all(one == told[0] for one in told)


@pytest.mark.parametrize("elements", [0, 1, 2999, 3000, 3001, 9000, 10_007])
def test_pieces_of_a_tensor(elements: int) -> None:
    pieces = pieces_in_place([torch.empty(elements)], 12_000)
    assert split(elements, 12_000) == [piece.numel for piece in pieces]


@pytest.mark.parametrize("piece", [1_000_000, 4_000_000, 16_000_000])
def test_the_first_pieces_as_the_plan_counts_them(piece: int) -> None:
    elements = [500_000, 499_999, 3, 0, 1_234_567, 9_000_001]
    cut = small_first([torch.empty(size) for size in elements], piece)
    assert traffic.small_first(elements, piece) == [part.numel() for part in cut]
