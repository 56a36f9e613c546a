"""Any file is a recipe (or a configuration of DeepSpeed) or a ConfigError, and so is any override; nothing of it runs.

The seeds are in corpus/recipe. QSR_FUZZ_EXAMPLES=100000 tries so many instead of the few that are always the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsr_engine.config.deepspeed import split_deepspeed_config
from qsr_engine.config.fsdp import load_fsdp_config
from qsr_engine.config.recipe_batch import resolve_recipe_batch
from qsr_engine.config.recipe_file import dump_recipe, load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError
from tests.fuzz.mutations import EXAMPLES, mutated

CORPUS = sorted((Path(__file__).parent / "corpus" / "recipe").iterdir())
RECIPES = [path.read_bytes() for path in CORPUS if path.suffix == ".yaml"]
WHOLE = (Path(__file__).parent / "corpus" / "recipe" / "whole.yaml").read_bytes()
CONFIGS = [path.read_bytes() for path in CORPUS if path.suffix == ".json"]
fuzzed = settings(max_examples=EXAMPLES or 60, derandomize=not EXAMPLES, deadline=None)

TOKENS = [
    *(
        b"&a ",
        b"*a",
        b"<<: ",
        b"<<: *a",
        b"? ",
        b"- ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"|",
        b">",
        b"%",
        b"---\n",
        b"...\n",
    ),
    *(b"!!python/object/apply:os.system ['touch ran']", b"!!python/name:os.system", b"!!set {a}", b"!!omap [a: 1]"),
    *(b"!!int x", b"!!float x", b"!!timestamp x", b"!!binary x", b"!!bool x", b"!!null x", b"!!str 1", b"!foo bar"),
    *(b"2001-99-99", b"2001-01-01", b"1:99:99", b"0x" + b"F" * 5000, b"9" * 5000, b"9" * 400, b"1e400", b"0b2", b"0o9"),
    *(
        b".inf",
        b"-.inf",
        b".nan",
        b"1e-400",
        b"-1",
        b"0",
        b"null",
        b"~",
        b"true",
        b"1_0",
        b"''",
        b'"\\0"',
        b'"\\ud800"',
    ),
    *(b"extends: base.yaml\n", b"extends: ../../../etc/passwd\n", b'extends: "\\0"\n', b"extends: [1]\n", b"a" * 300),
    *(b"[" * 1500, b"{a: " * 1500, b"? " * 1500, b"- " * 1500, b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\x85"),
]
JSON_TOKENS = [
    *(b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"9" * 400, b"-1", b"null", b"true", b'""', b'"auto"', b"{}", b"[]"),
    *(b"[" * 2000, b'{"qsr":' * 2000, b"\0", b"\xff", b"\\ud800", b'"\\ud800"', b",", b":", b'"qsr": 5,', b'"lr": {},'),
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the files are, and the process, so that what ran would be seen there."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        Path("base.yaml").write_bytes(WHOLE)
        yield Path(name)
        os.chdir(before)


def check_recipe(folder: Path, content: bytes, overrides: list[str]) -> bool:
    """Whether it is a recipe. Raises what is no ConfigError."""
    (folder / "fuzzed.yaml").write_bytes(content)
    try:
        recipe = load_recipe(folder / "fuzzed.yaml", overrides)
        resolved = resolve_recipe(recipe, recipe.data.train_samples or 1797)
        resolve_recipe_batch(resolved, 2)
        (folder / "again.yaml").write_text(dump_recipe(resolved), encoding="utf-8")
        assert load_recipe(folder / "again.yaml") == resolved
    except ConfigError as error:
        if not 0 < len(str(error)) < 100_000:
            raise ValueError("a message that nobody can read") from error
        return False
    finally:
        assert {path.name for path in folder.iterdir()} <= {"base.yaml", "fuzzed.yaml", "again.yaml"}, "something ran"
    return True


def check_config(folder: Path, content: bytes) -> bool:
    """As check_recipe(), of a DeepSpeed configuration with a "qsr" block, for both engines."""
    path = folder / "fuzzed.json"
    path.write_bytes(content)
    right = 0
    try:
        for read in (split_deepspeed_config, load_fsdp_config):
            try:
                read(path)
                right += 1
            except ConfigError:
                continue
    finally:
        path.unlink()
    return right > 0


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: str(path.name))
def test_the_seeds(folder: Path, path: Path) -> None:
    content = path.read_bytes()
    right = check_recipe(folder, content, []) if path.suffix == ".yaml" else check_config(folder, content)
    assert right == path.name.startswith("whole")


@fuzzed
@given(st.one_of(st.binary(max_size=100), mutated(RECIPES, TOKENS)))
def test_any_bytes(folder: Path, content: bytes) -> None:
    check_recipe(folder, content, [])


KEYS = [
    "qsr",
    "lr",
    "peak",
    "h_base",
    "total_steps",
    "data",
    "logging",
    "name",
    "epochs",
    "seed",
    "batch",
    "",
    "a",
    "kwargs",
]
VALUES = st.one_of(
    st.sampled_from(TOKENS).map(lambda token: token.decode(errors="surrogateescape")),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)
OVERRIDES = st.one_of(
    st.text(max_size=20),
    st.builds(lambda keys, value: f"{'.'.join(keys)}={value}", st.lists(st.sampled_from(KEYS), max_size=4), VALUES),
    st.builds(
        lambda key, value: f"{key}={value}",
        st.sampled_from(
            ["qsr.lr.peak", "qsr.alpha", "epochs", "qsr.lr.warmup_epochs", "batch.train_batch_size", "seed"]
        ),
        VALUES,
    ),
)


@fuzzed
@given(st.lists(OVERRIDES, max_size=3))
def test_any_override(folder: Path, overrides: list[str]) -> None:
    check_recipe(folder, WHOLE, overrides)


@fuzzed
@given(st.one_of(st.binary(max_size=100), mutated(CONFIGS, JSON_TOKENS)))
def test_any_deepspeed_configuration(folder: Path, content: bytes) -> None:
    check_config(folder, content)
