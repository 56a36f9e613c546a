"""What must be alike on all hosts of a run: the versions, and the sources of this package. No torch is imported."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from qsr_engine.membership.spelling import some

_NOT_INSTALLED = "not installed"


def versions() -> dict[str, str]:
    """What must be the same on every host: Python, torch, DeepSpeed, timm and this package with its sources.

    Read anew at every call, which takes milliseconds: all ranks of a run ask at the same moment, and processes that
    were started at other moments, between which a file was saved, shall not differ for it.
    """
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "torch": _torch_version()}
    found |= {name: _version(name) for name in ("deepspeed", "timm")}
    return {**found, "qsr_engine": f"{_version('qsr_engine')}, sources {_sources()}"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _NOT_INSTALLED


def _torch_version() -> str:
    """With the part after + (cpu, cu130), which the metadata of PyPI's wheel leaves out; read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name("version.py")
        line = re.search(r"^__version__ = ['\"](.+)['\"]", path.read_text() if path.exists() else "", re.MULTILINE)
        if line:
            return line[1]
    return _version("torch")


def _sources() -> str:
    """Digest of this package's Python files: two checkouts may have the same version and other code."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def differences(facts: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line for every fact that is not the same everywhere: its values and who has them.

    Args:
        facts: for every one who reports (a host, a rank) the values by name, as versions() gives them.
    """
    lines = []
    for name in sorted({name for values in facts.values() for name in values}):
        who: dict[str, list[str]] = {}
        for one, values in facts.items():
            who.setdefault(values.get(name, _NOT_INSTALLED), []).append(one)
        if len(who) > 1:
            lines.append(f"  {name}: " + "; ".join(f"{value} on {some(names)}" for value, names in who.items()))
    return lines
