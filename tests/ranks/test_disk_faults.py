"""A disk that is full, read-only or broken while a checkpoint is written, at every position of the write.

Stubbed in most tests here: the calls of Python by which anything is changed on a disk (CHANGING) fail at the n-th one
with the error that a disk would give, on one rank; what they do otherwise is real. The writers in C++ and Rust (torch's
and safetensors') do not pass there: for them RLIMIT_FSIZE makes real writes fail, in the middle and at the last byte of
every file. Two tests fill a real file system in memory, and make one read-only.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qsr_engine.checkpoint.find import find
from qsr_engine.checkpoint.manifest import CheckpointError, Manifest
from qsr_engine.checkpoint.together import gathered
from tests.support import fsdp_engine
from tests.support.combinations import Combination, start, take_step
from tests.support.full_disks import files_of_at_most
from tests.support.pool import Processes
from tests.support.pretended_hosts import files_of_its_own
from tests.support.training import QSR

# ------------------------------------------------------------------------------------ a fault at the n-th operation

CHANGING = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "truncate", "ftruncate", "chmod")


class Faults:
    """Counts what would change the disk, and lets it fail: the n-th operation, or all from there on."""

    def __init__(self, at: int, number: int, for_good: bool) -> None:
        self.at, self.number, self.for_good = at, number, for_good
        self.seen = 0

    def operation(self, what: Any) -> None:
        self.seen += 1
        if self.seen == self.at or (self.for_good and self.seen > self.at):
            raise OSError(self.number, os.strerror(self.number), str(what))

    def before(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.operation(args[0] if args else original)
            return original(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """In this process. A reader of what is there is not disturbed."""
        kept: list[tuple[Any, str, Any]] = [(os, name, getattr(os, name)) for name in CHANGING]
        plain_open, low_open = builtins.open, os.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+"):
                self.operation(file)
            return plain_open(file, mode, *args, **kwargs)

        def opened_low(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.operation(path)
            return low_open(path, flags, *args, **kwargs)

        kept += [(builtins, "open", plain_open), (io, "open", plain_open), (os, "open", low_open)]
        kept += [(torch, "save", torch.save)]  # whose writer in C++ opens the file itself
        try:
            for owner, name, original in kept:
                setattr(owner, name, self.before(original))
            builtins.open = io.open = opened
            os.open = opened_low
            yield
        finally:
            for owner, name, original in kept:
                setattr(owner, name, original)


def engine_of(kind: str) -> tuple[Any, Callable[[Any], Any]]:
    """An engine and a function that takes one step with it."""
    if kind == "fsdp":
        return fsdp_engine.start(QSR), fsdp_engine.take_step
    combination = Combination(int(kind[-1]), "fp32", "AdamW")
    return start(combination, QSR), lambda engine: take_step(engine, combination)


def saved_engine(kind: str, folder: str) -> Any:
    """At step 2, with checkpoints under the tags first and same."""
    engine, step = engine_of(kind)
    while engine.local_steps.step < 2:
        step(engine)
    for tag in ("first", "same"):
        engine.save_checkpoint(folder, tag=tag)
    return engine


def try_to_save(engine: Any, folder: str, faults: contextlib.AbstractContextManager[None], **options: Any) -> str:
    """ "" or the error; warnings (of `latest` and of what cannot be deleted) are not looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with faults:
                engine.save_checkpoint(folder, **options)
        except CheckpointError as error:
            return str(error)
    return ""


def check_what_is_left(folder: str, tag: str, failed: bool, what: str) -> float:
    """Every folder that is to be seen is whole, and find() has one: that of this save, unless it failed.

    Returns:
        When that one was saved.
    """
    for path in Path(folder).iterdir():
        if not path.name.startswith(".") and path.is_dir():
            manifest = Manifest.read(path)
            manifest.check_files(path)
            manifest.check_digests(path, list(manifest.files))
    found, manifest = find(folder)
    assert found.name == tag or failed, what
    return manifest.saved_at


def every_position_job(kind: str, folder: str, bad_rank: int, number: int, for_good: bool, quota: bool) -> list[str]:
    """Save with a fault at the 1st, 2nd, ... operation, until there are no more; the errors, "" where it was saved.

    With a quota every save has a tag of its own, and old ones are deleted; otherwise one tag is written over and over.
    """
    engine = saved_engine(kind, folder)
    said: list[str] = []
    before = find(folder)[1].saved_at
    while True:
        at = len(said) + 1
        faults = Faults(at if dist.get_rank() == bad_rank else 10**9, number, for_good)
        tag = f"try-{at}" if quota else "same"
        error = try_to_save(engine, folder, faults.armed(), tag=tag, keep=2 if quota else None)
        if gathered(faults.seen)[bad_rank] < at:
            return said
        after = check_what_is_left(folder, tag, bool(error), f"position {at}: {error}")
        assert (after == before) if error and not for_good else after >= before, f"position {at}: {error}"
        before = after
        said.append(error)


@pytest.mark.fast_cells(0, of=3)
@pytest.mark.parametrize(
    ("kind", "bad_rank", "number", "for_good"),
    [
        ("stage 1", 0, errno.ENOSPC, False),
        ("stage 1", 1, errno.EIO, False),
        ("fsdp", 0, errno.EROFS, True),
        ("fsdp", 1, errno.ENOSPC, False),
    ],
)
def test_a_fault_at_every_position_leaves_the_last_whole_one(
    processes: Processes, tmp_path: Path, kind: str, bad_rank: int, number: int, for_good: bool
) -> None:
    """On one rank of two; "for good" is a disk that is read-only from there on, so that nothing can be undone."""
    quota = bad_rank == 0
    job: dict[str, Any] = {
        "kind": kind,
        "folder": str(tmp_path),
        "bad_rank": bad_rank,
        "number": number,
        "for_good": for_good,
    }
    first, second = processes.run(every_position_job, quota=quota, **job)
    assert first == second, "all ranks are told the same"
    wrong = [error for error in first if error]
    assert len(wrong) >= 4
    assert len(first) >= (20 if bad_rank == 0 else 7), "so many operations there are at least"
    for error in wrong:
        assert f"rank {bad_rank}: " in error
        assert os.strerror(number) in error
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert not hidden, "the last save, which succeeded, has removed what the others left"


# ------------------------------------------------------------------------------- real writes that fail in the middle


def every_size_job(kind: str, folder: str, bad_rank: int) -> dict[int, str]:
    """Save where no file may have more than so many bytes: for each file its half, and one byte less than it has."""
    engine = saved_engine(kind, folder)
    sizes = {size for size, _ in find(folder, "first")[1].files.values()}
    sizes.add((Path(folder) / "first" / "manifest.json").stat().st_size)
    said = {}
    for limit in sorted({size // 2 for size in sizes} | {size - 1 for size in sizes}):
        limited = files_of_at_most(limit if dist.get_rank() == bad_rank else None)
        said[limit] = try_to_save(engine, folder, limited, tag="same")
        check_what_is_left(folder, "same", bool(said[limit]), f"{limit} bytes: {said[limit]}")
    engine.save_checkpoint(folder, tag="last")
    assert find(folder)[0].name == "last"
    return said


@pytest.mark.parametrize(("kind", "bad_rank"), [("stage 3", 0), ("stage 0", 1), ("fsdp", 0)])
def test_a_write_that_is_cut_in_any_file_leaves_the_last_whole_one(
    processes: Processes, tmp_path: Path, kind: str, bad_rank: int
) -> None:
    first, second = processes.run(every_size_job, kind=kind, folder=str(tmp_path), bad_rank=bad_rank)
    assert first == second
    assert sum(map(bool, first.values())) >= 4
    assert all(f"rank {bad_rank}: " in error for error in first.values() if error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "last", "latest", "same"]


# --------------------------------------------------------------------------------------------------------- quota


def quota_job(folder: str, apart: bool) -> list[list[str]]:
    """Checkpoints of 5 boundaries with keep=2; what there is after each. `apart`: a directory for every rank."""
    engine, step = engine_of("fsdp")
    mine = Path(folder) / f"host-{dist.get_rank()}" if apart else Path(folder)
    if apart:
        files_of_its_own()
    mine.mkdir(exist_ok=True)
    if apart or dist.get_rank() == 0:
        for name in ("torn/worker-00000", "foreign", ".dead.removed-by-qsr/worker-00000"):
            (mine / name).mkdir(parents=True)
    dist.barrier()
    seen = []
    while not engine.local_steps.finished:
        if step(engine):
            engine.save_checkpoint(mine, keep=2)
            seen.append(sorted(path.name for path in mine.glob("[!.]*")))
            if apart and len(seen) == 2 and dist.get_rank() == 1:  # then the two whole ones are those of the steps 2, 6
                shutil.rmtree(mine / "global_step4")
            dist.barrier()
    return seen


@pytest.mark.parametrize("apart", [False, True])
def test_so_many_whole_ones_are_kept(processes: Processes, tmp_path: Path, apart: bool) -> None:
    """Torn folders and those of others are neither counted nor deleted, and hosts agree on which are."""
    seen = processes.run(quota_job, folder=str(tmp_path), apart=apart)
    steps = [[sorted(int(n[11:]) for n in names if n.startswith("global_step")) for names in rank] for rank in seen]
    if apart:
        assert steps[0] == [[2], [2, 4], [2, 4, 6], [6, 8], [8, 12]]
        assert steps[1] == [[2], [2, 4], [2, 6], [6, 8], [8, 12]]
    else:
        assert steps[0] == steps[1] == [[2], [2, 4], [4, 6], [6, 8], [8, 12]]
    assert all({"torn", "foreign", "latest"} == {n for n in names if "global" not in n} for names in seen[0])
    assert not [*tmp_path.glob(".*"), *tmp_path.glob("host-*/.*")], "nor is there a folder whose deletion has begun"


def apart_job(folder: str) -> tuple[str, float, float]:
    """A directory for every rank, as on two hosts; on the second the new checkpoint cannot get its name."""
    files_of_its_own()
    mine = Path(folder) / f"host-{dist.get_rank() if dist.is_initialized() else os.environ['RANK']}"
    engine = saved_engine("fsdp", str(mine))
    before, rename = find(mine, "same")[1].saved_at, os.rename

    def refuse(source: Any, target: Any, **kwargs: Any) -> None:
        if Path(source).name == ".same.tmp" and dist.get_rank() == 1 and Path(target).name == "same":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target, **kwargs)

    os.rename = refuse  # type: ignore[assignment]
    try:
        error = try_to_save(engine, str(mine), contextlib.nullcontext(), tag="same")
    finally:
        os.rename = rename
    return error, before, find(mine, "same")[1].saved_at


def test_a_checkpoint_gets_its_name_on_all_hosts_or_on_none(processes: Processes, tmp_path: Path) -> None:
    for error, before, after in processes.run(apart_job, folder=str(tmp_path)):
        assert "rank 1: OSError: [Errno 5] Input/output error" in error
        assert before == after
    for host in tmp_path.iterdir():
        assert sorted(path.name for path in host.iterdir()) == ["first", "latest", "same"]


def test_what_cannot_be_deleted_is_a_warning(processes: Processes, tmp_path: Path) -> None:
    said = processes.run(undeletable_job, ranks=1, folder=str(tmp_path))[0]
    assert any("first: this old checkpoint cannot be deleted (Operation not permitted)" in text for text in said)
    assert {"first", "same", "new"} <= {path.name for path in tmp_path.iterdir()}


def undeletable_job(folder: str) -> list[str]:
    engine = saved_engine("fsdp", folder)
    rename = os.rename

    def refuse(source: Any, target: Any, **kwargs: Any) -> None:
        if Path(source).name in ("first", "same"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        rename(source, target, **kwargs)

    os.rename = refuse  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            engine.save_checkpoint(folder, tag="new", keep=1)
    finally:
        os.rename = rename
    return [str(warning.message) for warning in said]
