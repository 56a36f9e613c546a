"""Which strategy ends at the lower held-out loss of a language model, for the same number of tokens?

    python -m benchmarks.language --runs FOLDER                  # all strategies, rates tuned on seed 100, seeds 0 to 2
    python -m benchmarks.language --runs FOLDER --minutes 9      # a piece of it; the same command goes on
    python -m benchmarks.language --runs FOLDER --strategies parallel qsr

Two workers of one rank each train a GPT-2 of two layers and width 64 on bytes with `qsr train`: real process groups
(gloo), real averaging, real shards. The text is the source of Python's own standard library, the files *.py of its
folder, which every machine with that Python has; the training part is longer than a run, so that no sample comes twice.

    tune    every strategy at each of the peaks, on a seed of its own; where the best is the smallest or the largest,
            the next one is tried too
    final   every strategy at its own best peak, all seeds

QSR's alpha follows the peak: alpha / peak stays the same, so the periods do too. constant-8 and outer-8 (DiLoCo's outer
step: Nesterov, rate 0.7, momentum 0.9) average about as often as QSR. Rules that came after it:

    qsr-outer-units     the same outer step, its rate and momentum those of a round of 4 steps at the peak (unit_steps)
    NAME-states         Adam's moments are averaged too, every third round and every sixth (DES-LOC)
    muon-NAME           Muon takes the local steps, beside AdamW for embeddings and vectors (MuLoCo)
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import ranks, report
from benchmarks.intervals import interval
from benchmarks.report import Report, parser
from qsr_engine.data.writing.text import write_text

WORKERS, BATCH, CONTEXT = 2, 16, 64
MODEL = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": CONTEXT}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # no sample comes twice
ADAMW = {"type": "AdamW", "betas": [0.9, 0.95], "weight_decay": 0.1, "gradient_clipping": 1.0}
MUON = {**ADAMW, "type": "Muon", "momentum": 0.95}  # of the strategies muon-NAME
WARMUP, LEAST = 0.05, 0.01  # of all steps, and of the peak
PEAKS = (0.002, 0.004, 0.008)
OUTER_PEAKS = (0.001, *PEAKS)  # momentum 0.9 carries the parameters up to seven times as far as the workers went
FURTHEST = (0.0005, 0.064)
TUNING_SEED = 100
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
STATES = {"exp_avg": 3, "exp_avg_sq": 6}
STRATEGIES: dict[str, dict[str, Any]] = {
    "parallel": {"strategy": "parallel"},
    "constant-4": {"strategy": "constant", "h_base": 4},
    "constant-8": {"strategy": "constant", "h_base": 8},
    "qsr": {"strategy": "qsr", "h_base": 4, "alpha": 1.9},  # of the peak
    "outer-8": {"strategy": "constant", "h_base": 8, "outer": OUTER},
    "qsr-outer-units": {"strategy": "qsr", "h_base": 4, "alpha": 1.9, "outer": {**OUTER, "unit_steps": 4}},
    "constant-8-states": {"strategy": "constant", "h_base": 8, "averaging": {"state": STATES}},
    "qsr-states": {"strategy": "qsr", "h_base": 4, "alpha": 1.9, "averaging": {"state": STATES}},
    "muon-parallel": {"strategy": "parallel"},
    "muon-constant-8": {"strategy": "constant", "h_base": 8},
    "muon-qsr": {"strategy": "qsr", "h_base": 4, "alpha": 1.9},
}
PAIRS = (
    ("qsr", "constant-8"),
    ("outer-8", "constant-8"),
    ("qsr-outer-units", "qsr"),
    ("constant-8-states", "constant-8"),
    ("qsr-states", "qsr"),
    ("muon-qsr", "muon-constant-8"),
)


@dataclass(frozen=True)
class Run:
    strategy: str
    peak: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.strategy}-lr{self.peak:g}-seed{self.seed}"


def recipe(run: Run, steps: int, shards: Path, folder: Path) -> dict[str, Any]:
    """The recipe of a run, as a user would write it."""
    qsr = dict(STRATEGIES[run.strategy])
    if "alpha" in qsr:
        qsr["alpha"] = qsr["alpha"] * run.peak
    rate = {"schedule": "cosine", "peak": run.peak, "min": LEAST * run.peak, "warmup_steps": round(WARMUP * steps)}
    return {
        "task": "text",
        "model": {"name": "transformers/gpt2", "kwargs": {**MODEL, **NO_DROPOUT}},
        "data": {"shards": str(shards)},
        "batch": {"train_batch_size": BATCH},
        "optimizer": MUON if run.strategy.startswith("muon-") else ADAMW,
        "engine": "fsdp",
        "qsr": {**qsr, "total_steps": steps, "lr": rate},
        "logging": {"dir": str(folder), "name": run.name, "every": max(1, steps // 10), "tensorboard": False},
        "seed": run.seed,
    }


def make_shards(folder: Path) -> None:
    """Shards of the standard library's own files, without its packages."""
    if not (folder / "index.json").exists():
        library = Path(sysconfig.get_paths()["stdlib"])
        write_text(sorted(library.glob("*.py")), folder, context=CONTEXT, held_out=0.02)


class OutOfTimeError(Exception):
    """The minutes are over; the same command goes on."""


def train_all(runs: Sequence[Run], steps: int, folder: Path, deadline: float) -> None:
    """Train what has not ended yet, in one launch. Raises OutOfTimeError."""
    pending = [run for run in runs if not has_ended(run, folder)]
    paths = []
    for run in pending:
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        paths.append(folder / "recipes" / f"{run.name}.yaml")
        paths[-1].write_text(yaml.safe_dump(recipe(run, steps, folder / "shards", folder / "runs")))
    if paths:
        ranks.run(train_here, list(map(str, paths)), deadline, on_each=WORKERS)
    if not all(has_ended(run, folder) for run in runs):
        raise OutOfTimeError


def train_here(paths: Sequence[str], deadline: float) -> None:
    """In one of the ranks: the runs one after another, as long as there is time for one more."""
    import torch
    import torch.distributed as dist

    from qsr_engine.cli.main import main as qsr

    longest = 0.0
    for path in map(Path, paths):
        started, errors = time.time(), io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = qsr(["train", str(path), "--resume"])
        if code and "the loss is" not in errors.getvalue():
            print(errors.getvalue(), file=sys.stderr, flush=True)
            sys.exit(code)
        if code and os.environ["RANK"] == "0":
            mark(path).parent.mkdir(exist_ok=True)
            mark(path).write_text(errors.getvalue())
        longest = max(longest, time.time() - started)
        if os.environ["RANK"] == "0":
            print(f"{path.stem}: {time.time() - started:.0f} s", flush=True)
        over = torch.tensor(time.time() + 1.2 * longest > deadline)
        dist.broadcast(over, 0)
        if over:
            return


def mark(path: Path) -> Path:
    """Of a run that diverged."""
    return path.parents[1] / "diverged" / path.stem


def has_ended(run: Run, folder: Path) -> bool:
    return (folder / "runs" / run.name / "summary.json").exists() or (folder / "diverged" / run.name).exists()


def summary(run: Run, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / run.name / "summary.json").read_text())
    return found


def loss_of(run: Run, folder: Path) -> float:
    """Held-out loss, in nats a byte; infinite where it diverged."""
    return math.inf if (folder / "diverged" / run.name).exists() else float(summary(run, folder)["eval_loss"])


def beyond(losses: dict[float, float]) -> float | None:
    """The next peak to try; None where the best lies between two others, or at the end of what is tried at all."""
    best = min(sorted(losses), key=lambda peak: losses[peak])
    following = best * 2 if best == max(losses) else best / 2 if best == min(losses) else None
    return following if following is not None and FURTHEST[0] <= following <= FURTHEST[1] else None


def tune(strategies: Sequence[str], steps: int, folder: Path, deadline: float) -> dict[str, dict[float, float]]:
    """For every strategy, the loss at each peak that was tried."""
    tried: dict[str, list[float]] = {name: list(OUTER_PEAKS if "outer" in name else PEAKS) for name in strategies}
    while True:
        runs = [Run(name, peak, TUNING_SEED) for name, peaks in tried.items() for peak in peaks]
        train_all(runs, steps, folder, deadline)
        found = {
            name: {peak: loss_of(Run(name, peak, TUNING_SEED), folder) for peak in peaks}
            for name, peaks in tried.items()
        }
        more = {name: peak for name in strategies if (peak := beyond(found[name])) is not None}
        if not more:
            return found
        for name, peak in more.items():
            tried[name].append(peak)


def rows_of(tunings: dict[str, dict[float, float]], seeds: int, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for strategy, tuned in tunings.items():
        peak = min(sorted(tuned), key=lambda rate: tuned[rate])
        found = [summary(Run(strategy, peak, seed), folder) for seed in range(seeds)]
        rows.append(
            {
                "strategy": strategy,
                "peak": peak,
                "tuning": tuned,
                "loss": [entry["eval_loss"] for entry in found],
                "bits_per_byte": [entry["eval_bits_per_byte"] for entry in found],
                "averagings_percent": found[0]["averagings_percent"],
                "bytes_percent": found[0]["bytes_percent"],
                "tokens": found[0]["tokens_seen"],
                "seconds": [entry["seconds_training"] for entry in found],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Of every strategy; behind parallel with AdamW, and those with Muon behind that with Muon too."""
    losses = {row["strategy"]: row["loss"] for row in rows}
    bases = [name for name in ("parallel", "muon-parallel") if name in losses]
    lines = []
    for row in rows:
        tuned, loss = row["tuning"], row["loss"]
        edge = "" if min(tuned) < row["peak"] < max(tuned) else " (edge)"
        behind = [over(loss, losses[base]) if belongs(row["strategy"], base) else "" for base in bases]
        lines.append(
            [
                row["strategy"],
                f"{row['peak']:g}{edge}",
                f"{statistics.mean(loss):.4f} ± {interval(loss).half:.4f}",
                f"{statistics.mean(row['bits_per_byte']):.4f}",
                *behind,
                f"{row['averagings_percent']:.1f}",
                f"{row['bytes_percent']:.1f}",
            ]
        )
    columns = ["strategy", "peak", "held-out loss", "bits a byte", *(f"over {base}" for base in bases)]
    return report.table([*columns, "averagings %", "bytes %"], lines)


def pairs(rows: list[dict[str, Any]]) -> str:
    """A line for each of PAIRS that ran: a rule over the one that it follows."""
    losses = {row["strategy"]: row["loss"] for row in rows}
    ran = [(one, other) for one, other in PAIRS if one in losses and other in losses]
    return "\n".join(f"- {one} over {other}: {over(losses[one], losses[other])}" for one, other in ran)


def belongs(strategy: str, base: str) -> bool:
    """Whether a strategy is compared with this one: all with parallel, those with Muon with muon-parallel too."""
    return strategy != base and (base == "parallel" or strategy.startswith("muon-"))


def over(loss: Sequence[float], base: Sequence[float]) -> str:
    """How much higher, seed by seed: mean and 95 % interval."""
    differences = [one - other for one, other in zip(loss, base, strict=True)]
    return f"{statistics.mean(differences):+.4f} ± {interval(differences).half:.4f}"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="what is finished there is kept")
    made.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES), metavar="NAME")
    made.add_argument("--steps", type=int, default=500)
    made.add_argument("--seeds", type=int, default=3, choices=range(2, 31))
    made.add_argument("--minutes", type=float, default=600.0, help="no run begins that would end after them")
    args = made.parse_args()
    deadline = time.time() + 60 * args.minutes
    make_shards(args.runs / "shards")
    try:
        tunings = tune(args.strategies, args.steps, args.runs, deadline)
        best = {name: min(sorted(tuned), key=lambda peak: tuned[peak]) for name, tuned in tunings.items()}
        final = [Run(name, peak, seed) for name, peak in best.items() for seed in range(args.seeds)]
        train_all(final, args.steps, args.runs, deadline)
    except OutOfTimeError:
        print("the minutes are over; the same command goes on")
        return
    found = Report("language", args, ("torch", "transformers", "webdataset"))
    rows = rows_of(tunings, args.seeds, args.runs)
    found.add(
        f"{WORKERS} workers, GPT-2 of {MODEL['n_layer']} layers and width {MODEL['n_embd']}, bytes, context {CONTEXT}, "
        f"batch {BATCH}, {args.steps} steps, {rows[0]['tokens']:,} tokens, {args.seeds} seeds. Held-out loss in nats a "
        'byte: mean and 95 % interval (Student\'s t). Over another: of the differences seed by seed. "edge": the best '
        "peak is the smallest or largest tried."
    )
    found.add(table(rows))
    if between := pairs(rows):
        found.add(f"Seed by seed:\n\n{between}")
    tried = {
        row["strategy"]: ", ".join(f"{peak:g}: {loss:.4f}" for peak, loss in sorted(row["tuning"].items()))
        for row in rows
    }
    found.add("Tuning, peak and loss:\n\n" + "\n".join(f"- {name}: {losses}" for name, losses in tried.items()))
    found.save(steps=args.steps, rows=rows)


if __name__ == "__main__":
    main()
