"""A run of the DeepSpeed engine that saves and resumes, and ways to damage what it saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.support.combinations import Combination, start, take_step, whole_masters, whole_parameters

PLAIN = Combination(0, "fp32", "AdamW")


def finish(engine: Any, combination: Combination, folder: str = "", save_at: list[int] | None = None) -> dict[str, Any]:
    """Train to the end, saving after the steps save_at; what the run leaves behind."""
    while not engine.local_steps.finished:
        take_step(engine, combination)
        if engine.local_steps.step in (save_at or []):
            engine.save_checkpoint(folder)
    counts = {key: value for key, value in engine.local_steps.state_dict().items() if key != "seconds_averaging"}
    return {"parameters": whole_parameters(engine), "masters": whole_masters(engine), "counts": counts}


def train_job(
    combination: Combination,
    folder: str,
    qsr: dict[str, Any],
    save_at: list[int],
    load: bool = False,
    tag: str | None = None,
    **config: Any,
) -> dict[str, Any]:
    engine = start(combination, qsr, **config)
    if load:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.load_checkpoint(folder, tag=tag)
        assert engine.global_steps == engine.local_steps.step > 0
    return finish(engine, combination, folder, save_at)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return all(
        torch.equal(a["parameters"], b["parameters"])
        and torch.equal(a["masters"], b["masters"])
        and a["counts"] == b["counts"]
        for a, b in zip(one, other, strict=True)
    )


RESUMED = [
    *(Combination(stage, precision, "AdamW") for stage in (1, 3) for precision in ("fp32", "bf16", "fp16")),
    Combination(2, "bf16", "AdamW"),  # a class of DeepSpeed with stage 1
    PLAIN,
    Combination(0, "bf16", "SGD"),
    Combination(1, "bf16, fp32 accumulation", "AdamW"),
    Combination(0, "bf16", "FusedAdam"),
    *(Combination(stage, "bf16", "offloaded CPUAdam") for stage in (1, 3)),  # 1 and 2 are one class of DeepSpeed
]


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_file(folder: Path, name: str) -> Path:
    return next(folder.rglob(name))
