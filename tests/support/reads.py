"""Which samples loaders really gave, in this process or in those that a launcher starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qsr_engine.data.loader import TrainLoader

Read = tuple[str, int]  # a shard and a number in it

_AT_THE_START = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "qsr_engine.training.batches":
            return None
        sys.meta_path.remove(self)
        from tests.support.reads import write_down
        write_down()
        return importlib.util.find_spec(name)

sys.meta_path.insert(0, Finder())
"""


def write_down() -> None:
    """Every batch of training that this process is given is a line in a file of its own, of the worker's name."""
    folder = Path(os.environ["QSR_TEST_READS"])
    path = folder / f"{os.environ.get('QSR_WORKER', '')}.{os.getpid()}.jsonl"

    def say(number: int, items: list[Read]) -> None:
        with path.open("a") as file:
            file.write(json.dumps([number, items]) + "\n")

    TrainLoader.batches = recorded(say)  # type: ignore[method-assign]


def recorded(say: Callable[[int, list[Read]], None]) -> Any:
    """TrainLoader.batches, which says the number and the samples of each batch when it is asked for."""
    batches = TrainLoader.batches

    def told(self: TrainLoader, start: int = 0, *given: Any, **more: Any) -> Iterator[Any]:
        raw = self.raw_batches(start)
        for number, batch in enumerate(batches(self, start, *given, **more), start):
            say(number, [(item.shard, item.number) for item in next(raw).items])
            yield batch

    return told


def environment(folder: Path) -> dict[str, str]:
    """Of commands in whose processes write_down() is called; they write into a folder."""
    (folder / "start").mkdir()
    (folder / "reads").mkdir()
    (folder / "start" / "sitecustomize.py").write_text(_AT_THE_START)
    here = str(Path(__file__).parents[2])
    return {"PYTHONPATH": f"{folder / 'start'}:{here}", "QSR_TEST_READS": str(folder / "reads")}


def reads_of(folder: Path) -> dict[str, list[tuple[int, list[Read]]]]:
    """Number and samples of the batches of every process, by the worker's name and the process's number."""
    found = {}
    for path in sorted((folder / "reads").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        found[path.stem] = [(number, [tuple(item) for item in items]) for number, items in lines]
    return found
