"""Which strategy ends at the better accuracy, and at the flatter minimum, for the same budget of images?

    python -m benchmarks.generalization --shards CIFAR10_SHARDS --runs FOLDER                # both models, 3 seeds
    python -m benchmarks.generalization ... --models resnet --train-samples 10000 --epochs 12

CIFAR10_SHARDS is a folder of WebDataset shards train-*.tar and test-*.tar with JPEG pictures of 32 x 32 pixels. Four
workers of one rank each train a small ResNet and a small vision transformer with `qsr train`, the same code on the same
engine as any run: real process groups (gloo), real averaging, real shards. All runs of a model see the same number of
images in batches of the same size.

    tune    every strategy at each of the learning rates, one seed, evaluated on training shards that are held back;
            by default in half as many epochs. Where the best rate is the smallest or the largest tried, twice or half
            of it is tried too, until it is not
    final   every strategy at its own best rate, all seeds, evaluated on the test split

The rates are factors of the model's own, and every strategy is tuned by the same procedure. QSR's
alpha follows the rate: alpha / peak stays the same, so the periods do too.

On one GPU, with 200 epochs and K workers in one process: `benchmarks.virtual_workers`.

Results: a table with mean and standard deviation over the seeds, the share of averagings, and the sharpness of the
averaged model (largest eigenvalue of the Hessian of the training loss). `qsr report` draws the final runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import report
from benchmarks.ranks import ENVIRONMENT, main_module
from benchmarks.report import Report, parser
from qsr_engine.data.index import Index, Shard, Split, read_index
from qsr_engine.data.writing.folder import write_index
from qsr_engine.data.writing.scanning import scan_shard

WORKERS = 4
BATCH = 256
MODELS: dict[str, dict[str, Any]] = {
    "resnet": {
        "model": {
            "name": "timm/resnet18",
            "kwargs": {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "stem_width": 16, "stem_type": ""},
        },
        "optimizer": {"type": "SGD", "momentum": 0.9, "weight_decay": 5.0e-4},
        "peak": 0.2,
        "min": 1.0e-5,
    },
    "vit": {
        "model": {
            "name": "timm/vit_tiny_patch16_224",
            "kwargs": {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
        },
        "optimizer": {"type": "AdamW", "weight_decay": 0.05, "gradient_clipping": 1.0},
        "peak": 0.002,
        "min": 1.0e-6,
    },
}
RATES = (0.5, 1.0, 2.0)  # of the model's own peak, to begin with
FURTHEST = (1 / 32, 32.0)
WARMUP = 0.05  # of all steps
# alpha is a share of the peak: H = (alpha / lr)^2 leaves h_base behind where lr has fallen to alpha / 2, and so on.
STRATEGIES: dict[str, dict[str, Any]] = {
    "parallel": {"strategy": "parallel"},
    "constant": {"strategy": "constant", "h_base": 4},
    "qsr": {"strategy": "qsr", "h_base": 4, "alpha": 1.0},
    "power1": {"strategy": "qsr", "h_base": 4, "alpha": 1.0, "power": 1.0},
    "power3": {"strategy": "qsr", "h_base": 4, "alpha": 1.0, "power": 3.0},
    "post_local": {"strategy": "post_local", "h_base": 4, "switch": 0.5},
    "swap": {"strategy": "swap", "h_base": 4, "switch": 0.75},
    "outer": {"strategy": "constant", "h_base": 4, "outer": {"lr": 0.7, "momentum": 0.9, "nesterov": True}},
}


@dataclass(frozen=True)
class Budget:
    """What every run of this comparison gets."""

    samples: int  # of the training split
    epochs: int

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.samples // BATCH * self.epochs


@dataclass(frozen=True)
class Run:
    """One run: a model, a strategy, a factor of the learning rate, a seed, and the split that it is evaluated on."""

    model: str
    strategy: str
    rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.strategy}-lr{self.rate:g}-{self.split}-seed{self.seed}"


def recipe(run: Run, budget: Budget, shards: Path, folder: Path) -> dict[str, Any]:
    """The recipe of a run, as a user would write it."""
    base, steps = MODELS[run.model], budget.steps
    peak = base["peak"] * run.rate
    qsr = dict(STRATEGIES[run.strategy])
    if "alpha" in qsr:
        qsr["alpha"] = qsr["alpha"] * peak
    if "switch" in qsr:
        qsr["switch_step"] = round(qsr.pop("switch") * steps)
    rate = {"schedule": "cosine", "peak": peak, "min": base["min"], "warmup_steps": round(WARMUP * steps)}
    return {
        "model": base["model"],
        "data": {"shards": str(shards), "eval": run.split, "image_size": 32, "augment": "crop_flip"},
        "batch": {"train_batch_size": BATCH},
        "optimizer": base["optimizer"],
        "engine": "fsdp",
        "qsr": {**qsr, "total_steps": steps, "lr": rate},
        "logging": {"dir": str(folder), "name": run.name, "every": max(1, steps // 20), "tensorboard": False},
        "seed": run.seed,
    }


def make_data(shards: Path, folder: Path, samples: int) -> Index:
    """An index over links to the shards: some for training, two held back for tuning, and the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "index.json").exists():
        return read_index(folder)
    found = {name: sorted(shards.glob(f"{name}-*.tar")) for name in ("train", "test")}
    training, held = found["train"][:-2], found["train"][-2:]
    parts = {"train": training, "tune": held, "test": found["test"]}
    splits = {}
    for name, paths in parts.items():
        entries: list[Shard] = []
        for path in paths:
            if name == "train" and sum(entry.samples for entry in entries) >= samples:
                break
            (folder / path.name).symlink_to(path.resolve())
            scan = scan_shard(path, None)
            entries.append(Shard(name=path.name, samples=scan.samples, bytes=scan.bytes, sha256=scan.sha256))
        splits[name] = Split(samples=sum(entry.samples for entry in entries), shards=entries)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    index = Index(classes=names, splits=splits)
    write_index(folder, index)
    return index


def train_all(runs: list[Run], budget: Budget, shards: Path, folder: Path) -> None:
    """Train what has not ended yet, all of it in one launch of four ranks: starting them takes half a minute.

    A run that diverges ends its launch; it is left as it is, and another launch takes the rest.
    """
    recipes = folder / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    command = [*launcher, "--module", main_module(), "--train"]
    while pending := [run for run in runs if not has_ended(run, folder)]:
        paths = []
        for run in pending:
            path = recipes / f"{run.name}.yaml"
            path.write_text(yaml.safe_dump(recipe(run, budget, shards, folder)))
            paths.append(str(path))
        done = subprocess.run([*command, *paths], check=False, env={**os.environ, **ENVIRONMENT})
        if done.returncode and not any(has_ended(run, folder) for run in pending):
            sys.exit(f"no run of this launch has ended: {paths[0]}")


def has_ended(run: Run, folder: Path) -> bool:
    return (folder / run.name / "summary.json").exists() or has_diverged(run, folder)


def has_diverged(run: Run, folder: Path) -> bool:
    return (folder / "diverged" / run.name).exists()


def train_here(paths: list[str]) -> None:
    """In one of the ranks: the runs one after another, in this process."""
    from qsr_engine.cli.main import main as qsr

    for path in map(Path, paths):
        started, errors = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = qsr(["train", str(path), "--resume"])
        print(errors.getvalue(), file=sys.stderr, flush=True)
        if code:
            if any(words in errors.getvalue() for words in ("the loss is", "parameters are not finite")):
                marks = path.parents[1] / "diverged"
                marks.mkdir(exist_ok=True)
                (marks / path.stem).write_text(errors.getvalue())
            sys.exit(code)
        if os.environ["RANK"] == "0":
            print(f"{path.stem}: {time.perf_counter() - started:.0f} s", flush=True)


def held_back_accuracy(run: Run, folder: Path) -> float:
    """Accuracy of a run that tunes, in %; 0 where it diverged."""
    return 0.0 if has_diverged(run, folder) else float(summary(run, folder)["eval_accuracy"])


def summary(run: Run, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / run.name / "summary.json").read_text())
    return found


def best_rate(accuracies: dict[float, float]) -> float:
    """The factor with the highest accuracy on what was held back; the smallest of several."""
    return max(sorted(accuracies), key=lambda rate: accuracies[rate])


def beyond(accuracies: dict[float, float]) -> float | None:
    """The next factor to try; None where the best lies between two others, or at the end of what is tried at all."""
    best = best_rate(accuracies)
    following = best * 2 if best == max(accuracies) else best / 2 if best == min(accuracies) else None
    return following if following is not None and FURTHEST[0] <= following <= FURTHEST[1] else None


def tune(
    model: str, strategies: list[str], budget: Budget, shards: Path, folder: Path
) -> dict[str, dict[float, float]]:
    """For every strategy, the accuracy at each factor that was tried."""
    tried: dict[str, list[float]] = {name: list(RATES) for name in strategies}
    while True:
        runs = {name: [Run(model, name, rate, 0, "tune") for rate in rates] for name, rates in tried.items()}
        train_all([run for of_one in runs.values() for run in of_one], budget, shards, folder)
        found = {name: {run.rate: held_back_accuracy(run, folder) for run in of_one} for name, of_one in runs.items()}
        more = {name: rate for name in strategies if (rate := beyond(found[name])) is not None}
        if not more:
            return found
        for name, rate in more.items():
            tried[name].append(rate)


def sharpness(run: Run, shards: Path, folder: Path) -> float:
    """The largest eigenvalue at the averaged model, over 500 training pictures as they are. Kept in a file."""
    known = folder / run.name / "sharpness.json"
    if not known.exists():
        known.write_text(json.dumps(_sharpness(run, shards, folder)))
    return float(json.loads(known.read_text()))


def _sharpness(run: Run, shards: Path, folder: Path) -> float:
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional as F

    from qsr_engine.config.recipe import DataConfig, ModelConfig
    from qsr_engine.data.device import Normalise
    from qsr_engine.data.loader import TrainLoader
    from qsr_engine.training.models import create_model
    from qsr_engine.training.sharpness import largest_eigenvalue

    model = create_model(ModelConfig(**MODELS[run.model]["model"]), 10, 32)
    model.load_state_dict(load_file(folder / run.name / "model.safetensors"))
    data = DataConfig(shards=str(shards), image_size=32)
    loader = TrainLoader(shards, read_index(shards), data, rank=0, ranks=1, batch_size=250, seed=1234)
    normalise, batches = Normalise(torch.device("cpu"), torch.float32), loader.batches()
    pairs = [(normalise(batch.images), batch.labels) for batch, _ in zip(batches, range(2), strict=False)]
    return largest_eigenvalue(model.eval(), pairs, F.cross_entropy)


def rows_of(
    model: str, tunings: dict[str, dict[float, float]], seeds: int, shards: Path, folder: Path
) -> list[dict[str, Any]]:
    """The final figures, a row a strategy."""
    rows = []
    for strategy, tuned in tunings.items():
        rate = best_rate(tuned)
        runs = [Run(model, strategy, rate, seed, "test") for seed in range(seeds)]
        found = [summary(run, folder / "runs") for run in runs]
        rows.append(
            {
                "model": model,
                "strategy": strategy,
                "rate": rate,
                "tuning": tuned,
                "accuracy": [entry["eval_accuracy"] for entry in found],
                "loss": [entry["eval_loss"] for entry in found],
                "averagings_percent": found[0]["averagings_percent"],
                "averagings": found[0]["averagings"],
                "seconds": [entry["seconds_training"] for entry in found],
                "sharpness": [sharpness(run, shards, folder / "runs") for run in runs],
            }
        )
    return rows


def with_deviation(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("model", "strategy", "learning rate", "accuracy %", "test loss", "sharpness")
    lines = []
    for row in rows:
        peak = MODELS[row["model"]]["peak"] * row["rate"]
        edge = "" if min(row["tuning"]) < row["rate"] < max(row["tuning"]) else " (edge)"
        figures = [with_deviation(row[key], digits) for key, digits in (("accuracy", 2), ("loss", 3), ("sharpness", 1))]
        rest = [f"{row['averagings_percent']:.1f}", str(row["averagings"])]
        lines.append([row["model"], row["strategy"], f"{peak:g}{edge}", *figures, *rest])
    return report.table([*columns, "averagings %", "averagings"], lines)


def heading(budget: Budget, tuning: Budget, seeds: int) -> str:
    return (
        f"{WORKERS} workers, batch {BATCH}, {budget.samples} training images, {budget.epochs} epochs "
        f"({budget.steps} steps; tuned in {tuning.epochs} epochs), "
        f'{seeds} seeds; mean ± standard deviation. "edge": the best rate is the smallest or largest tried.'
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shards", type=Path)
    made.add_argument("--runs", type=Path, metavar="FOLDER", help="of all runs; what is finished there is kept")
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    made.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    made.add_argument("--train-samples", type=int, default=48_000)
    made.add_argument("--epochs", type=int, default=20)
    made.add_argument("--tune-epochs", type=int, help="of a run that tunes; half of --epochs unless said")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.train:
        return train_here(args.train)
    if not (args.shards and args.runs):
        made.error("name --shards and --runs")
    found = Report("generalization", args, ("torch", "timm", "webdataset"))
    shards = args.runs / "data"
    index = make_data(args.shards, shards, args.train_samples)
    budget = Budget(index.split("train").samples, args.epochs)
    tuning_budget = Budget(budget.samples, args.tune_epochs or max(1, args.epochs // 2))
    tunings = {}
    for model in args.models:
        tunings[model] = tune(model, args.strategies, tuning_budget, shards, args.runs / "tuning")
        final = [
            Run(model, name, best_rate(tuned), seed, "test")
            for name, tuned in tunings[model].items()
            for seed in range(args.seeds)
        ]
        train_all(final, budget, shards, args.runs / "runs")
    rows = [row for model, tuned in tunings.items() for row in rows_of(model, tuned, args.seeds, shards, args.runs)]
    found.add(heading(budget, tuning_budget, args.seeds))
    found.add(table(rows))
    found.save(steps=budget.steps, rows=rows)
    print(f"`qsr report {args.runs / 'runs'}` draws the runs")
    return None


if __name__ == "__main__":
    main()
