"""What `qsr train` refuses, with the words that say why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qsr_engine.data import write_digits
from tests.support.launch import qsr_job, train
from tests.support.pool import Processes


def refusals(processes: Processes, recipe: Path, *overrides: str, per_rank: Any = None, ranks: int = 2) -> list[str]:
    """What each rank says when it refuses to train; every one must, in under 60 s."""
    sets = [word for override in overrides for word in ("--set", override)]
    results = processes.run(qsr_job, ranks=ranks, seconds=60, argv=["train", str(recipe), *sets], per_rank=per_rank)
    assert all(code == 1 for code, _, _ in results), results
    return [err for _, _, err in results]


def test_ranks_with_different_recipes(processes: Processes, recipe: Path) -> None:
    for key, one, other in (
        ("qsr.alpha", "0.006", "0.007"),
        ("seed", "0", "1"),
        ("optimizer.weight_decay", "0.05", "0.1"),
        ("data.augment", "'crop'", "'none'"),
    ):
        per_rank = [[], ["--set", f"{key}={other}"]]
        named = key.replace("optimizer", "options.group 0")  # engines compare these before recipes are
        for said in refusals(processes, recipe, per_rank=per_rank):
            assert f"{named}: {one} on rank 0; {other} on rank 1" in said
    assert not (recipe.parent / "runs").exists(), "nothing was written before the ranks agreed"


def test_ranks_with_different_data(processes: Processes, recipe: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "other", seed=1)
    for said in refusals(processes, recipe, per_rank=[[], ["--set", f"data.shards={tmp_path / 'other'}"]]):
        assert "data: " in said
        assert "on rank 1" in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("qsr.worker_size=3", "worker_size is 3 and there are 2 ranks"),
        ("batch.train_micro_batch_size_per_gpu=7", "train_batch_size is 96, which is not a multiple of 2 ranks x"),
        ("batch.train_batch_size=1438", "fewer than one batch"),
        ("model.name=timm/vit_tiny_patch16_225", "did you mean timm/vit_tiny_patch16_224"),
        ("model.kwargs.num_classes=5", "num_classes is 5, and the data has 10 classes"),
        ("model.kwargs.img_sise=8", "model.kwargs: timm/vit_tiny_patch16_224 does not take"),
        ("data.image_size=9", "does not take images of shape (1, 3, 9, 9)"),
        ("data.train=trian", "did you mean 'train'"),
        ("data.shards=/nowhere", "index is missing"),
        ("engine=fspd", "engine: found 'fspd'"),
    ],
)
def test_what_cannot_run_is_refused(processes: Processes, recipe: Path, override: str, words: str) -> None:
    for said in refusals(processes, recipe, override):
        assert said.startswith("qsr: error (rank ")
        assert words in said


def test_a_folder_that_holds_a_run_is_refused(processes: Processes, recipe: Path) -> None:
    run = train(processes, recipe, "qsr.total_steps=2")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    for rank, said in enumerate(refusals(processes, recipe, f"logging.name={run.name}")):
        assert "this folder already holds" in said
        assert "--set logging.name=NAME" in said
        assert ("cannot go on: " in said) is (rank == 1), "rank 0 writes there, and tells the other"
    assert sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir()) == before


def test_what_one_rank_finds_ends_all_at_once(processes: Processes, recipe: Path, tmp_path: Path) -> None:
    """Else rank 0 would wait for it for two minutes, and say that it did not come."""
    per_rank = [[], ["--set", f"data.shards={tmp_path / 'none'}"]]
    here, there = refusals(processes, recipe, per_rank=per_rank)
    assert re.match(rf"qsr: error \(rank 0\): rank 1 on \S+ cannot go on: {tmp_path}/none", here)
    assert there.startswith(f"qsr: error (rank 1): {tmp_path}/none")


def test_a_truncated_shard_is_refused_before_training(processes: Processes, recipe: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "torn")
    shard = tmp_path / "torn" / "train-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    for said in refusals(processes, recipe, f"data.shards={tmp_path / 'torn'}"):
        assert "train-000003.tar" in said
        assert "truncated" in said


def test_a_loss_that_is_not_finite_ends_the_run(processes: Processes, recipe: Path) -> None:
    overrides = ["optimizer.type=SGD", "qsr.strategy=parallel", "qsr.lr.peak=1e30", "optimizer.gradient_clipping=0"]
    (said,) = refusals(processes, recipe, *overrides, ranks=1)
    assert "the loss is nan" in said
    assert "lower qsr.lr.peak" in said


def test_a_folder_in_which_another_process_trains_is_refused(
    processes: Processes, recipe: Path, tmp_path: Path
) -> None:
    """A launcher that is killed can leave its ranks behind, and `--resume` would write between their lines."""
    from qsr_engine.records.run_folder import lock_run_folder

    name = ["--set", "logging.name=held"]
    (tmp_path / "runs" / "held").mkdir(parents=True)
    lock = lock_run_folder(tmp_path / "runs" / "held")
    assert lock is not None
    code, _, err = processes.run(qsr_job, ranks=1, argv=["train", str(recipe), "--resume", *name])[0]
    assert code == 1
    assert "another process trains in this folder" in err
    lock.close()
    assert processes.run(qsr_job, ranks=1, argv=["train", str(recipe), "--resume", *name])[0][0] == 0


def test_a_model_without_batch_norm_needs_no_block(processes: Processes, recipe: Path) -> None:
    for said in refusals(processes, recipe, "batch_norm={batches: 4}"):
        assert "batch_norm is given, and timm/vit_tiny_patch16_224 has no batch norm" in said
