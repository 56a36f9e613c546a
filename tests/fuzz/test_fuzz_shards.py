"""Foreign bytes as shard and as index: samples or a DataError, and nothing else; little memory, and nothing written.

More examples: QSR_FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz (they are others each time then).
"""

from __future__ import annotations

import os
import re
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import read_index
from qsr_engine.data.rows import PACKED, Row
from qsr_engine.data.tar_shard import TarShard
from qsr_engine.data.writing.scanning import Scan, scan_shard
from tests.fuzz.make_seeds import CORPUS
from tests.support.shard_files import with_field

EXAMPLES = int(os.environ.get("QSR_FUZZ_EXAMPLES", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SHARDS = {path.name: path.read_bytes() for path in sorted((CORPUS / "shards").iterdir())}
INDICES = {path.name: path.read_bytes() for path in sorted((CORPUS / "index").iterdir())}
SECONDS = 20  # for one example, which takes some milliseconds on an idle machine
# Of Python: a tar file is read in blocks of 10 KiB, its headers become objects of 2 KB each, and hypothesis and the
# error that is made take their share. The seeds have 20 KB at most.
MEMORY = 4 << 20
FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}
NUMBERS = st.one_of(
    st.integers(0, 8**11 - 1).map(lambda number: b"%011o\0" % number),
    st.integers(-(2**80), 2**80).map(lambda number: b"\x80" + number.to_bytes(11, "big", signed=True)),
    st.binary(min_size=12, max_size=12),
)


@st.composite
def mutated(draw: st.DrawFn, seeds: dict[str, bytes]) -> bytes:
    """A seed with some bytes changed, cut, doubled, or replaced by those of another."""
    data = draw(st.sampled_from(list(seeds.values())))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "overwrite", "double", "splice", "delete"]))
        some = draw(st.integers(1, 1100))
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))] if data else []) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "overwrite":
            new = draw(st.binary(max_size=16))
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "double":
            data = data[: at + some] + data[at:]
        elif kind == "splice":
            data = data[:at] + draw(st.sampled_from(list(seeds.values())))[at:]
        else:
            data = data[:at] + data[at + some :]
    return data


@st.composite
def with_headers(draw: st.DrawFn) -> bytes:
    """A mutated shard, of which some headers have other fields and a right checksum, so that they are believed."""
    data = draw(mutated(SHARDS))
    for _ in range(draw(st.integers(0, 3))):
        if len(data) < 512:
            break
        header = 512 * draw(st.integers(0, len(data) // 512 - 1))
        name, (at, length) = draw(st.sampled_from(list(FIELDS.items())))
        if name == "size":
            value = draw(NUMBERS)
        elif name == "type":
            value = draw(
                st.sampled_from([b"0", b"\0", b"1", b"2", b"3", b"5", b"7", b"S", b"L", b"K", b"x", b"g", b"X"])
            )
        else:
            value = draw(st.binary(max_size=length))
        data = with_field(data, header, at, value)
    return data


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Fails where the block takes too long or too much memory, or changes what is in a folder, the current one."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    started = time.monotonic()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < SECONDS
    assert peak < MEMORY
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def read_at_place(path: Path, row: Row) -> bool:
    """Whether there is an image of a row; every exception but a DataError that names the shard escapes."""
    try:
        _, image = TarShard(path).read(0, row)
    except DataError as error:
        if not str(error).startswith(str(path)):
            raise
        return False
    return len(image) == row.length


def check_shard(data: bytes, folder: Path) -> tuple[Scan, int]:
    """What the scan finds, and how many of its rows are read at their places."""
    path = folder / "s.tar"
    path.write_bytes(data)
    read = 0
    with bounded(folder):
        scan = scan_shard(path, 4)
        for row in PACKED.iter_unpack(scan.rows):
            read += read_at_place(path, Row(*row))
    assert all(text.startswith(str(path)) for text in scan.problems)
    return scan, read


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("seed", "samples", "reason"),
    [
        ("good.tar", 3, ""),
        ("truncated.tar", 1, "truncated"),
        ("links.tar", 3, ""),
        ("pax.tar", 1, ""),
        ("pax_sparse.tar", 0, "is a sparse file"),
        ("long_names.tar", 3, ""),
        ("twice.tar", 2, "'a': this key occurs more than once"),
        ("huge.tar", 0, "truncated|the limit is 1073741824"),
        ("huge_binary.tar", 0, "truncated|the limit is 1073741824"),
        ("negative.tar", 0, "truncated|the limit is 1073741824"),
        ("sparse.tar", 0, "is a sparse file"),
        ("huge_pax.tar", 0, "has 134217728 bytes; the limit is 16384"),
        ("compressed.tar", 0, "it is compressed; decompress it"),
        ("empty.tar", 0, ""),
    ],
)
def test_every_seed_is_scanned_and_its_rows_are_read(seed: str, samples: int, reason: str, folder: Path) -> None:
    scan, read = check_shard(SHARDS[seed], folder)
    assert (read, len(scan.rows) // PACKED.size) == (samples, samples)
    assert any(re.search(reason, text) for text in scan.problems) or not reason


@fuzzed
@given(data=mutated(SHARDS), seed=st.sampled_from(list(SHARDS)))
def test_rows_of_another_shard_give_bytes_or_data_errors(data: bytes, seed: str, folder: Path) -> None:
    path = folder / "s.tar"
    path.write_bytes(SHARDS[seed])
    rows = scan_shard(path, 4).rows
    path.write_bytes(data)
    with bounded(folder):
        for row in PACKED.iter_unpack(rows):
            read_at_place(path, Row(*row))


@fuzzed
@given(data=with_headers())
def test_a_mutated_shard_gives_samples_or_data_errors(data: bytes, folder: Path) -> None:
    check_shard(data, folder)


@fuzzed
@given(data=mutated(INDICES))
@example(data=b'{"classes": null, "splits": {"a": {"samples": 1e400, "shards": []}}}')
@example(data=b'{"classes": null, "splits": ' + b"9" * 5000 + b"}")
def test_a_mutated_index_is_an_index_or_a_data_error(data: bytes, folder: Path) -> None:
    (folder / "index.json").write_bytes(data)
    with bounded(folder):
        try:
            index = read_index(folder)
        except DataError:
            return
    for shard in (shard for split in index.splits.values() for shard in split.shards):
        assert (folder / shard.name).resolve().parent == folder.resolve()
        assert "\0" not in shard.name
