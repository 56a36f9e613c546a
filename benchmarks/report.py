"""What every report has: the machine, the date, versions and commit; tables; and the raw figures as JSON beside it.

Nothing but the standard library, since an environment with few packages may run a script, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GIGABYTE = 1e9


def parser(text: str | None) -> argparse.ArgumentParser:
    """For a script with this docstring; every script has --out."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, metavar="FOLDER", help="keep the report there, as NAME-DATE.md and .json")
    return made


class Report:
    """Prints what is added; save() keeps it as NAME-DATE.md, and the figures as NAME-DATE.json, where --out says.

    Args:
        name: of the script, as `step-overhead`.
        arguments: as parser() gave them.
        packages: distributions whose versions are named.
        facts: more of what the measurement ran with.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, packages: Iterable[str] = (), **facts: Any) -> None:
        self._started = time.perf_counter()
        self._hardware = hardware(*packages)
        self._configuration = {**configuration(arguments), **facts}
        self._lines: list[str] = []
        self.stem = None if arguments.out is None else free_stem(arguments.out, name, self._hardware["date"])
        words = [os.path.basename(word) if word.startswith("/") else word for word in sys.argv[1:]]
        self._command = " ".join(["python", "-m", f"benchmarks.{name.replace('-', '_')}", *words])
        self.add(f"{in_words(self._hardware)}.\nCommand: `{self._command}`.")
        if self.stem:
            self.add(f"Raw figures, configuration and hardware: [{self.stem.name}.json]({self.stem.name}.json).")

    def add(self, text: str) -> None:
        print(f"\n{text}", flush=True)
        self._lines.append(text + "\n")

    def save(self, **figures: Any) -> None:
        """Figures: of JSON; those that were kept before are replaced. Without --out nothing is kept."""
        if not self.stem:
            return
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        kept = {
            "command": self._command,
            "configuration": self._configuration,
            "hardware": self._hardware,
            "load_at_the_end": load(),
            "seconds": round(time.perf_counter() - self._started, 1),
            **figures,
        }
        self.stem.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        self.stem.with_suffix(".md").write_text("\n".join(self._lines), encoding="utf-8")


def free_stem(folder: Path, name: str, day: str) -> Path:
    """FOLDER/NAME-DATE, or FOLDER/NAME-DATE-2 and so on where there is such a report: it may have words of its own."""
    stem, number = folder / f"{name}-{day}", 1
    while stem.with_suffix(".json").exists() or stem.with_suffix(".md").exists():
        number += 1
        stem = folder / f"{name}-{day}-{number}"
    return stem


def configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options; of a path only its name, which is all that means something on another machine."""
    return {
        key: Path(value).name if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key != "out"
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; columns of numbers on the right, but for the first, which names the row."""
    lines = [list(row) for row in rows]
    right = [i > 0 and all(not row[i] or row[i][0] in "0123456789+-" for row in lines) for i in range(len(columns))]
    lines = [list(columns), ["---:" if is_right else "---" for is_right in right], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hardware(*packages: str) -> dict[str, Any]:
    """Date, processor, cores that this process may use, memory, load, kernel, commit, versions of what is there."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    return {
        "date": date.today().isoformat(),
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory["MemTotal"]) * 1024 / GIGABYTE, 1),
        "memory_available_gb": round(int(memory["MemAvailable"]) * 1024 / GIGABYTE, 1),
        "load": load(),
        "kernel": platform.release(),
        **commit(),
        "versions": {"python": platform.python_version(), **versions(*packages)},
    }


def load() -> list[float]:
    """Processes that run or wait: means over 1, 5 and 15 minutes."""
    return [round(mean, 1) for mean in os.getloadavg()]


def commit() -> dict[str, Any]:
    """Of this checkout, and whether files differ from it; None where git says nothing."""
    # root measures in the checkout of another user
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}
    return {"commit": head.stdout.strip(), "changed": bool(changed.stdout.strip())}


def versions(*packages: str) -> dict[str, str]:
    """Those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """What hardware() gave, as a sentence without its end."""
    changed = " with changes" if found["changed"] else ""
    return ", ".join(
        [
            f"{found['date']}, {found['cores']} cores of {found['cpu']}",
            f"{found['memory_gb']:g} GB of memory ({found['memory_available_gb']:g} available)",
            f"load {found['load'][0]:g}",
            f"kernel {found['kernel']}",
            *(f"{name} {number}" for name, number in found["versions"].items()),
            f"commit {(found['commit'] or 'unknown')[:12]}{changed}",
        ]
    )
