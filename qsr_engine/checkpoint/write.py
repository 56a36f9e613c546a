"""Checkpoints that are whole or are not there: written under a temporary name, described by a manifest, then renamed.

    DIR/TAG/manifest.json            every file with its size and SHA-256, the layout of the ranks, the configuration
    DIR/TAG/model.safetensors        the averaged model in fp32, under the names of its state_dict()
    DIR/TAG/worker-00000/            what the engine wrote for this worker, and a file for every rank
    DIR/latest                       the tag that was written last, for people and tools; loading does not trust it

A folder is written as DIR/.TAG.tmp and gets its name when all ranks have written and every file has been read back for
its digest. A process that dies before leaves a temporary folder, which nobody loads and the next save removes. A folder
that is to be deleted gets a hidden name first. Where hosts do not share DIR, each has its own copy of this with the
files of its ranks. A checkpoint with a link inside is refused; one that is a link itself is taken by its tag only.

This file knows process groups and folders, and no engine.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qsr_engine.checkpoint.find import is_old, view
from qsr_engine.checkpoint.manifest import MANIFEST, CheckpointError, Manifest, sha256
from qsr_engine.checkpoint.together import Together, gathered

LATEST = "latest"
_REMOVED = ".removed-by-qsr"  # end of the hidden name of a folder whose deletion has begun


def save(
    directory: str | os.PathLike[str],
    tag: str,
    write: Callable[[Path], None],
    *,
    step: int,
    layout: dict[str, Any],
    config: dict[str, Any],
    inside_round: bool = False,
    latest: bool = True,
    folders: Sequence[str] = (),
    keep: int | None = None,
) -> Path:
    """Write DIR/TAG. Every rank calls it with the same arguments, but for DIR on another host.

    `write` writes this rank's files into a folder, in which `folders` exist already. It must not wait for other ranks,
    since one of them may have failed.

    An error of any rank is raised on every rank, and DIR/TAG is then as it was before.

    Args:
        keep: once the new one is whole, delete older whole ones, so that so many are left; None keeps all.
    Returns:
        The folder.
    Raises:
        CheckpointError: a rank could not write; the message names it.
    """
    _check_place(tag, directory)
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep is {keep}; write how many checkpoints to keep, at least 1, or None for all")
    directory = Path(directory)
    folder, temporary = directory / tag, directory / f".{tag}.tmp"
    together = Together(f"writing the checkpoint {folder}")
    here = _ranks_that_share(directory, together)
    lead = here[0] == dist.get_rank()
    try:
        with together.step():
            if lead:
                _make_folders(temporary, folders)
        together.agree()
        with together.step():
            write(temporary)
        together.agree()
        files = _digests_together(temporary, here, together)
        saved_at = max(gathered(_now(directory) if lead else 0.0))
        with together.step():
            if lead:
                Manifest(tag, step, saved_at, layout, config, here, files, inside_round).write(temporary)
                for inside, _, _ in os.walk(temporary):
                    _sync(Path(inside))
        together.agree()
        _put_in_place_together(temporary, folder, lead, together)
    except CheckpointError:
        if lead:
            _discard(temporary)
        raise
    if lead:
        _discard(_aside(folder))
        if latest:
            _write_latest(directory / LATEST, tag)
    if keep is not None:
        _delete_older(directory, keep, lead)
    return folder


def _check_place(tag: str, directory: str | os.PathLike[str]) -> None:
    """All ranks have the same tag, and those that see the same files the same folder; hosts may name theirs apart."""
    told = gathered((tag, _files_seen(), os.path.realpath(directory)))
    tags = sorted({tag for tag, _, _ in told})
    if len(tags) > 1:
        raise CheckpointError(f"the ranks save under different tags, {tags}; give all of them the same")
    first: dict[str, tuple[int, str]] = {}
    for rank, (_, seen, folder) in enumerate(told):
        other, its_folder = first.setdefault(seen, (rank, folder)) if seen else (rank, folder)
        if its_folder != folder:
            raise CheckpointError(
                f"rank {other} saves in {its_folder} and rank {rank}, on the same host, in {folder}; give all ranks of "
                "a host the same folder, in which every worker has its own"
            )
    if not tag or tag.startswith(".") or Path(tag).name != tag or tag == LATEST:
        raise CheckpointError(
            f"the tag is {tag!r}; write a name of a folder, without /, not beginning with a dot, and not {LATEST!r}"
        )


def _files_seen() -> str:
    """The same for processes that see the same files: on one host, in one container. Empty where it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/mnt')}"
    except OSError:
        return ""


def _make_folders(temporary: Path, inside: Sequence[str]) -> None:
    _remove_leftovers(temporary.parent)
    _discard(temporary)
    unmade = _removed(temporary)  # where this is interrupted, it is known by its name to be a leftover of ours
    for name in (".", *inside):
        (unmade / name).mkdir(parents=True)
    unmade.rename(temporary)


def _digests_together(folder: Path, here: Sequence[int], together: Together) -> dict[str, tuple[int, str]]:
    """Sizes and SHA-256 of the files in it, which are then on the disk. The ranks that share it read a part each."""
    found: list[str] = []
    with together.step():
        if here[0] == dist.get_rank():
            found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    together.agree()
    listed: list[str] = gathered(found)[here[0]]
    digests: dict[str, tuple[int, str]] = {}
    with together.step():
        for name in listed[here.index(dist.get_rank()) :: len(here)]:
            digests[name] = (folder / name).stat().st_size, sha256(folder / name, sync=True)
    together.agree()
    everywhere = gathered(digests)
    return {name: value for rank in here for name, value in everywhere[rank].items()}


def _remove_leftovers(directory: Path) -> None:
    """What saves that died have left: folders that were being written, replaced or deleted, and marks of ranks."""
    for path in directory.iterdir():
        begun = path.name.startswith(".") and path.name.endswith(".tmp") and any(path.glob("worker-*/"))
        deleted = path.name.startswith(".") and path.name.endswith(_REMOVED)
        replaced = is_old(path) and (path.parent / path.name[1 : -len(".old")] / MANIFEST).exists()
        if begun or replaced:
            _discard(path)
        elif deleted:
            _delete(path)
        elif re.fullmatch(r"\.[0-9a-f]{32}-\d+", path.name):
            path.unlink(missing_ok=True)


def _discard(path: Path | None) -> None:
    """Delete a folder, or a link to one, that is not seen as a checkpoint; what cannot be deleted is left.

    It gets another name first: what is left where this is interrupted is known by that to be a leftover of ours.
    """
    if path is None or not os.path.lexists(path):
        return
    removed = _removed(path)
    with contextlib.suppress(OSError):
        _delete(removed)
        path.rename(removed)
        path = removed
    _delete(path)


def _delete(path: Path) -> None:
    """What it cannot delete it leaves. A link is deleted, and not what it points to."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    elif path.exists():
        shutil.rmtree(path, ignore_errors=True)


def _delete_older(directory: Path, keep: int, lead: bool) -> None:
    """Delete the older whole checkpoints; what is torn or somebody else's is neither counted nor touched.

    All hosts delete the same ones: those that are whole wherever they are, and older than the newest `keep` that every
    host has.
    """
    views = [seen for seen in gathered(view(directory, None) if lead else None) if seen is not None]
    whole = {name for view in views for name in view if all(v[name][1] is None for v in views if name in v)}
    newest_first = sorted(whole, key=lambda name: (max(v[name][0] for v in views if name in v), name), reverse=True)
    everywhere = [name for name in newest_first if all(name in view for view in views)]
    older = newest_first[newest_first.index(everywhere[keep - 1]) + 1 :] if len(everywhere) > keep else []
    removed = [_hidden(directory / name) for name in older if lead and os.path.lexists(directory / name)]
    gathered(None)  # all are out of sight on every host
    for path in removed:
        if path is not None:
            _delete(path)


def _hidden(folder: Path) -> Path | None:
    """Give it a name under which it is no checkpoint, so that none is ever seen half deleted. None: it cannot be."""
    removed = _removed(folder)
    try:
        _delete(removed)
        folder.rename(removed)
        _sync(folder.parent)
    except OSError as error:
        warnings.warn(
            f"{folder}: this old checkpoint cannot be deleted ({error.strerror or error}), and takes up room; the next "
            "save tries again",
            stacklevel=4,
        )
        return removed if removed.exists() and not folder.exists() else None
    return removed


def _removed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name.lstrip('.')}{_REMOVED}")


def _now(directory: Path) -> float:
    """The time, and later than that of every checkpoint here, also where this host's clock is behind."""
    found = [saved_at for saved_at, error in view(directory, None).values() if error is None]
    return max([time.time(), *(saved_at + 1e-3 for saved_at in found)])


def _aside(folder: Path) -> Path:
    """Where a checkpoint is kept while another takes its name."""
    return folder.with_name(f".{folder.name}.old")


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Give the folder its name. One that has it already is moved aside, and is there until the caller discards it.

    Raises:
        OSError: all is as it was before.
    """
    if os.path.lexists(folder):
        _discard(_aside(folder))
        folder.rename(_aside(folder))
    try:
        temporary.rename(folder)
        _sync(folder.parent)
    except OSError:
        _take_back(temporary, folder)
        raise


def _put_in_place_together(temporary: Path, folder: Path, lead: bool, together: Together) -> None:
    """On every host, or on none."""
    with together.step():
        if lead:
            _put_in_place(temporary, folder)
    try:
        together.agree()
    except CheckpointError:
        if lead and not temporary.exists():  # it has its name here already, and could not get it on another host
            _take_back(temporary, folder)
        raise


def _take_back(temporary: Path, folder: Path) -> None:
    """Undo _put_in_place() as far as the disk lets it; under the name there is a whole checkpoint or none."""
    with contextlib.suppress(OSError):
        if not temporary.exists():
            folder.rename(temporary)
        if os.path.lexists(_aside(folder)):
            _aside(folder).rename(folder)
        _sync(folder.parent)


def _write_latest(path: Path, tag: str) -> None:
    """A failure is a warning."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(tag)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        warnings.warn(f"{path}: cannot be written ({error}); loading does not need it", stacklevel=3)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ranks_that_share(directory: Path, together: Together) -> list[int]:
    """The ranks that see the same directory as this one, in order."""
    run = gathered(uuid.uuid4().hex)[0]
    marks = [directory / f".{run}-{number}" for number in range(dist.get_world_size())]
    mine = marks[dist.get_rank()]
    here: list[int] = []
    try:
        with together.step():
            directory.mkdir(parents=True, exist_ok=True)
            mine.touch()
        together.agree()
        with together.step():
            here = [number for number, mark in enumerate(marks) if mark.exists()]
        together.agree()
    finally:
        with contextlib.suppress(OSError):  # else the next save deletes it
            mine.unlink(missing_ok=True)
    gathered(None)  # no mark is there when the next step looks at the folder
    return here
