"""A golden trace: what tiny runs of both engines hold after every round, bit for bit, in golden.json.

Code that is arranged anew must give the same bits. Every setting trains a small network in real processes, and each
rank tells where it stands and the SHA-256 of its parameters and buffers, of its masters and of its optimizer's state.
Only what a user may call is called, and DeepSpeed's own attributes. To compare, or to write the file anew after a
change that is meant to change the numbers:

    python -m tests.support.golden
    python -m tests.support.golden --write
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import training
from tests.support.combinations import pretend_fp16
from tests.support.pool import Processes

Pool = Processes
FILE = Path(__file__).with_name("golden.json")
Trace = dict[str, list[dict[str, Any]]]  # what each rank recorded, under its name

# ------------------------------------------------------------------------------------------------ the settings

LR = {"schedule": "cosine", "peak": 0.05, "min": 1e-3, "warmup_steps": 2}
STRATEGIES: dict[str, dict[str, Any]] = {
    "qsr": {"h_base": 2, "alpha": 0.09, "total_steps": 9},  # rounds of 2, 3 and 4 steps
    "post_local": {"h_base": 3, "switch_step": 2, "total_steps": 7},  # of 1, 1, 3 and 2
    "swap": {"h_base": 2, "switch_step": 3, "total_steps": 7},  # of 2, 1 and 4
    "parallel": {"total_steps": 3},  # of 1, 1 and 1
}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
FP16: dict[str, Any] = {"fp16": {"enabled": True, "loss_scale": 64.0}}
FP16_DYNAMIC: dict[str, Any] = {"fp16": {"enabled": True, "initial_scale_power": 8}}
FP32_ACCUMULATION: dict[str, Any] = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
TWICE: dict[str, Any] = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
OUTER = {"outer": {"lr": 0.9, "momentum": 0.6}}
NESTEROV = {"outer": {"lr": 0.8, "momentum": 0.5, "nesterov": True}}
LEAVE_OUT = {"faults": {"not_finite": "leave_out"}}
BAD_STEP, BAD_RANK = 3, 1  # where a setting with bad=True makes gradients NaN: inside the second round


def averaging(**options: Any) -> dict[str, Any]:
    return {"averaging": options}


@dataclasses.dataclass(frozen=True)
class Setting:
    stage: int | None  # of ZeRO; None is the FSDP engine
    optimizer: str
    strategy: str = "qsr"
    ranks: int = 2
    worker_size: int = 1
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    qsr: dict[str, Any] = dataclasses.field(default_factory=dict)
    norm: bool = False  # a model with batch norm
    bad: bool = False  # one rank's gradients are NaN in one step
    goes_on_with: int = 0  # ranks that load a checkpoint of the first boundary and train on

    @property
    def settles_later(self) -> bool:
        """Whether an averaging is still writing parameters on a boundary, and for one step more."""
        return bool(self.qsr.get("averaging", {}).get("overlap") == "next_forward")


SHARDS: dict[str, Any] = {"ranks": 4, "worker_size": 2}
SETTINGS: dict[str, Setting] = {
    "zero0-fp32-sgd": Setting(0, "sgd"),
    "zero0-fp32-adamw-parallel": Setting(0, "adamw", "parallel"),
    "zero0-fp32-adamw-norm-swap-exp_avg": Setting(0, "adamw", "swap", norm=True, qsr=averaging(state=["exp_avg"])),
    "zero0-fp32-sgd-norm-leave_out": Setting(0, "sgd", ranks=3, norm=True, bad=True, qsr=LEAVE_OUT),
    "zero0-bf16-adamw-int8": Setting(0, "adamw", config=BF16, qsr=averaging(wire_dtype="int8")),
    "zero0-bf16-sgd-next_forward": Setting(0, "sgd", config=BF16, qsr=averaging(overlap="next_forward")),
    "zero1-bf16-adamw-shards": Setting(1, "adamw", config=BF16, **SHARDS),
    "zero1-fp16-sgd-next_forward": Setting(1, "sgd", config=FP16, qsr=averaging(overlap="next_forward")),
    "zero1-fp32_accumulation-adamw-post_local": Setting(1, "adamw", "post_local", config=FP32_ACCUMULATION),
    "zero2-bf16-sgd-shards-bf16_wire-accumulation": Setting(
        2, "sgd", config={**BF16, **TWICE}, qsr=averaging(wire_dtype="bf16", shared_memory=False), **SHARDS
    ),
    "zero2-fp16-adamw-overflow": Setting(2, "adamw", config=FP16_DYNAMIC, bad=True),
    "zero2-fp32-adamw-delayed": Setting(2, "adamw", qsr=averaging(overlap="delayed", delay_steps=2)),
    "zero3-fp32-adamw-shards": Setting(3, "adamw", **SHARDS),
    "zero3-bf16-sgd-outer": Setting(3, "sgd", config=BF16, qsr=OUTER),
    "zero3-fp16-adamw-parallel-shards": Setting(3, "adamw", "parallel", config=FP16, **SHARDS),
    "fsdp-fp32-sgd": Setting(None, "sgd"),
    "fsdp-fp32-adamw-norm-post_local-exp_avg": Setting(
        None, "adamw", "post_local", norm=True, qsr=averaging(state=["exp_avg"])
    ),
    "fsdp-fp32-adamw-parallel": Setting(None, "adamw", "parallel", config=TWICE),
    "fsdp-fp32-adamw-shards-nesterov": Setting(None, "adamw", qsr=NESTEROV, **SHARDS),
    "fsdp-bf16-sgd-delayed": Setting(None, "sgd", config=BF16, qsr=averaging(overlap="delayed", delay_steps=1)),
    "fsdp-fp32-adamw-next_forward": Setting(None, "adamw", qsr=averaging(overlap="next_forward")),
    "fsdp-bf16-sgd-swap-int8": Setting(None, "sgd", "swap", config=BF16, qsr=averaging(wire_dtype="int8")),
    "fsdp-bf16-sgd-shards-no_shared_memory-accumulation": Setting(
        None, "sgd", config={**BF16, **TWICE}, qsr=averaging(shared_memory=False), **SHARDS
    ),
    "fsdp-bf16-adamw-leave_out": Setting(None, "adamw", ranks=3, config=BF16, bad=True, qsr=LEAVE_OUT),
    "zero2-bf16-adamw-resumed": Setting(2, "adamw", config=BF16, goes_on_with=2),
    "zero0-fp32-sgd-outer-other_workers": Setting(0, "sgd", qsr=OUTER, goes_on_with=3),
    "fsdp-fp32-sgd-norm-int8-resumed": Setting(
        None, "sgd", norm=True, qsr=averaging(wire_dtype="int8"), goes_on_with=2
    ),
    "fsdp-fp32-adamw-norm-other_workers": Setting(None, "adamw", norm=True, goes_on_with=3),
}

# ------------------------------------------------------------------------------------------ a run, on every rank


def make_model(norm: bool) -> nn.Module:
    """training.make_model() in fp32, or one with batch norm in the layer norm's place."""
    model = training.make_model(torch.float32)
    if norm:
        assert isinstance(model, nn.Sequential)
        model[2] = nn.BatchNorm1d(17)
    return model


def start(setting: Setting) -> Any:
    import qsr_engine

    block = {"strategy": setting.strategy, "lr": LR, "worker_size": setting.worker_size}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.BATCH,
        "gradient_clipping": 0.0,
        "qsr": {**block, **STRATEGIES[setting.strategy], **setting.qsr},
        **setting.config,
    }
    model, optimizer = make_model(setting.norm), partial(training.make_optimizer, setting.optimizer)
    if setting.stage is None:
        return qsr_engine.initialize_fsdp(model=model, optimizer=optimizer, config=config)
    if "fp16" in config:
        pretend_fp16()
    config["zero_allow_untested_optimizer"] = True
    config["zero_optimization"] = {"stage": setting.stage}
    if setting.stage == 3:  # matrices are partitioned, vectors stay gathered
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 20
    return qsr_engine.initialize(model=model, optimizer=optimizer, config=config)[0]


def take_step(engine: Any, setting: Setting) -> bool:
    import torch.distributed as dist

    rank, step = dist.get_rank(), engine.local_steps.step
    compute = torch.bfloat16 if "bf16" in setting.config else torch.float16 if "fp16" in setting.config else None
    dtype = (setting.stage is not None and compute) or torch.float32  # FSDP's engine converts its inputs itself
    boundary = False
    for micro in range(engine.gradient_accumulation_steps()):
        inputs, targets = training.batch(rank, step, micro, dtype=dtype)
        loss = training.loss(engine(inputs).float(), targets.float())
        bad = setting.bad and (rank, step) == (BAD_RANK, BAD_STEP)
        engine.backward(loss * math.nan if bad else loss)
        boundary = bool(engine.step())
    return boundary


def job(setting: Setting, folder: str, load: bool) -> list[dict[str, Any]]:
    """Train to the end, or to a checkpoint on the first boundary; a record of every round."""
    engine = start(setting)
    records, settled = [], False
    if load:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.load_checkpoint(folder)
        records.append(record(engine, setting))
    while not engine.local_steps.finished:
        boundary = take_step(engine, setting)
        if boundary and setting.goes_on_with and not load:
            engine.save_checkpoint(folder)
            return [record(engine, setting)]
        at_once = engine.local_steps.finished or not setting.settles_later
        if (boundary and at_once) or (settled and not boundary):
            records.append(record(engine, setting))
        settled = boundary and setting.settles_later
    return records


# ------------------------------------------------------------------------------------- what a rank has at a time

POSITION = ("step", "round", "period", "averagings", "bytes_sent", "skipped_steps")
MASTERS = (  # where DeepSpeed's optimizers keep them; the others hold the parameters themselves
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
    "fp32_groups",
)


def record(engine: Any, setting: Setting) -> dict[str, Any]:
    """Where this rank stands, and digests of what it holds. Nothing is gathered, so that nothing changes by it."""
    state = engine.local_steps.state_dict()
    parameters = [part for parameter in engine.module.parameters() for part in parts(parameter, setting.worker_size)]
    held = masters(engine.optimizer)
    base = engine.optimizer if isinstance(engine.optimizer, torch.optim.Optimizer) else engine.optimizer.optimizer
    assert {id(key) for key in base.state} <= {id(master) for master in held}
    states = [base.state[master] for master in held if master in base.state]
    return {
        **{key: state[key] for key in POSITION},
        "left_out": sum(state["left_out"].values()),
        "norm": math.sqrt(sum(float(part.double().square().sum()) for part in parameters)),
        "distance": state["relative_distance"],
        "parameters": digest([*parameters, *engine.module.buffers()]),
        "masters": digest(held),
        "state": digest(values[key] for values in states for key in sorted(values)),
    }


def parts(parameter: Any, worker_size: int) -> list[Tensor]:
    """What this rank holds of a parameter. ZeRO stage 3 keeps a flat part of it, padded on the last rank, and the whole
    only where it is small."""
    if not hasattr(parameter, "ds_tensor"):
        return [local(parameter)]
    import torch.distributed as dist

    size = parameter.ds_tensor.numel()
    real = min(max(parameter.ds_numel - size * (dist.get_rank() % worker_size), 0), size)
    return [parameter.ds_tensor.detach()[:real], parameter.detach()]


def local(tensor: Any) -> Tensor:
    """This rank's shard of a DTensor; another tensor as it is."""
    found: Tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    return found


def masters(optimizer: Any) -> list[Any]:
    held = next((getattr(optimizer, name) for name in MASTERS if hasattr(optimizer, name)), None)
    if held is None:
        held = [group["params"] for group in optimizer.param_groups]
    return [master for entry in held for master in (entry if isinstance(entry, list) else [entry])]


def digest(values: Iterable[Any]) -> str:
    """SHA-256 of the values' types, shapes and bytes, in order."""
    found = hashlib.sha256()
    for value in values:
        tensor = local(torch.as_tensor(value)).contiguous()
        found.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------- to record and compare


def trace(pool: Pool, setting: Setting, folder: str) -> Trace:
    """Records of every rank; where a checkpoint is loaded, of the ranks of both runs."""
    job_of: dict[str, Any] = {"setting": setting, "folder": folder}
    found = pool.run(job, ranks=setting.ranks, load=False, **job_of)
    resumed = pool.run(job, ranks=setting.goes_on_with, load=True, **job_of) if setting.goes_on_with else []
    return {
        **{f"rank {rank}": records for rank, records in enumerate(found)},
        **{f"resumed rank {rank}": records for rank, records in enumerate(resumed)},
    }


def machine() -> dict[str, str]:
    """What the bits depend on beside this package. Processors with one name for their vector units may still multiply
    low precision by other instructions, so that a step of plain torch is part of it."""
    return {
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "arithmetic": digest(plain_steps()),
    }


def plain_steps() -> list[Tensor]:
    """Parameters after two steps of plain torch in every precision, with one thread as in the pool's processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for norm in (False, True):
            model = make_model(norm).to(dtype)
            for step, kind in enumerate(("sgd", "adamw")):
                inputs, targets = training.batch(0, step, dtype=dtype)
                torch.autograd.backward(training.loss(model(inputs).float(), targets.float()))
                optimizer = training.make_optimizer(kind, model.parameters())
                optimizer.param_groups[0]["lr"] = 0.05
                optimizer.step()
            found += model.state_dict().values()
    torch.set_num_threads(threads)
    return found


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def differences(found: Trace, golden: Trace, same_machine: bool) -> list[str]:
    """A line for everything that differs. On another machine, which adds in another order, digests say nothing: only
    the positions are compared, and the norm of the parameters to 1e-4 of it."""
    if {rank: len(records) for rank, records in found.items()} != {r: len(records) for r, records in golden.items()}:
        return [f"other ranks or rounds: {list(found)} and {list(golden)}"]
    lines = []
    for rank, records in found.items():
        for one, other in zip(records, golden[rank], strict=True):
            for key in dict.fromkeys([*one, *other]):
                new, old = one.get(key), other.get(key)
                if not same_machine and key == "norm":
                    alike = math.isclose(one[key], other[key], rel_tol=1e-4)
                else:
                    alike = new == old or not (same_machine or key in (*POSITION, "left_out"))
                if not alike:
                    lines.append(f"{rank}, step {other['step']}: {key} is {new} and was {old}")
    return lines


def write(settings: dict[str, Trace]) -> None:
    """A line for every record, so that a change of the file can be read."""
    blocks = []
    for name, ranks in settings.items():
        lists = [
            f"   {json.dumps(rank)}: [\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in records) + "\n   ]"
            for rank, records in ranks.items()
        ]
        blocks.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lists) + "\n  }")
    text = f'{{\n "machine": {json.dumps(machine())},\n "settings": {{\n' + ",\n".join(blocks) + "\n }\n}\n"
    FILE.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare both engines with golden.json, or write it anew.")
    parser.add_argument("--write", action="store_true", help="write the file instead")
    arguments = parser.parse_args()
    pool, found = Pool(), dict[str, Trace]()
    try:
        for name, setting in SETTINGS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name] = trace(pool, setting, folder)
    finally:
        pool.stop()
    if arguments.write:
        write(found)
        return 0
    golden = read()
    same, different = golden["machine"] == machine(), False
    if golden["settings"].keys() != found.keys():
        print("golden.json has other settings: write it anew")
        different = True
    for name in found.keys() & golden["settings"].keys():
        for line in differences(found[name], golden["settings"][name], same):
            print(f"{name}: {line}")
            different = True
    print(f"{len(found)} settings compared, " + ("bit for bit" if same else "roughly: this is another machine"))
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
