"""What a checkpoint says of itself: every file of it with its size and SHA-256, and the layout of the run.

A checkpoint may come from somebody else, so nothing in it is believed before it is checked: a manifest of any bytes is
read or refused, and the files that it names lie inside its own folder. That the bytes of the files run no code is the
affair of those who load them (engines/). Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
FORMAT = 1

_MOST_BYTES = 2**28  # of a manifest; a rank takes some 300, so this is enough for 800,000 of them
_DEEPEST = 64  # blocks inside one another; what reads them further on is recursive
_COUNTS = range(2**63)  # sizes and steps


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
    inside_round: every worker had parameters of its own; model.safetensors is their average at this step.
    """

    tag: str
    step: int
    saved_at: float
    layout: dict[str, Any]
    config: dict[str, Any]
    ranks: list[int]
    files: dict[str, tuple[int, str]]
    inside_round: bool = False

    def write(self, folder: Path) -> None:
        """Raises CheckpointError where read() would refuse it, as with a configuration of very many blocks."""
        body = plain({**self.__dict__, "format": FORMAT, "files": dict(sorted(self.files.items()))})
        body["sha256_of_the_rest"] = digest_of(body)
        content = json.dumps(body, indent=1).encode()
        self.parse(content)
        with open(folder / MANIFEST, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest itself, not yet the files.

        Raises:
            CheckpointError: there is none, or it is torn or altered, or nothing that write() could have written.
        """
        path = folder / MANIFEST
        try:
            return cls.parse(_read(path))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: there is no {MANIFEST}, so this is not a checkpoint of qsr_engine, or not a whole one"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read, so the checkpoint is torn: {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """The manifest in the bytes of a file, whatever they are. Raises CheckpointError."""
        try:
            body = json.loads(content.decode(), parse_constant=_refuse, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot be read, so the checkpoint is torn: {error}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise CheckpointError(f"the format is {found!r:.60}, and this version reads {FORMAT}")
        if _deeper_than(body, _DEEPEST):
            raise CheckpointError(f"more than {_DEEPEST} blocks are inside one another, and no checkpoint has so many")
        said = body.pop("sha256_of_the_rest", None)
        if said != digest_of(body):
            raise CheckpointError("it was altered after it was written (its own SHA-256 does not match)")
        del body["format"]
        unknown, wrong = sorted(set(body) - set(_KINDS)), [name for name in _KINDS if not _is_right(name, body)]
        if unknown:
            raise CheckpointError(f"unknown keys: {unknown!r:.200}")
        if wrong:
            raise CheckpointError(f"missing or of a wrong type: {', '.join(wrong)}")
        return cls(**{**body, "files": {name: _checked(name, entry) for name, entry in body["files"].items()}})

    def check_files(self, folder: Path) -> None:
        """Raises CheckpointError, naming a file that is missing, of another size or no plain file, or any link."""
        for inside, folders, files in os.walk(folder):
            for name in (*folders, *files):
                if (Path(inside) / name).is_symlink():
                    raise CheckpointError(
                        f"{folder}: {(Path(inside) / name).relative_to(folder)} is a symbolic link, and a checkpoint "
                        "holds its files itself; put the file there in its place"
                    )
        for name, (size, _) in self.files.items():
            found = _size(folder / name)
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, and {size} were written"
                raise CheckpointError(f"{folder}: {name} {what}, so the checkpoint is torn")

    def check_digests(self, folder: Path, names: Sequence[str]) -> None:
        """Raises CheckpointError, naming a file whose content is not what was written."""
        for name in names:
            if sha256(folder / name) != self.files[name][1]:
                raise CheckpointError(f"{folder}: {name} was altered after it was written (SHA-256)")


_KINDS: dict[str, Any] = {
    "tag": str,
    "step": int,
    "saved_at": float,
    "layout": dict,
    "config": dict,
    "ranks": list,
    "files": dict,
    "inside_round": bool,
}


def _is_right(name: str, body: Mapping[str, Any]) -> bool:
    value: Any = body.get(name, False if name == "inside_round" else None)  # an older checkpoint does not say it
    if type(value) is not _KINDS[name]:
        return False
    if name == "step":
        return value in _COUNTS
    return name != "ranks" or all(type(rank) is int and rank in _COUNTS for rank in value)


def _checked(name: str, entry: Any) -> tuple[int, str]:
    """Size and digest of a file, whose name must be that of a file inside the folder. Raises CheckpointError."""
    if any(part in ("", ".", "..") for part in name.split("/")) or not name.isprintable() or "\\" in name:
        raise CheckpointError(f"{name!r:.200} is no name of a file inside the checkpoint, so nothing of it is read")
    match entry:
        case [int(size), str(digest)] if type(size) is int and size in _COUNTS and re.fullmatch("[0-9a-f]{64}", digest):
            return size, digest
    raise CheckpointError(f"for the file {name!r:.200} it has no size and SHA-256")


def _read(path: Path) -> bytes:
    """A pipe would keep the reader waiting, and a device fill its memory."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("it is no plain file")
    if found.st_size > _MOST_BYTES:
        raise CheckpointError(f"it has {found.st_size} bytes, and no manifest has more than {_MOST_BYTES}")
    return path.read_bytes()


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(f"{text:.60}")


def _deeper_than(value: Any, depth: int) -> bool:
    level: list[Any] = [value]
    for _ in range(depth + 1):
        blocks: list[Any] = [block for block in level if isinstance(block, dict | list)]
        level = [inner for block in blocks for inner in (block if isinstance(block, list) else block.values())]
    return any(isinstance(block, dict | list) for block in level)


def plain(body: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back out of JSON; a number that is not finite, and what JSON has no word for, becomes a string."""
    result: dict[str, Any] = json.loads(json.dumps(body, default=str), parse_constant=str)
    return result


def digest_of(body: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's other entries."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int | None:
    """None where no plain file is."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def sha256(path: Path, *, sync: bool = False) -> str:
    """SHA-256 of a file in hex; with `sync` its bytes are on the disk when this returns."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
