"""A checkpoint from somebody else runs no code: every file of it is replaced by one that would, and is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from qsr_engine.checkpoint.find import find
from qsr_engine.checkpoint.manifest import CheckpointError, Manifest, sha256
from qsr_engine.checkpoint.together import gathered
from qsr_engine.engines.fsdp import files as fsdp_checkpoint
from tests.support import fsdp_engine
from tests.support.combinations import Combination, start, take_step
from tests.support.pool import Processes
from tests.support.training import QSR


class Evil:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def evil_bytes(path: Path, form: str) -> bytes:
    if form == "pickle":
        return pickle.dumps(Evil(path))
    buffer = io.BytesIO()
    content = {"module": Evil(path), "optimizer_state_dict": Evil(path), "random": Evil(path)}
    torch.save(content, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and let the manifest say that it is the right one."""
    (folder / name).write_bytes(content)
    manifest = Manifest.read(folder)
    files = {**manifest.files, name: (len(content), sha256(folder / name))}
    Manifest(**{**manifest.__dict__, "files": files}).write(folder)


def engine_of(kind: str) -> tuple[Any, Any]:
    qsr = {**QSR, "worker_size": 1 if kind == "stage 0" else 2}
    if kind == "fsdp":
        return fsdp_engine.start(qsr), fsdp_engine.take_step
    combination = Combination(int(kind[-1]), "fp32", "AdamW")
    return start(combination, qsr), lambda engine: take_step(engine, combination)


def loaded(engine: Any, folder: Path, **options: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            engine.load_checkpoint(folder, **options)
        except CheckpointError as error:
            return str(error)
    return "it was loaded"


def evil_job(kind: str, folder: str) -> dict[str, str]:
    """Save; replace one file after another; what loading says. The mark that each would make is beside the folder."""
    engine, step = engine_of(kind)
    while engine.local_steps.step < 2:
        step(engine)
    directory, said = Path(folder) / "saved", {}
    engine.save_checkpoint(directory, tag="saved")
    good = directory / "saved"
    names = sorted(name for name in Manifest.read(good).files if not name.endswith((".py", "/latest")))
    forms = ("zip", "legacy", "pickle") if kind == "stage 3" else ("zip", "pickle")
    for number, (name, form) in enumerate((name, form) for name in names for form in forms):
        bad = Path(folder) / f"{number}"
        if dist.get_rank() == 0:
            shutil.copytree(good, bad / "bad")
            forge(bad / "bad", name, evil_bytes(Path(folder) / f"mark-{number}", form))
        gathered(None)
        options = {"load_optimizer_states": False} if name == "model.safetensors" else {}
        said[f"{name} as {form}"] = loaded(engine, bad, **options)
        gathered(None)
        if dist.get_rank() == 0:
            shutil.rmtree(bad)
    said["untouched"] = loaded(engine, directory)
    return said


@pytest.mark.parametrize("kind", ["stage 0", "stage 1", "stage 3", "fsdp"])
def test_no_file_of_a_checkpoint_runs_code(processes: Processes, tmp_path: Path, kind: str) -> None:
    """On every rank it is an error, also where one rank alone reads the file, and none waits for another."""
    for said in processes.run(evil_job, kind=kind, folder=str(tmp_path)):
        assert said.pop("untouched") == "it was loaded"
        assert len(said) >= 2 * 4
        for name, error in said.items():
            assert error.startswith(f"loading the checkpoint {tmp_path}"), f"{name}: {error}"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "a mark is made by code that ran"


def test_the_evil_files_would_run(tmp_path: Path) -> None:
    """So that the test above can fail."""
    for form in ("zip", "legacy"):
        torch.load(io.BytesIO(evil_bytes(tmp_path / form, form)), weights_only=False)
    pickle.loads(evil_bytes(tmp_path / "pickle", "pickle"))
    assert {path.name for path in tmp_path.iterdir()} == {"zip", "legacy", "pickle"}


def strange_job(folder: str) -> list[str]:
    """Client state and optimizer state with an object that loading would refuse; saving refuses it already."""
    engine, step = engine_of("stage 0")
    while engine.local_steps.step < 2:
        step(engine)
    said = []
    next(iter(engine.optimizer.state.values()))["mine"] = Evil(Path(folder) / "mark")
    try:
        engine.save_checkpoint(folder)
    except CheckpointError as error:
        said.append(str(error))
    return said


def test_what_could_not_be_loaded_again_is_not_saved(processes: Processes, tmp_path: Path) -> None:
    """Else a run would find out when it needs its checkpoint."""
    for said in processes.run(strange_job, folder=str(tmp_path)):
        assert "holds what cannot be loaded without running code" in said[0]
    assert not list(tmp_path.iterdir())


def universal_job(folder: str) -> str:
    engine = start(Combination(1, "fp32", "AdamW"), QSR)
    while engine.local_steps.step < 2:
        take_step(engine, Combination(1, "fp32", "AdamW"))
    engine.save_checkpoint(folder)
    engine.load_universal_checkpoint = lambda: True  # as checkpoint.load_universal lets it say
    try:
        return loaded(engine, Path(folder))
    finally:
        del engine.load_universal_checkpoint


def test_deepspeeds_universal_checkpoints_are_refused(processes: Processes, tmp_path: Path) -> None:
    for error in processes.run(universal_job, folder=str(tmp_path)):
        assert "checkpoint.load_universal is true, and DeepSpeed then runs code that it finds in files" in error


def test_parts_of_tensors_are_read_from_their_own_folder(tmp_path: Path) -> None:
    """torch joins the folder and the place that .metadata names, whatever that is."""
    folder = tmp_path / "inside"
    folder.mkdir()
    tensor = torch.ones(3)
    fsdp_checkpoint.write(folder, {"a": tensor}, None)
    path = folder / ".metadata"
    metadata: Metadata = pickle.loads(path.read_bytes())
    (place,) = metadata.storage_data.values()
    shutil.copy(folder / place.relative_path, tmp_path / "outside.distcp")
    for other in ("../outside.distcp", str(tmp_path / "outside.distcp"), "..", 5):
        place.relative_path = other
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="is no file of this folder"):
            fsdp_checkpoint.names(folder)


def test_an_entry_that_is_no_tensor_is_not_read(tmp_path: Path) -> None:
    """torch reads such entries with pickle; none is asked for, and one that were asked for would be refused."""
    fsdp_checkpoint.write(tmp_path, {"a": torch.ones(3)}, None)
    metadata: Metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()
    ((_, place),) = metadata.storage_data.items()
    (tmp_path / place.relative_path).write_bytes(evil_bytes(tmp_path / "mark", "zip"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert fsdp_checkpoint.names(tmp_path) == {}
    with pytest.raises(CheckpointError):
        fsdp_checkpoint.read(tmp_path, {"a": torch.ones(3)}, None)
    assert not (tmp_path / "mark").exists()


def linked_job(folder: str) -> list[str]:
    """By tag, without, and after the quota has been at work; then a checkpoint with a link inside."""
    engine, step = engine_of("fsdp")
    directory = Path(folder) / "saved"
    while engine.local_steps.step < 2:
        step(engine)
    engine.save_checkpoint(Path(folder) / "elsewhere", tag="best")
    engine.save_checkpoint(directory, tag="plain")
    if dist.get_rank() == 0:
        (directory / "best").symlink_to(Path(folder) / "elsewhere" / "best")
    gathered(None)
    names = [find(directory)[0].name, find(directory, "best")[0].name]
    names += [loaded(engine, directory, tag="best"), loaded(engine, directory, tag="../elsewhere/best")]
    engine.save_checkpoint(directory, tag="next", keep=1)
    names.append(json.dumps(sorted(path.name for path in directory.glob("[!.]*"))))
    engine.save_checkpoint(directory, tag="best")  # replaces the link, and leaves what it points to
    names.append(str((directory / "best").is_symlink()))
    gathered(None)
    if dist.get_rank() == 0:
        model = directory / "best" / "model.safetensors"
        model.rename(Path(folder) / "moved")
        model.symlink_to(Path(folder) / "moved")
    gathered(None)
    return [*names, loaded(engine, directory, tag="best")]


def test_links(processes: Processes, tmp_path: Path) -> None:
    for found in processes.run(linked_job, folder=str(tmp_path)):
        assert found[:3] == ["plain", "best", "it was loaded"]
        assert "the tag is '../elsewhere/best'; write the name of a folder" in found[3]
        assert found[4:6] == ['["best", "latest", "next"]', "False"]
        assert "model.safetensors is a symbolic link, and a checkpoint holds its files itself" in found[6]
    assert (tmp_path / "elsewhere" / "best" / "manifest.json").exists()
