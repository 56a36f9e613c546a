"""Which checkpoints of a directory are whole, and which of them was saved last: the same answer on every rank."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch.distributed as dist

from qsr_engine.checkpoint.manifest import MANIFEST, CheckpointError, Manifest
from qsr_engine.checkpoint.together import gathered


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
    views = gathered(view(directory, [tag] if tag else None))
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


def view(directory: Path, tags: list[str] | None) -> dict[str, tuple[float, str | None]]:
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
            return is_old(path) and not (path.parent / path.name[1 : -len(".old")]).exists()
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
    seen = view(path, None)
    whole = sorted((saved_at, name) for name, (saved_at, error) in seen.items() if error is None)
    if not whole:
        wrong = "; ".join(str(error) for _, error in seen.values())
        raise CheckpointError(f"{path}: there is no whole checkpoint here{': ' + wrong if wrong else ''}")
    folder = path / whole[-1][1]
    return folder, Manifest.read(folder)


def is_old(path: Path) -> bool:
    """A checkpoint that was moved aside, see _put_in_place()."""
    name = path.name
    return name.startswith(".") and name.endswith(".old") and any((path / mark).exists() for mark in _MARKS)


_MARKS = (MANIFEST, "worker-00000")
