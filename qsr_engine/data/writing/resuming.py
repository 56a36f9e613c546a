"""Write a planned set of shards in several processes, and go on where a killed command has stopped.

Which samples a shard holds follows from the plan alone, so each process writes whole shards, and the bytes are the
same for any number of processes. While a folder is written it has no index.json, but a record: the plan's digest and
options in the first line, then a line for each finished shard. The index takes the place of the record at the end.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import ValidationError
from tqdm import tqdm

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import INDEX_NAME, TABLE_NAME, TOKENS, Index, Shard, Split, TextData
from qsr_engine.data.writing.folder import refuse_data_set, replacing, write_index
from qsr_engine.data.writing.processes import check_wanted, run_jobs
from qsr_engine.data.writing.scanning import scan_shard
from qsr_engine.data.writing.shard import Written, sample_bytes, write_shard

Item = TypeVar("Item")

RECORD_NAME = ".writing.jsonl"
RECORD_FORMAT = 1


class ShardSize(NamedTuple):
    """Where a shard ends: before it has more than so many bytes, or at so many samples; one of them is None."""

    bytes: int | None
    samples: int | None

    def cut(self, sizes: Sequence[int]) -> Iterator[range]:
        """The numbers of the samples of each shard, for images of these sizes in bytes."""
        first = total = 0
        for number, size in enumerate(sizes):
            size = sample_bytes(size)
            over = number - first >= self.samples if self.samples else total + size > (self.bytes or 0)
            if over and number > first:
                yield range(first, number)
                first, total = number, 0
            total += size
        if sizes:
            yield range(first, len(sizes))


@dataclass(frozen=True)
class ShardPlan(Generic[Item]):
    """What is written: the samples of each split in their order, and how one of them is read.

    `sizes` has the bytes of the images, by split, as they are planned; `load` gives an image's suffix, its bytes and
    its label, None for a block of tokens, and raises DataError. `identity` has everything that the bytes of the shards
    depend on.
    """

    classes: list[str] | None
    splits: Mapping[str, Sequence[Item]]
    sizes: Mapping[str, Sequence[int]]
    load: Callable[[Item], tuple[str, bytes, int | None]]
    shard_size: ShardSize
    identity: Mapping[str, int | str | None]
    text: TextData | None = None

    def shards(self) -> dict[str, list[tuple[str, range]]]:
        """(name, numbers of its samples) of the shards of each split."""
        return {
            split: [(f"{split}-{shard:06d}.tar", part) for shard, part in enumerate(self.shard_size.cut(sizes))]
            for split, sizes in self.sizes.items()
        }


@dataclass(frozen=True)
class _ShardToWrite(Generic[Item]):
    path: Path
    first: int  # number of its first sample in the split
    items: Sequence[Item]
    load: Callable[[Item], tuple[str, bytes, int | None]]
    recorded: Shard | None  # where this shard was finished before
    rule: str  # where its labels are


def write_planned(out: Path, plan: ShardPlan[Item], processes: int) -> Index:
    """Write the shards of a plan that are not there yet, then the index.

    Raises:
        DataError: the folder holds a data set, or the beginning of another one; another process writes there; a file
            cannot be written; or as plan.load raises.
    """
    refuse_data_set(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: this folder cannot be made: {error.strerror}; choose another one") from error
    shards = plan.shards()
    names = [name for parts in shards.values() for name, _ in parts]
    with _only_writer(out):
        record = _Record(out, plan.identity)
        _refuse_others(out, set(names) if record.begun else set())
        try:
            _delete_temporary(out, names)
            record.begin()
            finished, rows = _write_missing(out, plan, shards, record, processes)
            splits = {
                split: Split(samples=len(plan.splits[split]), shards=[finished[name] for name, _ in parts])
                for split, parts in shards.items()
            }
            with _cannot_be_written(out / INDEX_NAME):
                made = Index(classes=plan.classes, splits=splits, text=plan.text)
                index = write_index(out, made, (rows[name] for name in names))
        except BaseException:
            _delete_temporary(out, names)  # of processes that were killed
            if not record.finished:
                record.delete()
            raise
        record.delete()
    return index


def _write_missing(
    out: Path, plan: ShardPlan[Item], shards: dict[str, list[tuple[str, range]]], record: _Record, processes: int
) -> tuple[dict[str, Shard], dict[str, bytes]]:
    """Write, or find whole, every shard. Returns them by name, and the packed rows of their samples."""
    finished: dict[str, Shard] = {}
    rows: dict[str, bytes] = {}
    jobs = (
        _ShardToWrite(
            out / name,
            part.start,
            plan.splits[split][part.start : part.stop],
            plan.load,
            record.finished.get(name),
            "cls" if plan.text is None else TOKENS,
        )
        for split, parts in shards.items()
        for name, part in parts
    )
    total = sum(len(items) for items in plan.splits.values())
    with tqdm(desc="writing", total=total, unit="image" if plan.text is None else "block", disable=None) as bar:

        def take(written: Written) -> None:
            shard, rows[written.shard.name] = written
            finished[shard.name] = shard
            record.add(shard)
            bar.update(shard.samples)

        run_jobs(_finish_shard, jobs, min(processes, sum(len(parts) for parts in shards.values())), take)
    return finished, rows


def _finish_shard(job: _ShardToWrite[Any]) -> Written:
    if job.recorded is not None:
        with suppress(OSError):
            scan = scan_shard(job.path, None, rule=job.rule)
            if (scan.bytes, scan.sha256) == (job.recorded.bytes, job.recorded.sha256):
                return Written(job.recorded, scan.rows)
    with _cannot_be_written(job.path):
        return write_shard(job.path, _samples(job))


def _samples(job: _ShardToWrite[Any]) -> Iterator[tuple[str, str, bytes, int | None]]:
    for number, item in enumerate(job.items, job.first):
        check_wanted()
        yield f"{number:08d}", *job.load(item)


class _Record:
    """The file that says which plan a folder is written by, and which of its shards are finished."""

    def __init__(self, out: Path, identity: Mapping[str, int | str | None]) -> None:
        """Raises DataError where shards of another plan are finished here."""
        self.path = out / RECORD_NAME
        self.head = {"format": RECORD_FORMAT, **identity}
        self.finished: dict[str, Shard] = {}
        self.begun = False
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path}: this record cannot be read: {error}; delete {out} and begin again"
            ) from error
        self.begun = True
        for line in lines[1:]:
            try:
                shard = Shard.model_validate_json(line)
            except ValidationError:  # a kill tore the last line; its shard is written again
                continue
            self.finished[shard.name] = shard
        differences = _differences(lines[0] if lines else "", self.head)
        if differences and self.finished:
            raise DataError(
                f"{out} holds {len(self.finished)} finished shards of another data set: {'; '.join(differences)}. "
                f"Write what the first command wrote, choose another folder, or delete {out}"
            )

    def begin(self) -> None:
        """Write the record anew, without lines that were torn."""
        lines = [json.dumps(self.head), *(shard.model_dump_json() for shard in self.finished.values())]
        with _cannot_be_written(self.path), replacing(self.path) as stream:
            stream.write("".join(line + "\n" for line in lines).encode())

    def add(self, shard: Shard) -> None:
        if self.finished.get(shard.name) == shard:
            return
        with _cannot_be_written(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(shard.model_dump_json() + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.finished[shard.name] = shard

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


def _differences(line: str, head: Mapping[str, int | str | None]) -> list[str]:
    try:
        before = json.loads(line)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        return [f"the first line of {RECORD_NAME} is not a record's"]
    found = []
    for key in sorted({*before, *head}):
        if before.get(key) == head.get(key):
            continue
        if key == "images":
            found.append("the images had other names, sizes, labels or times of modification")
        elif key == "documents":
            found.append("the documents had other names or contents")
        else:
            found.append(f"{key} was {before.get(key)!r} and is {head.get(key)!r} now")
    return found


def _refuse_others(out: Path, own: set[str]) -> None:
    """Raises DataError where the folder holds shards that this command would write over, or leave beside its own."""
    others = sorted(path.name for path in out.glob("*.tar") if path.name not in own)
    if others:
        raise DataError(
            f"{out} holds tar files that this command has not begun ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); choose another folder, or delete them"
        )


def _delete_temporary(out: Path, shards: Sequence[str]) -> None:
    own = {*shards, INDEX_NAME, TABLE_NAME, RECORD_NAME}
    for path in out.glob(".*.tmp"):
        match = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)  # as replacing() names them
        if match and match[1] in own:
            path.unlink(missing_ok=True)


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Raises DataError where another process writes in this folder. Some network file systems have no such locks."""
    try:
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{out}: this folder cannot be read: {error.strerror}; name another one") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise DataError(f"{out}: another process writes in this folder; wait for it, or end it") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(folder)


@contextmanager
def _cannot_be_written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        mend = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend that"
        raise DataError(
            f"{path}: this cannot be written: {error.strerror or error}; {mend} and run the same command again, "
            "which keeps the shards that are finished"
        ) from error
