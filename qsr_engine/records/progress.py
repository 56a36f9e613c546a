"""How far a run is, for who watches it: a bar on a terminal, elsewhere a line a record."""

from __future__ import annotations

import os
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from qsr_engine.records.records import Record

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits into 80 columns


class Progress(Protocol):
    """Shows records as they come."""

    def show(self, record: Record) -> None: ...

    def close(self) -> None: ...


def progress(stream: TextIO, total_steps: int, *, from_step: int) -> Progress:
    """What suits a stream."""
    if _is_terminal(stream):
        return _Bar(stream, total_steps, from_step)
    return _Lines(stream, total_steps)


class _Bar:
    def __init__(self, stream: TextIO, total_steps: int, from_step: int) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total_steps, initial=from_step, file=stream, dynamic_ncols=True, bar_format=_BAR
        )

    def show(self, record: Record) -> None:
        self._bar.update(record.step - self._bar.n)
        self._bar.set_postfix_str(f"loss {record.loss:.3g}  lr {record.lr:.3g}  H {record.period}{_accuracy(record)}")

    def close(self) -> None:
        self._bar.close()


class _Lines:
    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self._stream, self._total_steps = stream, total_steps

    def show(self, record: Record) -> None:
        print(
            f"step {record.step}/{self._total_steps}  round {record.round}  H {record.period}  lr {record.lr:.3g}  "
            f"loss {record.loss:.3g}  {record.images_per_second:.0f} images/s{_accuracy(record)}",
            file=self._stream,
            flush=True,
        )

    def close(self) -> None:
        """Nothing is held."""


def _accuracy(record: Record) -> str:
    return "" if record.eval_accuracy is None else f"  accuracy {record.eval_accuracy:.1f} %"


def _is_terminal(stream: TextIO) -> bool:
    """Whether it is a terminal of a known width: of 0 columns, as some containers give, tqdm would draw nothing."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False
