"""What closes `make demo`: lines that judge are computed, and the frontier's runs are runs of the real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo.__main__ import PAIRS, accuracy_line, cost_line, frontier_line
from benchmarks.demo.frontier import STEPS, WARMUP, Setting
from benchmarks.intervals import Interval, interval
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe_file import load_recipe, resolve_recipe
from qsr_engine.records.runs import Run
from qsr_engine.records.seeds import Group
from qsr_engine.schedule import averagings_percent, rounds

CONFIGS = Path(__file__).parents[3] / "configs"


def group(name: str, accuracies: list[float], averagings: int, seconds: float) -> Group:
    """Runs of 400 steps; data parallel by its name."""
    runs = []
    for accuracy in accuracies:
        record: dict[str, Any] = {
            "step": 400,
            "images_seen": 1,
            "tokens_seen": None,
            "averagings": averagings,
            "bytes_percent": averagings / 4,
        }
        record |= {
            "seconds_compute": seconds,
            "seconds_averaging": None,
            "seconds_data": 0.0,
            "eval_accuracy": accuracy,
        }
        runs.append(Run(name, Path(name), name, {}, [record], [], [], finished=True, total_steps=400))
    return Group(name, name, runs)


def test_the_lines_say_what_it_cost_and_who_is_behind() -> None:
    found = [group("qsr", [95.0, 96.0], 40, 18.0), group("parallel", [96.0, 96.0], 400, 20.0)]
    assert cost_line(found) == (
        "Cost of 400 steps: parallel averaged 400 times in 20.0 s, qsr averaged 40 times (bytes: 10 %) in 18.0 s."
    )
    assert accuracy_line(found, 900) == (
        "Accuracy, mean of 2 seeds: qsr 95.50 %, parallel 96.00 %; 900 images are sure to 1.4 points, and seeds are up "
        "to 1.0 apart, which tells none of them apart."
    )
    found.append(group("constant", [90.0, 90.0], 100, 19.0))
    assert accuracy_line(found, 900).endswith("up to 1.0 apart, which puts constant behind parallel.")
    found.append(group("swap", [99.0, 80.0], 10, 19.0))
    assert accuracy_line(found, 900).endswith("up to 19.0 apart, which tells none of them apart.")


def test_the_frontier_line_says_where_qsr_is_ahead_and_where_behind() -> None:
    rows = [
        (25.0, Interval(0.1, 0.3)),
        (12.5, Interval(0.5, 0.2)),
        (6.25, Interval(-0.5, 0.2)),
        (3.25, Interval(0.3, 0.1)),
    ]
    assert frontier_line(rows, 8) == (
        "Frontier, 8 seeds: against a constant H with about as many averagings, QSR is not told apart at 25 % "
        "(+0.10 ± 0.30); ahead at 12.5 % (+0.50 ± 0.20), 3.25 % (+0.30 ± 0.10); behind at 6.25 % (-0.50 ± 0.20)."
    )


def test_an_interval_is_students() -> None:
    """By hand, from a table: t of 3 degrees of freedom is 3.182."""
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.182 * (5 / 3) ** 0.5 / 2, rel=1e-3)


def percent(setting: Setting) -> float:
    lr = {"schedule": "cosine", "peak": setting.peak, "min": 1e-6, "warmup_steps": WARMUP}
    return averagings_percent(rounds(QSRConfig.model_validate({"total_steps": STEPS, "lr": lr, **setting.block})))


def test_each_pair_of_the_frontier_averages_about_as_often() -> None:
    for constant, qsr in PAIRS:
        assert percent(qsr) == pytest.approx(percent(constant), rel=0.25)


def test_the_demos_recipes_average_as_they_say() -> None:
    shares = {}
    for name in ("parallel", "constant", "qsr"):
        recipe = resolve_recipe(load_recipe(CONFIGS / f"digits-{name}.yaml"), samples=897)
        shares[name] = averagings_percent(rounds(QSRConfig.model_validate(recipe.qsr.model_dump(exclude_none=True))))
    assert shares == pytest.approx({"parallel": 100, "constant": 25, "qsr": 6.4}, abs=0.05)


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its cells, one after another, as Jupyter runs them; it holds no output that could be of another version."""
    cells = json.loads((CONFIGS.parent / "docs" / "choosing-h.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    assert not any(cell.get("outputs") for cell in cells)
    command = [sys.executable, "-c", "\n".join(code)]
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "alpha 0.0175: 10.4 % averagings, longest round 8142 steps" in done.stdout, "the paper's ViT-B"
