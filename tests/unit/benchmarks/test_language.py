"""The recipes that the comparison of language models trains, and what its report says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import language
from benchmarks.intervals import interval
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe, resolve_recipe
from qsr_engine.schedule import rounds


def recipe(tmp_path: Path, strategy: str, peak: float = 0.004) -> Recipe:
    path = tmp_path / f"{strategy}.yaml"
    made = language.recipe(language.Run(strategy, peak, seed=3), 500, tmp_path / "shards", tmp_path / "runs")
    path.write_text(yaml.safe_dump(made))
    return resolve_recipe(load_recipe(path), samples=10_000)


@pytest.mark.parametrize("strategy", language.STRATEGIES)
def test_a_strategys_recipe_is_what_its_name_says(tmp_path: Path, strategy: str) -> None:
    found, words = recipe(tmp_path, strategy), strategy.split("-")
    qsr = found.qsr
    assert qsr.strategy == ({"parallel", "qsr"} & set(words) or {"constant"}).pop()
    assert qsr.h_base == (1 if "parallel" in words else 8 if "8" in words else 4)
    assert found.optimizer.type == ("Muon" if "muon" in words else "AdamW")
    assert (found.optimizer.momentum, found.optimizer.betas) == (0.95 if "muon" in words else 0, [0.9, 0.95])
    assert (qsr.outer.model_dump() if qsr.outer else None) == (
        {"lr": 0.7, "momentum": 0.9, "nesterov": True, "unit_steps": 4 if "units" in words else None}
        if "outer" in words
        else None
    )
    assert qsr.averaging.state_periods == ({"exp_avg": 3, "exp_avg_sq": 6} if "states" in words else {})
    kwargs = found.model.kwargs
    assert {kwargs[key] for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} == {0}, "no sample comes twice"
    assert (found.seed, qsr.lr.peak, found.logging.name) == (3, 0.004, f"{strategy}-lr0.004-seed3")


@pytest.mark.parametrize("strategy", [name for name in language.STRATEGIES if "qsr" in name])
def test_the_periods_of_qsr_do_not_depend_on_the_peak(tmp_path: Path, strategy: str) -> None:
    """And it averages about as often as a constant H = 8."""
    lengths = [
        [one.length for one in rounds(QSRConfig(**recipe(tmp_path, strategy, peak).qsr.model_dump(exclude_none=True)))]
        for peak in (0.002, 0.004, 0.016)
    ]
    assert lengths[0] == lengths[1] == lengths[2]
    assert len(lengths[0]) == pytest.approx(500 / 8, rel=0.1)
    assert max(lengths[0]) > 8


def row(strategy: str, loss: list[float]) -> dict[str, Any]:
    tuning = {0.002: 3.0, 0.004: 2.0, 0.008: 2.5}
    shares = {"averagings_percent": 100.0, "bytes_percent": 100.0}
    return {"strategy": strategy, "peak": 0.004, "tuning": tuning, "loss": loss, "bits_per_byte": loss, **shares}


def test_the_report_compares_seed_by_seed() -> None:
    """Those with Muon with both ways of parallel; a strategy with that which it follows."""
    losses = {
        "parallel": [2.0, 2.2],
        "qsr": [2.5, 2.8],
        "qsr-states": [2.4, 2.9],
        "muon-parallel": [1.9, 2.0],
        "muon-qsr": [2.0, 2.4],
    }
    lines = language.table([row(name, loss) for name, loss in losses.items()]).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[5:7]] for line in lines}
    assert cells["strategy"] == ["over parallel", "over muon-parallel"]

    def over(one: list[float]) -> str:
        half = interval(one).half
        return f"{sum(one) / 2:+.4f} ± {half:.4f}"

    assert cells["parallel"] == ["", ""]
    assert cells["qsr"] == [over([0.5, 0.6]), ""]
    assert cells["muon-parallel"] == [over([-0.1, -0.2]), ""]
    assert cells["muon-qsr"] == [over([0.0, 0.2]), over([0.1, 0.4])]
    assert language.pairs([row(name, loss) for name, loss in losses.items()]) == (
        f"- qsr-states over qsr: {over([-0.1, 0.1])}"
    )


@pytest.mark.parametrize(
    ("losses", "following"),
    [
        ({0.002: 2.0, 0.004: 1.0, 0.008: 2.0}, None),
        ({0.002: 2.0, 0.004: 1.5, 0.008: 1.0}, 0.016),
        ({0.002: 1.0, 0.004: 1.5, 0.008: float("inf")}, 0.001),
        ({0.032: 2.0, 0.064: 1.0}, None),
        ({0.0005: 1.0, 0.001: 2.0}, None),
    ],
)
def test_the_best_peak_is_looked_for_between_others(losses: dict[float, float], following: float | None) -> None:
    assert language.beyond(losses) == following
