"""Read one shard whole: what it holds, where its samples lie, what is wrong with them, and what nothing reads."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import IO, NamedTuple

from qsr_engine.data.errors import DataError
from qsr_engine.data.images import check_image
from qsr_engine.data.index import TOKENS
from qsr_engine.data.rows import PACKED, Row, pack
from qsr_engine.data.samples import find_image, find_label, image_suffix_of, listing, where
from qsr_engine.data.tar import Member, RefusedError, Uncompressed, open_tar, read_members
from qsr_engine.data.writing.counted import Passed, PassedOver
from qsr_engine.data.writing.processes import check_wanted
from qsr_engine.data.writing.shard import MeasuredStream

Packed = bytes  # rows one after another; NamedTuple has a field `bytes`
BLOCK = 1 << 20  # bytes read at once


class Scan(NamedTuple):
    """What one shard holds: samples, bytes, SHA-256, what is wrong (a line each), packed rows, what nothing reads.

    Where something is wrong with a sample, it has no row.
    """

    samples: int
    bytes: int
    sha256: str
    problems: list[str]
    rows: Packed
    passed_over: list[PassedOver]


def scan_shard(path: Path, classes: int | None, *, decode: bool = False, rule: str = "cls") -> Scan:
    """Read one shard of a folder, as scan_stream(). Raises OSError: it cannot be read."""
    with open(path, "rb") as stream:
        return scan_stream(str(path), stream, classes, decode=decode, rule=rule)


def scan_stream(name: str, file: IO[bytes], classes: int | None, *, decode: bool = False, rule: str = "cls") -> Scan:
    """Read one shard whole, and find what is wrong with its samples.

    Args:
        name: what messages call it.
        file: its bytes, read from the beginning to the end.
        classes: number of classes, or None where it is not known.
        decode: decode every image as well.
        rule: where the label of a sample is, as the index says.
    Raises:
        OSError: it cannot be read; or as the stream raises.
    """
    samples = 0
    problems: list[str] = []
    rows: list[bytes] = []
    keys: set[str] = set()
    passed = Passed()
    stream = MeasuredStream(file)
    try:
        with open_tar(Uncompressed(stream), "r|") as tar:
            for key, group in groupby(read_members(tar, passed.add), key=lambda member: member.key):
                check_wanted()
                place, members = where(name, key), list(group)
                found, row = _examined(place, members, classes, decode, rule)
                problems += found
                rows += row
                _count_others(passed, members, rule)
                if key in keys:
                    problems.append(f"{place}: this key occurs more than once; write this shard again")
                keys.add(key)
                samples += 1
            end = tar.offset
        problems += _behind(name, end, stream)
    except (tarfile.TarError, EOFError, ValueError) as error:
        reason = f"it is truncated or not a tar file ({error}); copy or write it again"
        reason = str(error) if isinstance(error, RefusedError) else reason
        problems.append(f"{name}: this shard cannot be read past sample {samples}: {reason}")
    while stream.read(BLOCK):
        pass
    return Scan(samples, stream.bytes, stream.sha256.hexdigest(), problems, b"".join(rows), passed.found())


def equal_neighbours(rows: bytes) -> tuple[int, Counter[int]]:
    """Of packed rows of one shard: how many have the label of the one before, and how many have each label."""
    labels = [Row(*row).label for row in PACKED.iter_unpack(rows)]
    return sum(one == two for one, two in pairwise(labels)), Counter(labels)


def _behind(name: str, end: int, stream: MeasuredStream) -> Iterator[str]:
    """What is wrong behind the last member: there is a mark of the end, blocks of zeros, and nothing else."""
    data = stream.tail[len(stream.tail) - (stream.bytes - end) :] if stream.bytes > end else b""
    if len(data) < tarfile.BLOCKSIZE or any(data[: tarfile.BLOCKSIZE]):  # tarfile takes broken headers for the end
        raise tarfile.ReadError("no mark of the end after its last member")
    at = end
    while data:
        if data.count(0) < len(data):
            at += len(data) - len(data.lstrip(b"\0"))
            yield (
                f"{name}: this shard goes on behind its mark of the end, at byte {at}: nobody reads what is there. Two "
                "tar files that `cat` has joined are so; keep them as two, or join them with `tar --concatenate`"
            )
            return
        at += len(data)
        data = stream.read(BLOCK)


def _count_others(passed: Passed, members: Sequence[Member], rule: str) -> None:
    """Count the members of a sample that are neither its image nor its label."""
    read = {image_suffix_of((member.suffix for member in members), rule), rule.partition(":")[0]}
    for member in members:
        if member.suffix not in read:
            passed.add(f".{member.suffix}", f"{member.key}.{member.suffix}")


def _examined(
    place: str, members: Sequence[Member], classes: int | None, decode: bool, rule: str
) -> tuple[list[str], list[bytes]]:
    """What is wrong with a sample, a line each; and its packed row, where nothing is."""
    content = {member.suffix: member.data for member in members}
    label = 0

    def check_content() -> None:
        image = find_image(place, content, rule)
        if not image:
            raise DataError(f"{place} has {'a block' if rule == TOKENS else 'an image'} of 0 bytes")
        if decode and rule != TOKENS:
            check_image(image, place)

    def check_label() -> None:
        nonlocal label
        label = find_label(place, content, classes, rule)

    problems = []
    if len(content) < len(members):
        names = listing(member.suffix for member in members)
        problems.append(f"{place} has two members of one name; its members are: {names}")
    checks: list[Callable[[], None]] = [check_content, check_label]
    for check in checks:
        try:
            check()
        except DataError as error:
            problems.append(str(error))
    if problems:
        return problems, []
    suffix = image_suffix_of(content, rule)
    image = next(member for member in members if member.suffix == suffix)
    return [], [pack(image.offset, image.data, label, image.header)]
