"""Checkpoints that are whole or are not there: written under a temporary name, described by a manifest, then renamed.

    DIR/TAG/manifest.json            every file with its size and SHA-256, the layout of the ranks, the configuration
    DIR/TAG/model.safetensors        the averaged model in fp32, under the names of its state_dict()
    DIR/TAG/worker-00000/            what the engine wrote for this worker, and a file for every rank
    DIR/latest                       the tag that was written last, for people and tools; loading does not trust it

A folder is written as DIR/.TAG.tmp and gets its name when all ranks have written and every file has been read back for
its digest. A process that dies before leaves a temporary folder, which nobody loads and the next save removes. Where
hosts do not share DIR, each has its own copy of this with the files of its ranks.

This file knows process groups and folders, and no engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
LATEST = "latest"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or loaded; the message names the folder, what is wrong, and what to do."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    layout: what must be the same for an exact resume, and what may differ (see the engine).
    files: for each path relative to the folder, (size in bytes, SHA-256 in hex); those of the ranks that share this
        file system.
    ranks: the ranks whose files are here.
    saved_at: seconds since 1970, by the clock of rank 0.
    """

    tag: str
    step: int
    saved_at: float
    layout: dict[str, Any]
    config: dict[str, Any]
    ranks: list[int]
    files: dict[str, tuple[int, str]]

    def write(self, folder: Path) -> None:
        body = {**self.__dict__, "format": FORMAT, "files": {k: list(v) for k, v in sorted(self.files.items())}}
        body["sha256_of_the_rest"] = _digest_of(body)
        with open(folder / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(body, file, indent=1, default=str)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest itself, not yet the files.

        Raises:
            CheckpointError: there is none, or it is torn or altered.
        """
        path = folder / MANIFEST
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: there is no {MANIFEST}, so this is not a checkpoint of qsr_engine, or not a whole one"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read, so the checkpoint is torn: {error}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise CheckpointError(f"{path}: the format is {found!r}, and this version reads {FORMAT}")
        said = body.pop("sha256_of_the_rest", None)
        if said != _digest_of(body):
            raise CheckpointError(f"{path}: it was altered after it was written (its own SHA-256 does not match)")
        del body["format"]
        wrong = [
            name
            for name, kind in {
                "tag": str,
                "step": int,
                "saved_at": float,
                "layout": dict,
                "config": dict,
                "ranks": list,
                "files": dict,
            }.items()
            if not isinstance(body.get(name), kind)
        ]
        if wrong:
            raise CheckpointError(f"{path}: missing or of a wrong type: {', '.join(wrong)}")
        try:
            files = {str(name): (int(size), str(digest)) for name, (size, digest) in body.pop("files").items()}
            return cls(**body, files=files)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{path}: unknown keys, or files of a wrong type: {error}") from None

    def check_sizes(self, folder: Path) -> None:
        """Raises CheckpointError, naming a file that is missing or of another size."""
        for name, (size, _) in self.files.items():
            found = _size(folder / name)
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, and {size} were written"
                raise CheckpointError(f"{folder}: {name} {what}, so the checkpoint is torn")

    def check_digests(self, folder: Path, names: Sequence[str]) -> None:
        """Raises CheckpointError, naming a file whose content is not what was written."""
        for name in names:
            if _sha256(folder / name) != self.files[name][1]:
                raise CheckpointError(f"{folder}: {name} was altered after it was written (SHA-256)")


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sha256(path: Path, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


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
) -> Path:
    """Write DIR/TAG. Every rank calls it with the same arguments; `write` writes this rank's files into a folder, in
    which `folders` exist already. It must not wait for other ranks, since one of them may have failed.

    An error of any rank is raised on every rank, and DIR/TAG is then as it was before.

    Returns:
        The folder.
    Raises:
        CheckpointError: a rank could not write; the message names it.
    """
    tags = gathered(tag)
    if len(set(tags)) > 1:
        raise CheckpointError(f"the ranks save under different tags, {sorted(set(tags))}; give all of them the same")
    if not tag or tag.startswith(".") or Path(tag).name != tag or tag == LATEST:
        raise CheckpointError(
            f"the tag is {tag!r}; write a name of a folder, without /, not beginning with a dot, and not {LATEST!r}"
        )
    directory = Path(directory)
    folder, temporary = directory / tag, directory / f".{tag}.tmp"
    together = Together(f"writing the checkpoint {folder}")
    here = _ranks_that_share(directory, together)
    rank, lead = dist.get_rank(), here[0] == dist.get_rank()

    with together.step():
        if lead:
            _remove_leftovers(directory)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name in folders:
                (temporary / name).mkdir(parents=True)
    together.agree()
    try:
        with together.step():
            write(temporary)
        together.agree()
        found: list[str] = []
        if lead:
            found = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
        listed = dict(zip(range(dist.get_world_size()), gathered(found), strict=True))[here[0]]
        digests: dict[str, tuple[int, str]] = {}
        with together.step():
            for name in listed[here.index(rank) :: len(here)]:
                path = temporary / name
                digests[name] = (path.stat().st_size, _sha256(path, sync=True))
        together.agree()
        everywhere = gathered(digests)
        saved_at = max(gathered(_now(directory)))
        with together.step():
            if lead:
                files = {name: value for number in here for name, value in everywhere[number].items()}
                Manifest(tag, step, saved_at, layout, config, here, files).write(temporary)
                for inner in (path for path in temporary.rglob("*") if path.is_dir()):
                    _sync(inner)
                _sync(temporary)
        together.agree()
    except CheckpointError:
        if lead:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with together.step():
        if lead:
            _put_in_place(temporary, folder)
    together.agree()
    if lead and latest:
        try:
            _write_atomically(directory / LATEST, tag)
        except OSError as error:
            warnings.warn(f"{directory / LATEST}: cannot be written ({error}); loading does not need it", stacklevel=2)
    return folder


def _remove_leftovers(directory: Path) -> None:
    """What saves that died have left: temporary folders with a worker's folder inside, and marks of ranks."""
    for path in directory.iterdir():
        if path.name.startswith(".") and path.name.endswith(".tmp") and any(path.glob("worker-*/")):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.[0-9a-f]{32}-\d+", path.name):
            path.unlink(missing_ok=True)


def _now(directory: Path) -> float:
    """The time, and later than that of every checkpoint here, also where this host's clock is behind."""
    found = [saved_at for saved_at, error in _view(directory, None).values() if error is None]
    return max([time.time(), *(saved_at + 1e-3 for saved_at in found)])


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Give the folder its name. One that has it already is whole until the new one is, under the name .TAG.old."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


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
    with together.step():
        directory.mkdir(parents=True, exist_ok=True)
        mine.touch()
    together.agree()
    here = [number for number, mark in enumerate(marks) if mark.exists()]
    together.agree()
    mine.unlink(missing_ok=True)
    together.agree()
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
    if tag is not None and all(gathered(not (directory / tag).exists() and (directory / f".{tag}.old").is_dir())):
        tag = f".{tag}.old"  # a save of this tag died after it had moved the one before aside
    views = gathered(_view(directory, [tag] if tag else None))
    names = {name for view in views for name in view}
    newest_first = sorted(names, key=lambda name: max(view[name][0] for view in views if name in view), reverse=True)
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
            manifest.check_sizes(folder)
        except CheckpointError as error:
            seen[tag] = seen[tag][0] if tag in seen else _changed_at(folder), str(error)
    return seen


def _changed_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _may_be_a_checkpoint(path: Path) -> bool:
    """A folder that a save has finished, or that was replaced by one that is not there (see _put_in_place)."""
    try:
        if not path.is_dir() or path.name.endswith(".tmp"):
            return False
        if path.name.startswith("."):
            return path.name.endswith(".old") and not (path.parent / path.name[1 : -len(".old")]).exists()
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
        manifest.check_sizes(path)
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
