"""What every report names: the machine, the date and the versions."""

from __future__ import annotations

import contextlib
import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine(*packages: str) -> dict[str, str | int]:
    """Date, processor, cores that this process may use, Python, and the versions of these packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": date.today().isoformat(),
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions(*packages),
    }


def versions(*packages: str) -> dict[str, str]:
    """Those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def in_words(found: dict[str, str | int]) -> str:
    """What machine() gave, as the beginning of a sentence."""
    packages = [f"{name} {found[name]}" for name in found if name not in ("date", "cpu", "cores", "python")]
    return ", ".join(
        [f"{found['date']}, {found['cores']} cores of {found['cpu']}, Python {found['python']}", *packages]
    )
