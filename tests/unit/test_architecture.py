"""Rules of the architecture, checked in the source: see "Reading the code" in the README."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "qsr_engine"
# The order in which data flows; a module imports from its own entry and from those before it.
ORDER = [
    "config",
    "recipe",
    "quantities",
    "schedule",
    "cost",
    "averaging",
    "judging",
    "liveness",
    "local_steps",
    "stopping",
    "manifest",
    "checkpoint",
    "hosts",
    "network",
    "rendezvous",
    "roll_call",
    "engines",
    "data",
    "models",
    "sharpness",
    "appending",
    "monitor",
    "runs",
    "plots",
    "report",
    "plan",
    "calibration",
    "fitting",
    "forecast",
    "train",
    "measure",
    "launcher",
    "cli",
    "__main__",
]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_never_point_back(path: Path) -> None:
    place = ORDER.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "qsr_engine" and rest:
            assert ORDER.index(rest.split(".")[0]) <= place, f"{path.name} imports {name}"
        if package == "deepspeed":
            assert path == PACKAGE / "engines" / "deepspeed.py", f"{path.name} imports deepspeed"
        if name.startswith(("torch.distributed.fsdp", "torch.distributed.tensor")):
            assert path == PACKAGE / "engines" / "fsdp.py", f"{path.name} imports {name}"


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, qsr_engine.cli; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
