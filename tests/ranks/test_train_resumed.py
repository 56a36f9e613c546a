"""Runs of `qsr train` that died and go on; `qsr export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsr_engine.config.recipe_file import load_recipe
from tests.support.launch import interrupted_job, qsr_job, records, train, workers
from tests.support.pool import Processes


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    "precision",
    [[], ["precision.dtype=bf16", "precision.zero_stage=3"], ["engine=fsdp", "precision.dtype=bf16"]],
    ids=["fp32", "zero3", "fsdp-bf16"],
)
def test_a_run_that_died_is_resumed_to_the_same_bits(processes: Processes, recipe: Path, precision: list[str]) -> None:
    """With dropout, so that the random states matter; with a loader process; and records that continue. On the way it
    stops inside a round because it is told so, and goes on as if it had not."""
    more = ["model.kwargs.drop_rate=0.2", "data.loader_processes=1", "logging.checkpoint_every=4", "qsr.total_steps=18"]
    overrides = [*more, *precision, "batch.gradient_accumulation_steps=2"]
    whole = train(processes, recipe, *overrides)
    saved = [json.loads(path.read_text()) for path in sorted(whole.glob("checkpoints/*/manifest.json"))]
    assert [manifest["step"] for manifest in saved] == [4, 8, 12, 16]
    assert saved[1]["inside_round"], "from where the run that dies goes on"

    sets = [word for override in (*overrides, "logging.name=died") for word in ("--set", override)]
    argv = ["train", str(recipe), *sets]
    assert processes.run(interrupted_job, argv=argv, at_step=11) == [130, 130]
    died = recipe.parent / "runs" / "died"
    assert not (died / "summary.json").exists()
    with (died / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # a line that was being written
    for words, changed in (
        ("seed was 0 and is 7", ["--set", "seed=7"]),
        ("qsr.lr.peak was 0.003 and is 0.5", ["--set", "qsr.lr.peak=0.5"]),
    ):
        for code, _, err in processes.run(qsr_job, argv=[*argv, *changed, "--resume"]):
            assert code == 1
            assert words in err
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume", "--set", "stop_at_step=15"]):
        assert code == 0, err
    summary = json.loads((died / "summary.json").read_text())
    assert (summary["steps"], summary["partial"], summary["eval_accuracy"] > 0) == (15, True, True)
    stopped = json.loads((died / "checkpoints" / "step-00000015" / "manifest.json").read_text())
    assert stopped["inside_round"], "the round is not cut"
    average = load_file(died / "checkpoints" / "step-00000015" / "model.safetensors")
    assert all(torch.equal(tensor, average[name]) for name, tensor in load_file(died / "model.safetensors").items())
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume", "--set", "stop_at_step=null"]):
        assert code == 0, err
    assert json.loads((died / "summary.json").read_text())["partial"] is False
    assert load_recipe(died / "recipe.yaml").stop_at_step is None, "the folder says what the run is now"

    first, second = (load_file(run / "model.safetensors") for run in (whole, died))
    assert all(torch.equal(first[name], second[name]) for name in first)
    timed = {"seconds_compute", "seconds_averaging", "seconds_data", "images_per_second", "data_percent"}
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in records(run)] for run in (whole, died)]
    assert rows[0] == rows[1]
    assert rows[0][-1]["best_step"] is not None
    told = [[(row["step"], row["loss"], row["accuracy"]) for row in workers(run)] for run in (whole, died)]
    assert told[0] == told[1], "what the workers told since the last time goes on too"
    steps = [event.step for event in EventAccumulator(str(died)).Reload().Scalars("train/loss")]
    assert steps == [row["step"] for row in rows[0]], "TensorBoard shows every record once"

    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 1
        assert "this run is finished" in err


def test_resume_begins_where_there_is_no_checkpoint(processes: Processes, recipe: Path) -> None:
    argv = ["train", str(recipe), "--set", "logging.name=early"]
    assert processes.run(interrupted_job, argv=argv, at_step=4) == [130, 130]
    (recipe.parent / "runs" / "early" / "checkpoints" / ".step-00000004.tmp").mkdir(parents=True)  # killed in a save
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 0, err
    (kept,) = (recipe.parent / "runs" / "early").glob("before-*/metrics.jsonl")
    assert kept.stat().st_size > 0
    again = train(processes, recipe)
    first, second = (load_file(run / "model.safetensors") for run in (recipe.parent / "runs" / "early", again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_export_writes_what_timm_loads(processes: Processes, recipe: Path, tmp_path: Path) -> None:
    import timm

    from qsr_engine.cli.main import main

    run = train(processes, recipe, "logging.checkpoint_every=1")
    out = tmp_path / "out.safetensors"
    assert main(["export", str(run / "checkpoints"), str(out)]) == 0
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=10,
        checkpoint_path=str(out),
    )
    exported = load_file(out)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())
    assert main(["export", str(tmp_path), str(out)]) == 1
