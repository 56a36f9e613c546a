"""Saves in which a process dies, the disk is full or one rank fails; what is no time to save."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.checkpointed import PLAIN, same, train_job
from tests.support.combinations import Combination, start, take_step
from tests.support.pool import JobError, Processes
from tests.support.training import QSR


@pytest.fixture
def own_processes() -> Iterator[Processes]:
    pool = Processes()
    yield pool
    pool.stop()


def dying_job(folder: str, qsr: dict[str, Any], combination: Combination) -> None:
    """Save on every boundary; rank 1 is killed in the middle of a round."""
    import torch.distributed as dist

    engine = start(combination, qsr)
    while not engine.local_steps.finished:
        if take_step(engine, combination):
            engine.save_checkpoint(folder)
        elif engine.local_steps.step == 9 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_killed_in_a_round_and_resumed_in_new_processes(own_processes: Processes, tmp_path: Path) -> None:
    """It goes on from the last boundary's checkpoint, and gives what an uninterrupted run gives."""
    combination = Combination(1, "bf16", "AdamW")
    common: dict[str, Any] = {"combination": combination, "folder": str(tmp_path / "run"), "qsr": QSR}
    with pytest.raises((JobError, EOFError)):
        own_processes.run(dying_job, **common)
    own_processes.stop()
    assert (tmp_path / "run" / "latest").read_text() == "global_step8"
    resumed = own_processes.run(train_job, save_at=[], load=True, **common)
    whole = own_processes.run(train_job, save_at=[], **{**common, "folder": str(tmp_path / "whole")})
    assert same(whole, resumed)


def failing_job(folder: str, where: str) -> str:
    """Save at step 2; at step 4 rank 1 cannot write, or one is killed in between and leaves its temporary folder."""
    import torch.distributed as dist

    engine = start(PLAIN, QSR)
    while engine.local_steps.step < 2:
        take_step(engine, PLAIN)
    engine.save_checkpoint(folder)
    while engine.local_steps.step < 4:
        take_step(engine, PLAIN)
    original = torch.save

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        if where == "deepspeed":
            engine.checkpoint_engine.save = full
        else:
            torch.save = full
    try:
        engine.save_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.save = original
        engine.checkpoint_engine.__dict__.pop("save", None)
        engine.save_checkpoint(folder, tag="later")
    return "it was saved"


def limited_job(folder: str, combination: Combination) -> str:
    """Rank 0 cannot write files of more than 5,000 bytes, as on a full disk, whoever writes them."""
    import resource

    import torch.distributed as dist

    engine = start(combination, QSR)
    while engine.local_steps.step < 2:
        take_step(engine, combination)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        engine.save_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    return "it was saved"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_full_disk_is_an_error_on_every_rank(processes: Processes, tmp_path: Path, stage: int) -> None:
    """DeepSpeed copies a script beside its files, and ends in a barrier; neither may leave a rank waiting."""
    for said in processes.run(
        limited_job, seconds=60, folder=str(tmp_path), combination=Combination(stage, "fp32", "SGD")
    ):
        assert said.startswith(f"CheckpointError: writing the checkpoint {tmp_path}/global_step2 failed")
        assert "rank 0: " in said
    assert not any(tmp_path.iterdir())


def test_the_old_checkpoint_is_whole_until_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between the two renames of a tag that is used again."""
    from qsr_engine.checkpoint import write as checkpoint

    for name in ("last", ".last.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    rename, calls = Path.rename, []

    def dies(path: Path, target: Path) -> Path:
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint._put_in_place(tmp_path / ".last.tmp", tmp_path / "last")
    assert (tmp_path / ".last.old" / "content").read_text() == "last"
    monkeypatch.undo()
    checkpoint._put_in_place(tmp_path / ".last.tmp", tmp_path / "last")
    assert (tmp_path / "last" / "content").read_text() == ".last.tmp"


@pytest.mark.parametrize("where", ["deepspeed", "own"])
def test_an_error_of_one_rank_is_an_error_of_all_and_harms_nothing(
    processes: Processes, tmp_path: Path, where: str
) -> None:
    """The write's failure is a stub: a full disk cannot be made here without other rights."""
    (tmp_path / ".later.tmp" / "worker-00000").mkdir(parents=True)
    (tmp_path / ".later.tmp" / "left over").touch()
    (tmp_path / ".dead.tmp" / "worker-00001").mkdir(parents=True)
    (tmp_path / ".somebody_elses.tmp").mkdir()
    for said in processes.run(failing_job, folder=str(tmp_path), where=where):
        assert said.startswith(f"CheckpointError: writing the checkpoint {tmp_path}/global_step4 failed")
        assert "rank 1: " in said
        assert "No space left on device" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".somebody_elses.tmp",
        "global_step2",
        "later",
        "latest",
    ]
    assert not (tmp_path / "later" / "left over").exists()


def refused_job(folder: str) -> list[str]:
    engine = start(PLAIN, {**QSR, "h_base": 4})
    take_step(engine, PLAIN)
    messages = []

    def attempt(action: Any) -> None:
        try:
            action()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")

    attempt(partial(engine.load_checkpoint, folder))
    attempt(partial(engine.load_checkpoint, folder, tag="nope"))
    for _ in range(3):
        take_step(engine, PLAIN)
    attempt(partial(engine.save_checkpoint, folder, tag="../up"))
    attempt(partial(engine.save_checkpoint, folder, client_state={"object": nn.ReLU()}))
    attempt(partial(engine.save_checkpoint, folder, tag="latest"))
    attempt(partial(engine.save_checkpoint, folder, tag=f"rank{os.environ['RANK']}"))
    attempt(partial(engine.save_checkpoint, folder, client_state=[1]))
    attempt(partial(engine.load_checkpoint, folder, load_module_only=True))
    attempt(partial(engine.save_checkpoint, f"{folder}/rank{os.environ['RANK']}"))
    return messages


def test_what_is_refused(processes: Processes, tmp_path: Path) -> None:
    for messages in processes.run(refused_job, folder=str(tmp_path)):
        assert "there is no checkpoint here that qsr_engine wrote" in messages[0]
        assert "there is no checkpoint with the tag 'nope' here" in messages[1]
        assert "the tag is '../up'" in messages[2]
        assert "objects that cannot be loaded again without running code, under ['object']" in messages[3]
        assert "the tag is 'latest'" in messages[4]
        assert "the ranks save under different tags, ['rank0', 'rank1']" in messages[5]
        assert "client_state is a list; give a dict" in messages[6]
        assert "load_module_only begins a run with the parameters of another, and this one is at step 4" in messages[7]
        assert f"rank 0 saves in {tmp_path}/rank0 and rank 1, on the same host, in {tmp_path}/rank1" in messages[8]
    assert not any(tmp_path.iterdir())
