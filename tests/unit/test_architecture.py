"""Rules of the architecture, checked in the source: the order is explained in docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qsr_engine"
TESTS = Path(__file__).parents[1]
# A file imports from its own package and from those on earlier lines; those on one line don't know one another.
FLOORS = [
    ["config"],
    ["schedule", "averaging", "data", "records"],
    ["membership"],
    ["local_steps"],
    ["checkpoint"],
    ["engines"],
    ["training"],
    ["planning"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
FRAMEWORKS = {  # and the only package that imports them
    "deepspeed": "engines/deepspeed",
    "torch.distributed.fsdp": "engines/fsdp",
    "torch.distributed.tensor": "engines/fsdp",
}
SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_never_point_back(path: Path) -> None:
    mine = parts(path)[0]
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "qsr_engine" and rest:
            theirs = rest.split(".")[0]
            if theirs in FLOOR and theirs != mine:
                assert FLOOR[theirs] < FLOOR[mine], f"{path.name} imports {name}"
        for framework, home in FRAMEWORKS.items():
            if name == framework or name.startswith(f"{framework}."):
                assert path.is_relative_to(PACKAGE / home), f"{path.name} imports {name}"


def test_no_two_files_import_one_another() -> None:
    modules = {".".join(("qsr_engine", *parts(path))).removesuffix(".__init__"): path for path in SOURCES}
    known = {name: {other for other in imports(path) if other in modules} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(known[name] - {name}):
                visit(other, (*above, name))
            done.add(name)

    for name in known:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_of_files_say_what_is_in_them(path: Path) -> None:
    assert path.stem not in SAY_NOTHING


def test_no_test_imports_another() -> None:
    """What two of them need is in tests/support."""
    for path in TESTS.rglob("test_*.py"):
        for name in imports(path):
            assert not name.rpartition(".")[2].startswith("test_"), f"{path.name} imports {name}"


@pytest.mark.parametrize("module", ["qsr_engine", "qsr_engine.cli.main", "qsr_engine.config.recipe_file"])
def test_what_starts_a_command_imports_no_torch(module: str) -> None:
    slow = {"torch", "deepspeed", "webdataset", "sklearn", "fsspec"}
    code = f"import sys, {module}; sys.exit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
