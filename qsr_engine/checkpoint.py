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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qsr_engine.manifest import MANIFEST, sha256
from qsr_engine.manifest import MODEL_FILE as MODEL_FILE
from qsr_engine.manifest import CheckpointError as CheckpointError
from qsr_engine.manifest import Manifest as Manifest

LATEST = "latest"
_REMOVED = ".removed-by-qsr"  # end of the hidden name of a folder whose deletion has begun


# ---------------------------------------------------------------------------------------------------- writing


def save(
    directory: str | os.PathLike[str],
    tag: str,
    write: Callable[[Path], None],
    *,
    step: int,
    layout: dict[str, Any],
    config: dict[str, Any],
    latest: bool = True,
    folders: Sequence[str] = (),
    keep: int | None = None,
) -> Path:
    """Write DIR/TAG. Every rank calls it with the same arguments; `write` writes this rank's files into a folder, in
    which `folders` exist already. It must not wait for other ranks, since one of them may have failed.

    An error of any rank is raised on every rank, and DIR/TAG is then as it was before.

    Args:
        keep: once the new one is whole, delete older whole ones, so that so many are left; None keeps all.
    Returns:
        The folder.
    Raises:
        CheckpointError: a rank could not write; the message names it.
    """
    _check_tag(tag)
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
        saved_at = max(gathered(_now(directory)))
        with together.step():
            if lead:
                Manifest(tag, step, saved_at, layout, config, here, files).write(temporary)
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


def _check_tag(tag: str) -> None:
    tags = gathered(tag)
    if len(set(tags)) > 1:
        raise CheckpointError(f"the ranks save under different tags, {sorted(set(tags))}; give all of them the same")
    if not tag or tag.startswith(".") or Path(tag).name != tag or tag == LATEST:
        raise CheckpointError(
            f"the tag is {tag!r}; write a name of a folder, without /, not beginning with a dot, and not {LATEST!r}"
        )


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
        replaced = _is_old(path) and (path.parent / path.name[1 : -len(".old")] / MANIFEST).exists()
        if begun or replaced:
            _discard(path)
        elif deleted:
            _delete(path)
        elif re.fullmatch(r"\.[0-9a-f]{32}-\d+", path.name):
            path.unlink(missing_ok=True)


def _is_old(path: Path) -> bool:
    """A checkpoint that was moved aside, see _put_in_place()."""
    name = path.name
    return name.startswith(".") and name.endswith(".old") and any((path / mark).exists() for mark in _MARKS)


_MARKS = (MANIFEST, "worker-00000")


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
    views = gathered(_view(directory, None))
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
    found = [saved_at for saved_at, error in _view(directory, None).values() if error is None]
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


class Together:
    """Steps that every rank takes, so that an error of one is an error of all, at the same place."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._error: Exception | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """An error in it waits for agree()."""
        try:
            yield
        except Exception as error:
            self._error = error

    def agree(self) -> None:
        errors = gathered(None if self._error is None else f"{type(self._error).__name__}: {self._error}")
        wrong = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
        if wrong:
            raise CheckpointError(f"{self._what} failed:\n  " + "\n  ".join(wrong[:8])) from self._error


def gathered(value: Any) -> list[Any]:
    """The values of all ranks; small ones."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------------- reading


def find(directory: str | os.PathLike[str], tag: str | None = None) -> tuple[Path, Manifest]:
    """The whole checkpoint that was saved last in a directory, or the one with this tag; the same one on every rank.

    Every file is checked: its size by every rank, its SHA-256 by one. Every rank must call it. What is passed over on
    the way, torn or altered, is named in a warning on rank 0.

    Raises:
        CheckpointError: there is none; or the one with this tag is not whole, and which one is.
    """
    directory = Path(directory)
    if tag is not None and Path(tag).name != tag:
        raise CheckpointError(f"the tag is {tag!r}; write the name of a folder in {directory}")
    if tag is not None and all(gathered(not (directory / tag).exists() and (directory / f".{tag}.old").is_dir())):
        tag = f".{tag}.old"  # a save of this tag died after it had moved the one before aside
    views = gathered(_view(directory, [tag] if tag else None))
    names = {name for view in views for name in view}
    saved = {name: max(view[name][0] for view in views if name in view) for name in names}
    newest_first = sorted(names, key=lambda name: (saved[name], name), reverse=True)  # the same order on every rank
    wrong: list[str] = []
    for name in newest_first:
        errors = {view[name][1] if name in view else f"{directory / name}: it is not on every host" for view in views}
        problem = next((error for error in sorted(map(str, errors - {None}))), None)
        if problem is None:
            manifest = Manifest.read(directory / name)
            problem = _check_digests_together(directory / name, manifest)
        if problem is None:
            if wrong and dist.get_rank() == 0:
                warnings.warn("passed over: " + "; ".join(wrong) + f". Loading {directory / name}", stacklevel=3)
            return directory / name, manifest
        wrong.append(problem)
    if tag is not None:
        raise CheckpointError("; ".join(wrong) + _offer(directory, tag))
    if not wrong:
        raise CheckpointError(
            f"{directory}: there is no checkpoint here that qsr_engine wrote; give the folder that save_checkpoint() "
            "was given"
        )
    raise CheckpointError("there is no whole checkpoint: " + "; ".join(wrong))


def _offer(directory: Path, tag: str) -> str:
    try:
        folder, manifest = find(directory)
    except CheckpointError:
        return ". There is no whole one beside it"
    return f". The newest whole one here is {folder.name!r} (step {manifest.step}); load it with tag={folder.name!r}"


def _view(directory: Path, tags: list[str] | None) -> dict[str, tuple[float, str | None]]:
    """What this rank sees: for each folder, when it was saved, and what is wrong with it."""
    if tags is None:
        try:
            paths = list(directory.iterdir())
        except OSError:
            paths = []
        tags = [path.name for path in paths if _may_be_a_checkpoint(path)]
    seen: dict[str, tuple[float, str | None]] = {}
    for tag in tags:
        folder = directory / tag
        try:
            if not folder.is_dir():
                raise CheckpointError(f"{directory}: there is no checkpoint with the tag {tag!r} here")
            manifest = Manifest.read(folder)
            seen[tag] = manifest.saved_at, None
            manifest.check_files(folder)
        except CheckpointError as error:
            seen[tag] = seen[tag][0] if tag in seen else _changed_at(folder), str(error)
    return seen


def _changed_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _may_be_a_checkpoint(path: Path) -> bool:
    """A folder that a save has finished, or that was replaced by one that is not there (see _put_in_place).

    A link to one is taken where its name is asked for, and otherwise left alone.
    """
    try:
        if not path.is_dir() or path.is_symlink() or path.name.endswith(".tmp"):
            return False
        if path.name.startswith("."):
            return _is_old(path) and not (path.parent / path.name[1 : -len(".old")]).exists()
        return (path / MANIFEST).exists() or any(path.glob("worker-*"))
    except OSError:  # a folder of somebody else's, such as lost+found
        return False


def any_here(directory: str | os.PathLike[str]) -> bool:
    """Whether this rank sees anything in the directory that find() would look at."""
    directory = Path(directory)
    return directory.is_dir() and any(_may_be_a_checkpoint(path) for path in directory.iterdir())


def _check_digests_together(folder: Path, manifest: Manifest) -> str | None:
    """Every rank reads its share of the files that it sees. Returns what is wrong, the same on every rank."""
    names = sorted(manifest.files)
    host = sorted(gathered((os.uname().nodename, dist.get_rank())))
    same_host = [rank for name, rank in host if name == os.uname().nodename]
    problem = None
    try:
        manifest.check_digests(folder, names[same_host.index(dist.get_rank()) :: len(same_host)])
    except (CheckpointError, OSError) as error:
        problem = str(error)
    return next((found for found in gathered(problem) if found is not None), None)


def find_alone(path: str | os.PathLike[str]) -> tuple[Path, Manifest]:
    """As find(), in one process, for a checkpoint's folder or the directory of several; checks sizes only.

    Raises:
        CheckpointError: there is no whole one.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        manifest = Manifest.read(path)
        manifest.check_files(path)
        return path, manifest
    view = _view(path, None)
    whole = sorted((saved_at, name) for name, (saved_at, error) in view.items() if error is None)
    if not whole:
        wrong = "; ".join(str(error) for _, error in view.values())
        raise CheckpointError(f"{path}: there is no whole checkpoint here{': ' + wrong if wrong else ''}")
    folder = path / whole[-1][1]
    return folder, Manifest.read(folder)


def export(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> Manifest:
    """Copy the averaged model of a checkpoint, after comparing it with its SHA-256.

    Raises:
        CheckpointError: there is no whole checkpoint, or it was altered, or `out` cannot be written.
    """
    folder, manifest = find_alone(checkpoint)
    if MODEL_FILE not in manifest.files:
        raise CheckpointError(f"{folder}: {MODEL_FILE} is on another host (that of rank 0); run this there")
    manifest.check_digests(folder, [MODEL_FILE])
    out = Path(out)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.copyfile(folder / MODEL_FILE, temporary)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{out}: cannot write there: {error.strerror or error}") from error
    return manifest
