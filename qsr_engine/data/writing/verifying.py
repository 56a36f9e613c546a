"""Check a folder of shards: sizes, checksums and every sample, and name all that is wrong.

One pass over each shard does it all. Members are grouped into samples as webdataset groups them, without webdataset.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from qsr_engine.data.images import IMAGE_SUFFIXES, check_image
from qsr_engine.data.index import INDEX_NAME, DataError, Index, Shard, read_index
from qsr_engine.data.tar_members import check_member, open_tar
from qsr_engine.data.writing.processes import check_wanted, run_jobs

MAX_PROBLEMS = 100  # named; of more, the number is said
BLOCK = 1 << 20  # bytes read at once


class Scan(NamedTuple):
    """What one shard holds: samples, bytes, SHA-256, and what is wrong, a line each."""

    samples: int
    bytes: int
    sha256: str
    problems: list[str]


class Member(NamedTuple):
    """A file in a shard, named KEY.SUFFIX."""

    key: str
    suffix: str
    data: bytes


class _Job(NamedTuple):
    path: Path
    shard: Shard
    classes: int | None
    decode: bool


class _Checked(NamedTuple):
    shard: Shard
    problems: list[str]  # at most MAX_PROBLEMS
    total: int  # how many there are


def verify_shards(folder: str | Path, *, decode: bool = False, processes: int = 1) -> Index:
    """Read every shard of every split and compare it with the index: size, SHA-256, number of samples.

    Every sample must have a key of its own in its shard, an image, and a label that the classes have. Tar files that
    the index does not list are wrong too. Leftovers of other names are not looked at.

    Args:
        decode: decode every image as well.
        processes: number of processes that read.
    Returns:
        the index, when all is well.
    Raises:
        DataError: the index cannot be used, or the problems, a line each; of more than 100, the first 100.
    """
    folder = Path(folder)
    index = read_index(folder)
    shards = [shard for split in index.splits.values() for shard in split.shards]
    found: dict[str, _Checked] = {}
    with tqdm(desc="reading", total=sum(s.bytes for s in shards), unit="B", unit_scale=True, disable=None) as bar:

        def take(checked: _Checked) -> None:
            found[checked.shard.name] = checked
            bar.update(checked.shard.bytes)

        jobs = (_Job(folder / shard.name, shard, index.class_count, decode) for shard in shards)
        run_jobs(_verify_job, jobs, max(1, min(processes, len(shards))), take)
    problems = [problem for shard in shards for problem in found[shard.name].problems]
    more = sum(checked.total - len(checked.problems) for checked in found.values())
    listed = {shard.name for shard in shards}
    others = sorted(path for path in folder.glob("*.tar") if path.name not in listed)
    problems += [f"{path}: {INDEX_NAME} does not list this shard, and nothing reads it; delete it" for path in others]
    if problems:
        more += len(problems[MAX_PROBLEMS:])
        raise DataError("\n".join(problems[:MAX_PROBLEMS] + ([f"and {more} more"] if more else [])))
    return index


def scan_shard(path: Path, classes: int | None, *, decode: bool = False) -> Scan:
    """Read one shard whole, and find what is wrong with its samples.

    Args:
        classes: number of classes, or None where it is not known.
    Raises:
        OSError: it cannot be read.
    """
    samples = 0
    problems: list[str] = []
    keys: set[str] = set()
    with open(path, "rb") as file:
        stream = _Measured(file)
        try:
            # Names need not be UTF-8; the reader of shards decodes them so too.
            with open_tar(stream, "r|") as tar:
                for key, members in groupby(_members(tar), key=lambda member: member.key):
                    check_wanted()
                    where = f"{path}: sample {key!r}"
                    problems += _sample_problems(where, list(members), classes, decode)
                    if key in keys:
                        problems.append(f"{where}: this key occurs more than once; write this shard again")
                    keys.add(key)
                    samples += 1
                end = tar.offset
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes broken headers for the end
                raise tarfile.ReadError("no mark of the end after its last member")
        except (tarfile.TarError, EOFError, ValueError) as error:
            reason = f"it is truncated or not a tar file ({error}); copy or write it again"
            problems.append(f"{path}: this shard cannot be read past sample {samples}: {reason}")
        file.seek(stream.bytes)
        while stream.read(BLOCK):
            pass
    return Scan(samples, stream.bytes, stream.sha256.hexdigest(), problems)


def _verify_job(job: _Job) -> _Checked:
    try:
        problems = _shard_problems(job)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
        problems = [f"{job.path}: this shard {reason}; copy or write it again"]
    return _Checked(job.shard, problems[:MAX_PROBLEMS], len(problems))


def _shard_problems(job: _Job) -> list[str]:
    path, shard = job.path, job.shard
    scan = scan_shard(path, job.classes, decode=job.decode)
    problems = []
    if scan.bytes != shard.bytes:
        what = "empty" if scan.bytes == 0 else "truncated" if scan.bytes < shard.bytes else "too long"
        problems.append(
            f"{path}: this shard is {what}: it has {scan.bytes} bytes, and {INDEX_NAME} says {shard.bytes}; "
            "copy or write it again"
        )
    elif scan.sha256 != shard.sha256:
        problems.append(f"{path}: its sha256 is not that of {INDEX_NAME}; copy or write this shard again")
    if scan.bytes == 0:
        return problems
    if scan.samples != shard.samples:
        problems.append(f"{path}: this shard holds {scan.samples} samples, and {INDEX_NAME} says {shard.samples}")
    return problems + scan.problems


def _members(tar: tarfile.TarFile) -> Iterator[Member]:
    """The files that belong to samples, in their order."""
    for member in tar:
        check_member(member)
        # The key ends at the first dot of the name; names such as __meta__ are for remarks.
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
        if member.isreg() and match and not re.match(r"__[^/]*__($|/)", member.name):
            content = tar.extractfile(member)
            yield Member(match[1], match[2].lower(), content.read() if content else b"")
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them otherwise


def _sample_problems(where: str, members: list[Member], classes: int | None, decode: bool) -> Iterator[str]:
    content = {member.suffix: member.data for member in members}
    names = _listing(content)
    if len(content) < len(members):
        yield f"{where} has two members of one name; its members are: {_listing(m.suffix for m in members)}"
    image = next((content[suffix] for suffix in IMAGE_SUFFIXES if suffix in content), None)
    if image is None:
        yield f"{where} has no image (.jpg, .jpeg or .png); its members are: {names}"
    elif not image:
        yield f"{where} has an image of 0 bytes"
    elif decode:
        try:
            check_image(image, where)
        except DataError as error:
            yield str(error)
    if "cls" not in content:
        yield f"{where} has no label (.cls); its members are: {names}"
        return
    text = content["cls"].strip()
    if not (text.isdigit() and len(text) < 10):
        yield f"{where} has the label {text[:20]!r}; a label is a whole number from 0, in decimal digits"
    elif classes is not None and int(text) >= classes:
        yield f"{where} has the label {int(text)}, and there are {classes} classes (0 to {classes - 1})"


def _listing(suffixes: Iterable[str]) -> str:
    return ", ".join(suffix if suffix.isprintable() else repr(suffix) for suffix in suffixes)


class _Measured(io.RawIOBase):
    """Counts and hashes what is read through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self.stream = stream
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.bytes += len(data)
        self.sha256.update(data)
        return data
