"""Check a folder of shards: sizes, checksums and every sample, and name all that is wrong.

One pass over each shard does it all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from qsr_engine.data.checking import no_shard, wrong_size
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import INDEX_NAME, TABLE_NAME, Index, Shard, read_index
from qsr_engine.data.places import is_url
from qsr_engine.data.writing.counted import PassedOver, say_passed_over
from qsr_engine.data.writing.processes import run_jobs
from qsr_engine.data.writing.scanning import Scan, scan_shard

MAX_PROBLEMS = 100  # named; of more, the number is said


class _ShardToCheck(NamedTuple):
    path: Path
    shard: Shard
    classes: int | None
    decode: bool
    rule: str
    rows: bytes | None  # what the table says of it


class _Checked(NamedTuple):
    shard: Shard
    problems: list[str]  # at most MAX_PROBLEMS
    total: int  # how many there are
    passed_over: list[PassedOver]


def verify_shards(
    folder: str | Path, *, decode: bool = False, processes: int = 1, say: Callable[[str], object] = print
) -> Index:
    """Read every shard of every split and compare it with the index: size, SHA-256, samples and their places.

    Every sample must have a key of its own in its shard, an image, and a label that the classes have. Tar files that
    the index does not list are wrong too. Leftovers of other names are not looked at.

    Args:
        decode: decode every image as well.
        processes: number of processes that read.
        say: told what the shards hold that nothing reads, a line each.
    Returns:
        the index, when all is well.
    Raises:
        DataError: the index cannot be used, or the problems, a line each; of more than 100, the first 100.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index.place is not None and is_url(index.place):
        raise DataError(f"{folder}: its shards are at {index.place}, and folders are verified; copy them here first")
    places, rows = Path(index.place or folder), _rows_of(folder, index)
    shards = [shard for split in index.splits.values() for shard in split.shards]
    found: dict[str, _Checked] = {}
    with tqdm(desc="reading", total=sum(s.bytes for s in shards), unit="B", unit_scale=True, disable=None) as bar:

        def take(checked: _Checked) -> None:
            found[checked.shard.name] = checked
            bar.update(checked.shard.bytes)

        jobs = (
            _ShardToCheck(places / s.name, s, index.class_count, decode, index.rule, rows and rows(s)) for s in shards
        )
        run_jobs(_check_shard, jobs, max(1, min(processes, len(shards))), take)
    problems = [problem for shard in shards for problem in found[shard.name].problems]
    more = sum(checked.total - len(checked.problems) for checked in found.values())
    listed = {shard.name for shard in shards}
    others = sorted(path for path in places.rglob("*.tar") if path.relative_to(places).as_posix() not in listed)
    problems += [f"{path}: {INDEX_NAME} does not list this shard, and nothing reads it; delete it" for path in others]
    say_passed_over([(shard.name, found[shard.name].passed_over) for shard in shards], say)
    raise_problems(problems, more)
    return index


def _rows_of(folder: Path, index: Index) -> Callable[[Shard], bytes] | None:
    """The packed rows that the table has of a shard; None where the index has no table."""
    if index.table is None:
        return None
    from qsr_engine.data.table import open_table  # numpy, which not every command needs

    table = open_table(folder / TABLE_NAME, index)
    return lambda shard: table.part(shard.name, shard.samples).tobytes()


def raise_problems(problems: Sequence[str], more: int = 0) -> None:
    """Raises DataError where there are some: the first 100, a line each, and how many more there are."""
    if problems:
        more += len(problems[MAX_PROBLEMS:])
        raise DataError("\n".join([*problems[:MAX_PROBLEMS], *([f"and {more} more"] if more else [])]))


def _check_shard(job: _ShardToCheck) -> _Checked:
    try:
        scan = scan_shard(job.path, job.classes, decode=job.decode, rule=job.rule)
    except OSError as error:
        return _Checked(job.shard, [no_shard(job.path, error)], 1, [])
    problems = _shard_problems(job, scan)
    return _Checked(job.shard, problems[:MAX_PROBLEMS], len(problems), scan.passed_over)


def _shard_problems(job: _ShardToCheck, scan: Scan) -> list[str]:
    path, shard = job.path, job.shard
    problems = []
    if wrong := wrong_size(path, scan.bytes, shard):
        problems.append(wrong)
    elif scan.sha256 != shard.sha256:
        problems.append(f"{path}: its sha256 is not that of {INDEX_NAME}; copy or write this shard again")
    elif job.rows is not None and scan.rows != job.rows and not scan.problems:
        problems.append(
            f"{path}: {TABLE_NAME} has other places, sizes or labels; `qsr shards index DIR --again` makes it"
        )
    if scan.bytes == 0:
        return problems
    if scan.samples != shard.samples:
        problems.append(f"{path}: this shard holds {scan.samples} samples, and {INDEX_NAME} says {shard.samples}")
    return problems + scan.problems
