"""How the settings of `make demo` were chosen: peaks of the learning rate and alphas, on other seeds and another split.

    python -m benchmarks.demo_tune --out benchmarks/results

Each strategy gets its own peak, and QSR its own alpha / peak. The recipes (configs/digits-*.yaml) are trained by the
loop of `qsr train`, the frontier's network by benchmarks/demo/frontier.py.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.demo.frontier import Setting, run_all
from benchmarks.demo.ranks import in_ranks
from benchmarks.report import ROOT, Report, parser, table
from qsr_engine.config.recipe_file import load_recipe, resolve_recipe
from qsr_engine.data import read_index, write_digits

SEED, SPLIT, EVAL = 100, 1, 900  # the demo has the seeds from 0 on, and the split 0
PEAKS = (0.003, 0.0045, 0.006, 0.01)  # of the recipes
RATIO = 2.0  # alpha / peak
OTHER_RATIOS = (1.0, 3.0)  # at the first peak
FRONTIER_PEAKS = (0.01, 0.03, 0.06)
FRONTIER_QSR = ((2, 1.5), (2, 2.5), (4, 2.0), (4, 3.0), (8, 2.5), (8, 4.0), (16, 4.0))  # h_base and alpha / peak
FRONTIER_H = (4, 8, 16, 32)


def recipes() -> list[tuple[str, float, float | None, list[str]]]:
    """Name, peak, alpha / peak, and what is set."""
    plain = [(name, peak, None, [f"qsr.lr.peak={peak}"]) for name in ("parallel", "constant") for peak in PEAKS]
    pairs = [(peak, RATIO) for peak in PEAKS] + [(PEAKS[0], ratio) for ratio in OTHER_RATIOS]
    return plain + [
        ("qsr", peak, ratio, [f"qsr.lr.peak={peak}", f"qsr.alpha={peak * ratio:.6g}"]) for peak, ratio in pairs
    ]


def train_recipes(shards: Path, results: Path, seeds: Sequence[int]) -> None:
    """In both ranks: for every recipe its mean accuracy over the seeds."""
    from qsr_engine.training.loop import train

    index, found = read_index(shards), []
    for name, peak, ratio, given in recipes():
        accuracies = []
        for seed in seeds:
            run = f"{name}-{peak}-{ratio}-{seed}"
            sets = [*given, f"seed={seed}", f"data.shards={shards}", f"logging.dir={shards.parent / run}"]
            sets += ["logging.eval_every=null", "logging.every=100000", "logging.tensorboard=false"]
            recipe = load_recipe(ROOT / f"configs/digits-{name}.yaml", sets)
            summary = train(resolve_recipe(recipe, index.split("train").samples), index)
            accuracies.append(summary["eval_accuracy"])
        found.append({"averagings_percent": summary["averagings_percent"], "accuracies": accuracies})
        if dist.get_rank() == 0:
            results.write_text(json.dumps(found), encoding="utf-8")
            print(name, given, found[-1], flush=True)


def frontier_settings() -> list[Setting]:
    """Each of the frontier's strategies at every peak."""
    made = []
    for peak in FRONTIER_PEAKS:
        made += [Setting.constant(h, peak) for h in FRONTIER_H]
        made += [Setting.qsr(h, ratio, peak) for h, ratio in FRONTIER_QSR]
    return made


def tune_frontier(seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """A row a setting, with its mean accuracy at every peak."""
    settings = frontier_settings()
    found = run_all(settings, seeds, folder / "frontier.json", split=SPLIT)
    rows: dict[str, dict[str, Any]] = {}
    for setting in settings:
        own = [result for result in found if (result.name, result.peak) == (setting.name, setting.peak)]
        row = rows.setdefault(setting.name, {"setting": setting.name, "averagings_percent": own[0].averagings_percent})
        row[f"{setting.peak:g}"] = statistics.mean(result.accuracy for result in own)
    return list(rows.values())


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=4, help="of every setting of the frontier")
    made.add_argument("--recipe-seeds", type=int, default=2, help="of every setting of the recipes")
    made.add_argument("--parts", nargs="+", choices=["frontier", "recipes"], default=["frontier", "recipes"])
    args = made.parse_args()
    found = Report("demo-tune", args, ("torch", "deepspeed", "timm"))
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if "frontier" in args.parts:
            raw["frontier"] = tune_frontier(range(SEED, SEED + args.seeds), Path(name))
            found.add(f"The frontier's network, mean accuracy in % over {args.seeds} seeds, by the peak:")
            peaks = [f"{peak:g}" for peak in FRONTIER_PEAKS]
            shown = [
                [row["setting"], f"{row['averagings_percent']:.1f}", *(f"{row[peak]:.2f}" for peak in peaks)]
                for row in raw["frontier"]
            ]
            found.add(table(["setting", "averagings %", *peaks], shown))
        if "recipes" in args.parts:
            raw["recipes"] = tune_recipes(range(SEED, SEED + args.recipe_seeds), Path(name))
            found.add(f"The recipes, mean and each of {args.recipe_seeds} seeds, {EVAL} images for evaluation:")
            columns = ["recipe", "peak", "alpha / peak", "averagings %", "accuracy %", "of each seed"]
            found.add(table(columns, [[str(value) for value in row.values()] for row in raw["recipes"]]))
    found.save(**raw)


def tune_recipes(seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """A row a run."""
    shards, results = folder / "digits", folder / "recipes.json"
    write_digits(shards, eval_samples=EVAL, seed=SPLIT)
    in_ranks(partial(train_recipes, shards, results, seeds))
    return [
        {
            "recipe": name,
            "peak": peak,
            "alpha_over_peak": "" if ratio is None else ratio,
            "averagings_percent": round(figures["averagings_percent"], 1),
            "accuracy": round(statistics.mean(figures["accuracies"]), 2),
            "accuracies": ", ".join(f"{accuracy:.2f}" for accuracy in figures["accuracies"]),
        }
        for (name, peak, ratio, _), figures in zip(recipes(), json.loads(results.read_text()), strict=True)
    ]


if __name__ == "__main__":
    main()
