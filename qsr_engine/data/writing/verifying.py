"""Check a folder of shards: sizes, checksums and every sample, and name all that is wrong.

One pass over each shard does it all.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from qsr_engine.data.checking import no_shard, wrong_size
from qsr_engine.data.errors import DataError
from qsr_engine.data.images import check_image
from qsr_engine.data.index import INDEX_NAME, Index, Shard, read_index
from qsr_engine.data.samples import find_image, find_label, listing, where
from qsr_engine.data.tar import Member, open_tar, read_members
from qsr_engine.data.writing.processes import check_wanted, run_jobs
from qsr_engine.data.writing.shard import MeasuredStream

MAX_PROBLEMS = 100  # named; of more, the number is said
BLOCK = 1 << 20  # bytes read at once


class Scan(NamedTuple):
    """What one shard holds: samples, bytes, SHA-256, and what is wrong, a line each."""

    samples: int
    bytes: int
    sha256: str
    problems: list[str]


class _ShardToCheck(NamedTuple):
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

        jobs = (_ShardToCheck(folder / shard.name, shard, index.class_count, decode) for shard in shards)
        run_jobs(_check_shard, jobs, max(1, min(processes, len(shards))), take)
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
        stream = MeasuredStream(file)
        try:
            with open_tar(stream, "r|") as tar:
                for key, members in groupby(read_members(tar), key=lambda member: member.key):
                    check_wanted()
                    place = where(path, key)
                    problems += _sample_problems(place, list(members), classes, decode)
                    if key in keys:
                        problems.append(f"{place}: this key occurs more than once; write this shard again")
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


def _check_shard(job: _ShardToCheck) -> _Checked:
    try:
        problems = _shard_problems(job)
    except OSError as error:
        problems = [no_shard(job.path, error)]
    return _Checked(job.shard, problems[:MAX_PROBLEMS], len(problems))


def _shard_problems(job: _ShardToCheck) -> list[str]:
    path, shard = job.path, job.shard
    scan = scan_shard(path, job.classes, decode=job.decode)
    problems = []
    if wrong := wrong_size(path, scan.bytes, shard):
        problems.append(wrong)
    elif scan.sha256 != shard.sha256:
        problems.append(f"{path}: its sha256 is not that of {INDEX_NAME}; copy or write this shard again")
    if scan.bytes == 0:
        return problems
    if scan.samples != shard.samples:
        problems.append(f"{path}: this shard holds {scan.samples} samples, and {INDEX_NAME} says {shard.samples}")
    return problems + scan.problems


def _sample_problems(place: str, members: list[Member], classes: int | None, decode: bool) -> Iterator[str]:
    content = {member.suffix: member.data for member in members}

    def check_content() -> None:
        image = find_image(place, content)
        if not image:
            raise DataError(f"{place} has an image of 0 bytes")
        if decode:
            check_image(image, place)

    def check_label() -> None:
        find_label(place, content, classes)

    if len(content) < len(members):
        yield f"{place} has two members of one name; its members are: {listing(m.suffix for m in members)}"
    checks: list[Callable[[], None]] = [check_content, check_label]
    for check in checks:
        try:
            check()
        except DataError as error:
            yield str(error)
