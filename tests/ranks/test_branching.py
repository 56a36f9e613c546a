"""Runs that begin with another run's checkpoint: `qsr train --from`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qsr_engine.records.report import table
from qsr_engine.records.runs import read_run
from tests.support.launch import interrupted_job, qsr_job, records
from tests.support.pool import Processes

CONSTANT = ("qsr.alpha=0", "logging.checkpoint_every=5")
TIMED = {"seconds_compute", "seconds_averaging", "seconds_data", "images_per_second", "data_percent"}


def trained(processes: Processes, recipe: Path, name: str, *words: str, sets: tuple[str, ...] = ()) -> Path:
    """A run of these overrides and words; what rank 0 says on its way is in said.txt of its folder."""
    overrides = [word for override in (*sets, f"logging.name={name}") for word in ("--set", override)]
    results = processes.run(qsr_job, argv=["train", str(recipe), *words, *overrides])
    for code, _, err in results:
        assert code == 0, err
    (recipe.parent / "runs" / name / "said.txt").write_text(results[0][2])
    return recipe.parent / "runs" / name


def same_model(one: Path, other: Path) -> bool:
    first, second = (load_file(run / "model.safetensors") for run in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    found = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in {*TIMED, "from"}} for row in rows]


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("engine", [[], ["engine=fsdp"]], ids=["deepspeed", "fsdp"])
def test_a_run_from_anothers_checkpoint(processes: Processes, recipe: Path, engine: list[str]) -> None:
    """With alpha 0.003 rounds are of 2 steps up to step 8, and then of 4 and 2: as with alpha 0 up to there."""
    sets = ("model.kwargs.drop_rate=0.2", *engine)
    old = trained(processes, recipe, "old", sets=(*CONSTANT, "stop_at_step=8", *sets))
    before = files_of(old)
    whole = trained(processes, recipe, "whole", sets=("qsr.alpha=0.003", *sets))

    other = trained(processes, recipe, "other", "--from", str(old), sets=("qsr.alpha=0.003", *sets))
    assert same_model(other, whole), "as a run that had this alpha from step 8 on, and so before it"
    rows = [row for row in records(whole) if row["step"] > 8]
    assert [row["period"] for row in rows][-2:] == [4, 2]
    since = {"loss", "train_accuracy", "relative_distance"}  # the record before it, which the old run has at step 8
    told = [{k: v for k, v in row.items() if k not in since} for row in untimed(records(other))]
    assert told == [{k: v for k, v in row.items() if k in told[0]} for row in untimed(rows)]
    assert f"other: begins at step 8 from {old}/checkpoints/step-00000008" in (other / "said.txt").read_text()
    assert "  qsr.alpha was 0.0 and is 0.003" in (other / "said.txt").read_text()

    inside = old / "checkpoints" / "step-00000005"
    same = trained(processes, recipe, "same", "--from", str(inside), sets=(*CONSTANT, "stop_at_step=8", *sets))
    assert same_model(same, old), "from inside a round, with the same settings: the old run going on"
    assert untimed(records(same)) == [row for row in untimed(records(old)) if row["step"] > 5]
    assert "with the same settings" in (same / "said.txt").read_text()

    sets = ("qsr.alpha=0", "qsr.h_base=3", "stop_at_step=6", *sets)
    argv = [word for override in (*sets, "logging.name=third") for word in ("--set", override)]
    argv = ["train", str(recipe), "--from", str(inside), *argv]
    assert processes.run(interrupted_job, argv=argv, at_step=5) == [130, 130]
    third = trained(processes, recipe, "third", "--resume", sets=sets)  # it has no checkpoint yet
    (row,) = records(third)
    assert (row["step"], row["period"], row["round"], row["averagings"]) == (6, 3, 3, 3), "averaged at 5: a new round"
    origin = json.loads((third / "from.json").read_text())
    assert origin == row["from"]
    assert (origin["run"], origin["tag"], origin["step"], origin["optimizers"]) == (str(old), inside.name, 5, "own")
    assert f"third: begun at step 5 with the checkpoint step-00000005 of {old}" in table([read_run(third)])
    assert files_of(old) == before, "the other run is only read"


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_local_steps_after_a_run_of_parallel(processes: Processes, recipe: Path, engine: str) -> None:
    """As `post_local` does it in one run; every worker has the one optimizer state."""
    parallel = ("qsr.strategy=parallel", "stop_at_step=4", f"engine={engine}")
    old = trained(processes, recipe, "old", sets=parallel)
    local = ("qsr.strategy=constant", "stop_at_step=8", f"engine={engine}")
    words = ("--from", str(old), "--optimizer-states", "mean")
    other = trained(processes, recipe, "other", *words, sets=local)
    switched = ("qsr.strategy=post_local", "qsr.switch_step=4", "stop_at_step=8", f"engine={engine}")
    assert same_model(other, trained(processes, recipe, "whole", sets=switched))
