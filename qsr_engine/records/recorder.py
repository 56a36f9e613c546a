"""Which member records a run whose workers come and go: a file in the run's folder names it.

A member that records may be late, and does not know that the others have gone on and another one records. It asks this
file before it writes; both hold a lock for as long as they look, where the file system has locks. One that is frozen
while it holds the lock is waited for for _PATIENCE seconds only, else it would hold up the run.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qsr_engine.records.run_folder import RECORDER

_PATIENCE = 5.0


class Recorder:
    """One member, as it writes in a run's folder.

    Args:
        name: of this member, which no other one has.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path, self._name = run_dir / RECORDER, name

    def begin(self) -> None:
        """This member records from now on, and whoever did does not any more. Raises OSError: it cannot be written."""
        with self._locked() as file:
            file.truncate(0)
            file.write(self._name)

    @contextmanager
    def writes(self) -> Iterator[bool]:
        """Whether it is this member that records; nobody else begins to inside."""
        with self._locked() as file:
            file.seek(0)
            yield file.read() == self._name

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        with self._path.open("a+", encoding="utf-8") as file:
            end = time.monotonic() + _PATIENCE
            with suppress(OSError):
                while not _taken(file) and time.monotonic() < end:
                    time.sleep(0.02)
            yield file


def _taken(file: IO[str]) -> bool:
    """Whether the lock is ours now. Raises OSError: the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
