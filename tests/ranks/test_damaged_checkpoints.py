"""Checkpoints that are torn, altered or another run's."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import training
from tests.support.checkpointed import PLAIN, a_file, flip, same, train_job, truncate
from tests.support.pool import JobError, Processes
from tests.support.pretended_hosts import files_of_its_own
from tests.support.training import QSR


@pytest.fixture(scope="module")
def saved(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints of the steps 2, 4 and 6; tests copy them."""
    folder = tmp_path_factory.mktemp("saved")
    processes.run(train_job, combination=PLAIN, folder=str(folder), qsr=QSR, save_at=[2, 4, 6])
    return folder


def load_job(folder: str, tag: str | None = None, hidden: int = 17) -> tuple[str, list[str]]:
    """Load; (the folder that was loaded or the error, the warnings)."""
    import qsr_engine

    model = training.make_model(torch.float32)
    if hidden != 17:
        model = nn.Sequential(nn.Linear(training.FEATURES, hidden), nn.Linear(hidden, training.OUTPUTS))
    config = {"train_micro_batch_size_per_gpu": training.BATCH, "qsr": QSR, "gradient_clipping": 0.0}
    optimizer = partial(training.make_optimizer, "adamw")
    engine = qsr_engine.initialize(model=model, optimizer=optimizer, config=config)[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            path, _ = engine.load_checkpoint(folder, tag=tag)
            result = Path(str(path)).name
        except qsr_engine.checkpoint.CheckpointError as error:
            result = str(error)
    return result, [str(warning.message) for warning in said]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: truncate(a_file(f, "mp_rank_00_model_states.pt")), "bytes were written|torn"),
    "one bit": (lambda f: flip(a_file(f, "mp_rank_00_model_states.pt")), "was altered after it was written"),
    "one bit of a rank": (lambda f: flip(a_file(f, "rank-00001.pt")), "was altered after it was written"),
    "a file is gone": (lambda f: a_file(f, "model.safetensors").unlink(), "model.safetensors is missing"),
    "a worker is gone": (lambda f: shutil.rmtree(f / "worker-00001"), "is missing"),
    "the manifest is gone": (lambda f: (f / "manifest.json").unlink(), "there is no manifest.json"),
    "the manifest is torn": (lambda f: truncate(f / "manifest.json"), "cannot be read, so the checkpoint is torn"),
    "the manifest is altered": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"step": 6', '"step": 7')),
        "it was altered after it was written",
    ),
    "another format": (lambda f: (f / "manifest.json").write_text(json.dumps({"format": 99})), "the format is 99"),
}


@pytest.mark.fast_cells(3, of=9)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    processes: Processes, saved: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    act, words = DAMAGE[damage]
    act(folder / "global_step6")
    for rank, (loaded, said) in enumerate(processes.run(load_job, folder=str(folder))):
        assert loaded == "global_step4"
        assert any("global_step6" in text and "Loading" in text for text in said) == (rank == 0)
    for error, _ in processes.run(load_job, folder=str(folder), tag="global_step6"):
        assert any(part in error for part in words.split("|"))
        assert "load it with tag='global_step4'" in error


def test_copies_of_one_checkpoint_are_the_same_choice_on_every_rank(
    processes: Processes, saved: Path, tmp_path: Path
) -> None:
    """They were saved at the same moment."""
    for name in "abcdefgh":
        shutil.copytree(saved / "global_step6", tmp_path / name)
    assert [loaded for loaded, _ in processes.run(load_job, folder=str(tmp_path))] == ["h", "h"]


def test_another_models_checkpoint_is_refused(processes: Processes, saved: Path) -> None:
    for error, _ in processes.run(load_job, folder=str(saved), hidden=5):
        assert "it is the checkpoint of another model" in error


def test_a_checkpoint_of_deepspeed_itself_is_refused(processes: Processes, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "global_step6" / "worker-00000", tmp_path / "plain")
    for error, _ in processes.run(load_job, folder=str(tmp_path / "plain")):
        assert "there is no checkpoint here that qsr_engine wrote" in error


def test_a_save_that_died_between_two_renames_is_found(processes: Processes, saved: Path, tmp_path: Path) -> None:
    """Overwriting a tag moves the old folder aside; if the process dies then, the old one is still whole."""
    shutil.copytree(saved / "global_step6", tmp_path / ".global_step6.old")
    for tag in (None, "global_step6"):
        assert processes.run(load_job, folder=str(tmp_path), tag=tag)[0][0] == ".global_step6.old"


def apart_job(folder: str, load: bool) -> dict[str, Any]:
    """Every rank has a directory of its own, as on hosts that share none."""
    files_of_its_own()
    mine = f"{folder}/host-{os.environ['RANK']}"
    qsr = {**QSR, "worker_size": 1}
    return train_job(PLAIN, mine, qsr, [] if load else [4], load)


def test_hosts_without_a_shared_file_system(processes: Processes, tmp_path: Path) -> None:
    whole = processes.run(apart_job, folder=str(tmp_path), load=False)
    manifests = [json.loads((tmp_path / f"host-{r}/global_step4/manifest.json").read_text()) for r in (0, 1)]
    assert [manifest["ranks"] for manifest in manifests] == [[0], [1]]
    assert same(whole, processes.run(apart_job, folder=str(tmp_path), load=True))
    shutil.rmtree(tmp_path / "host-1" / "global_step4")
    with pytest.raises(JobError, match="it is not on every host"):
        processes.run(apart_job, folder=str(tmp_path), load=True)


def test_an_altered_model_is_not_exported(saved: Path, tmp_path: Path) -> None:
    from qsr_engine.checkpoint.manifest import CheckpointError
    from qsr_engine.checkpoint.model_file import export

    shutil.copytree(saved, tmp_path / "run")
    flip(tmp_path / "run" / "global_step6" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors was altered"):
        export(tmp_path / "run", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    export(tmp_path / "run" / "global_step4", tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="cannot write there"):
        export(tmp_path / "run" / "global_step4", tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(CheckpointError, match="no whole checkpoint here"):
        export(tmp_path, tmp_path / "out.safetensors")
