"""Any bytes are a manifest that can be trusted to name files of its own folder, or a CheckpointError.

The seeds are in corpus/manifest. QSR_FUZZ_EXAMPLES=100000 tries so many instead of the few that are always the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsr_engine.checkpoint.manifest import CheckpointError, Manifest, digest_of
from tests.fuzz.mutations import EXAMPLES, mutated

CORPUS = sorted((Path(__file__).parent / "corpus" / "manifest").iterdir())
fuzzed = settings(max_examples=EXAMPLES or 150, derandomize=not EXAMPLES, deadline=None)

TOKENS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\0", b"\xff", b"\xef\xbb\xbf", b"../"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 40, b"9" * 5000, b"[" * 2000, b'{"a":' * 2000),
    *(b'"step"', b'"files"', b'"ranks"', b'"format": 1,', b'"sha256_of_the_rest"', b"-0", b"1.0", b"0" * 64),
]


def check(content: bytes) -> None:
    """Raises what is neither a manifest nor a CheckpointError."""
    try:
        manifest = Manifest.parse(content)
    except CheckpointError as error:
        if len(str(error)) > 2000:
            raise ValueError("a message that nobody can read") from error
        return
    inside = Path("/checkpoint")
    for name, (size, digest) in manifest.files.items():
        assert inside in (inside / name).parents
        assert ".." not in PurePosixPath(name).parts
        assert 0 <= size < 2**63
        assert len(digest) == 64
        os.fsencode(name)
    assert 0 <= manifest.step < 2**63
    assert manifest.saved_at - manifest.saved_at == 0, "it is finite"
    assert repr(manifest)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: str(path.name))
def test_the_seeds(path: Path) -> None:
    check(path.read_bytes())
    whole = path.name.startswith("whole")
    if whole:
        assert Manifest.parse(path.read_bytes()).files
    else:
        with pytest.raises(CheckpointError):
            Manifest.parse(path.read_bytes())


@fuzzed
@given(st.one_of(st.binary(max_size=200), mutated([path.read_bytes() for path in CORPUS], TOKENS)))
@example(b"[" * 10**6)
def test_any_bytes(content: bytes) -> None:
    check(content)


NAMES = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(["", ".", "..", "a", "worker-00000", "\\", "\0", "x" * 300, "é"]), max_size=4).map(
        "/".join
    ),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(2**62, 2**66), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
ENTRY = st.one_of(JSON, st.tuples(st.integers(-1, 2**64), st.sampled_from(["0" * 64, "A" * 64, ""])).map(list))
BODY = st.fixed_dictionaries(
    {"format": st.just(1)},
    optional={
        "tag": st.one_of(st.text(max_size=6), JSON),
        "step": st.one_of(st.integers(0, 9), JSON),
        "saved_at": st.one_of(st.floats(), JSON),
        "layout": st.one_of(st.dictionaries(st.text(max_size=4), JSON, max_size=2), JSON),
        "config": st.one_of(st.dictionaries(st.text(max_size=4), JSON, max_size=2), JSON),
        "ranks": st.one_of(st.lists(st.integers(-1, 9), max_size=3), JSON),
        "files": st.one_of(st.dictionaries(NAMES, ENTRY, max_size=3), JSON),
        "more": JSON,
    },
)


@fuzzed
@given(BODY)
def test_any_content_whose_digest_is_right(body: dict[str, Any]) -> None:
    """What somebody writes who knows the format; bytes at random hardly ever come so far."""
    check(json.dumps({**body, "sha256_of_the_rest": digest_of(body)}).encode())
