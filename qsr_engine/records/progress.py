"""How far a run is, for who watches it: a bar on a terminal, elsewhere a line a record; and what came of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from qsr_engine.config.units import bytes_text, seconds_text
from qsr_engine.records.records import Record
from qsr_engine.records.run_folder import MODEL

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits into 80 columns


class Progress(Protocol):
    """Shows records as they come, and what takes its time beside training."""

    def show(self, record: Record) -> None: ...

    def begin(self, phase: str, step: int) -> None:
        """`evaluating` or `saving` after a step, until end()."""

    def end(self) -> None: ...

    def close(self) -> None: ...


def progress(stream: TextIO, total_steps: int, *, from_step: int) -> Progress:
    """What suits a stream."""
    if _is_terminal(stream):
        return _Bar(stream, total_steps, from_step)
    return _Lines(stream, total_steps, from_step)


class _Bar:
    def __init__(self, stream: TextIO, total_steps: int, from_step: int) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total_steps, initial=from_step, file=stream, dynamic_ncols=True, bar_format=_BAR
        )
        self._shown = ""

    def show(self, record: Record) -> None:
        self._bar.update(record.step - self._bar.n)
        loss = "" if record.loss is None else f"loss {record.loss:.3g}  "
        self._shown = f"{loss}lr {record.lr:.3g}  H {record.period}{_reached(record)}"
        self._bar.set_postfix_str(self._shown)

    def begin(self, phase: str, step: int) -> None:
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(phase)

    def end(self) -> None:
        self._bar.set_postfix_str(self._shown)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    def __init__(self, stream: TextIO, total_steps: int, from_step: int) -> None:
        self._stream, self._total_steps = stream, total_steps
        self._step = self._from_step = from_step
        self._began = time.monotonic()

    def show(self, record: Record) -> None:
        self._step, trained = record.step, ""
        unit = "tokens" if record.images_per_second is None else "images"
        rate = record.images_per_second or record.tokens_per_second
        if record.loss is not None and rate is not None:
            trained = f"  loss {record.loss:.3g}  {rate:.0f} {unit}/s"
        self._say(
            f"step {record.step}/{self._total_steps}  round {record.round}  H {record.period}  lr {record.lr:.3g}"
            f"{trained}{_reached(record)}{self._left()}"
        )

    def _left(self) -> str:
        """At the pace so far, evaluations and all."""
        done, left = self._step - self._from_step, self._total_steps - self._step
        if done < 1 or left < 1:
            return ""
        return f"  {seconds_text(left * (time.monotonic() - self._began) / done)} left"

    def begin(self, phase: str, step: int) -> None:
        self._say(f"{phase} after step {step}")

    def end(self) -> None:
        """The next line shows it."""

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is held."""


def closing_words(run_dir: Path, values: Mapping[str, Any]) -> str:
    """What came of a run, by the figures of its summary.json; those that it lacks are left out."""
    known = {name: value for name, value in values.items() if value is not None}
    lines = []
    if {"steps", "seconds_training"} <= known.keys():
        how = "stopped, as its recipe says," if known.get("partial") else "done"
        lines.append(f"{how} after {known['steps']} steps and {seconds_text(known['seconds_training'])} of training")
    if "eval_accuracy" in known:
        best = f", best {known['best_accuracy']:.2f} % at step {known['best_step']}" if "best_step" in known else ""
        lines.append(f"accuracy {known['eval_accuracy']:.2f} %{best}")
    elif {"eval_loss", "eval_perplexity", "eval_bits_per_byte"} <= known.keys():
        best = f", best {known['best_loss']:.4f} at step {known['best_step']}" if "best_step" in known else ""
        lines.append(
            f"loss {known['eval_loss']:.4f}{best}; perplexity {known['eval_perplexity']:.4g}, "
            f"{known['eval_bits_per_byte']:.4f} bits a byte"
        )
    if {"averagings", "averagings_percent", "bytes_sent"} <= known.keys():
        lines.append(
            f"{known['averagings']} averagings, {known['averagings_percent']:.1f} % of the steps; "
            f"{bytes_text(known['bytes_sent'])} have left each worker"
        )
    lines.append(f"model: {run_dir / MODEL}" if (run_dir / MODEL).exists() else f"folder: {run_dir}")
    return "\n".join([*lines, f"pictures: qsr report {run_dir}"])


def _reached(record: Record) -> str:
    if record.eval_accuracy is not None:
        return f"  accuracy {record.eval_accuracy:.1f} %"
    return "" if record.eval_perplexity is None else f"  perplexity {record.eval_perplexity:.4g}"


def _is_terminal(stream: TextIO) -> bool:
    """Whether it is a terminal of a known width: of 0 columns, as some containers give, tqdm would draw nothing."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False
