"""`qsr plan` with what two finished runs have cost."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe_file import dump_recipe, load_recipe, resolve_recipe
from qsr_engine.planning.cost import Costs, Observed, fit_two_runs
from qsr_engine.planning.plan import make_plan
from qsr_engine.records.records import Record
from qsr_engine.schedule import rounds
from tests.support.forecasts import CONFIGS, VIT, figures, refusal

STEP, AVERAGING = 0.02, 0.3  # seconds, the truth of the runs below


def run_folder(folder: Path, *overrides: str, **changes: Any) -> Path:
    """The folder of a finished run of the digits that took STEP a step and AVERAGING an averaging."""
    recipe = resolve_recipe(load_recipe(CONFIGS / "digits-qsr.yaml", overrides), samples=1437)
    count = len(list(rounds(QSRConfig.model_validate(recipe.qsr.model_dump(exclude_none=True)))))
    total = recipe.qsr.total_steps
    assert total is not None
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    record: dict[str, Any] = {item.name: 0 if item.type == "int" else None for item in fields(Record)}
    (folder / "metrics.jsonl").write_text(json.dumps({**record, "step": total, "averagings": count}) + "\n")
    summary = {
        "steps": total,
        "averagings": count,
        "seconds_training": total * STEP + count * AVERAGING,
        "ranks": 2,
        "worker_size": 1,
        "engine": "deepspeed",
        "device": "cpu",
        "torch": "2.14.1",
    }
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}))
    return folder


@pytest.fixture
def constant(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "constant", "qsr.strategy=constant", "qsr.alpha=null")


@pytest.fixture
def parallel(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "parallel", "qsr.strategy=parallel", "qsr.h_base=1", "qsr.alpha=null")


DIGITS = [str(CONFIGS / "digits-qsr.yaml"), "--samples", "1437"]


def test_a_fit_foretells_a_third_recipe(tmp_path: Path, constant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse = run_folder(tmp_path / "sparse", "qsr.h_base=40", "optimizer.weight_decay=0.3", "seed=4")
    found = figures(capsys, *DIGITS, "--fit", str(constant), str(sparse))
    (own,) = [row for row in found["strategies"] if row["own"]]
    assert own["hours_compute"] == pytest.approx(880 * STEP / 3600)
    assert own["hours_communication"] == pytest.approx(55 * AVERAGING / 3600)
    assert own["bytes_sent"] == 55 * found["averaging_bytes"] == 55 * 4 * found["parameters"]
    costs = {"step_seconds": STEP, "averaging_seconds": AVERAGING, "gradient_seconds": AVERAGING}
    assert found["costs"] == pytest.approx(costs)
    assert any("both runs took local steps" in line for line in found["assumptions"])


def test_a_fit_from_parallel_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients in bf16 and parameters in fp32: each keeps its own bytes, and is not the mean of the two."""
    half = "precision={dtype: bf16, zero_stage: 1}"
    overrides = {"parallel": ["qsr.h_base=1"], "constant": []}
    runs = [
        str(run_folder(tmp_path / name, f"qsr.strategy={name}", "qsr.alpha=null", half, *more))
        for name, more in overrides.items()
    ]
    found = figures(capsys, *DIGITS, "--set", half, "--fit", *runs)
    assert "one run averaged gradients: what of that was hidden" in "".join(found["assumptions"])
    sent = {row["strategy"]: row["bytes_sent"] / row["averagings"] for row in found["strategies"]}
    assert list(sent.values()) == [3 * found["parameters"], 4 * found["parameters"], 4 * found["parameters"]]
    assert "--fit finds its costs in two runs" in refusal(capsys, *DIGITS, "--fit", *runs, "--bandwidth", "1gbit")


@pytest.mark.parametrize(
    ("overrides", "changes", "words"),
    [
        ([], {"averagings": 220, "steps": 880}, "220 averagings in 880 steps and 220 in 880 are one period"),
        ([], {"seconds_training": 1e9}, "give runs in which more averagings took more time"),
        (["batch.train_batch_size=32"], {}, "batch.train_batch_size: 64 and 32"),
        (["model.kwargs.depth=5"], {}, "model.kwargs.depth: 4 and 5"),
        (["precision.dtype=bf16"], {}, "precision.dtype: 'fp32' and 'bf16'"),
        (["qsr.averaging.wire_dtype=int8"], {}, "qsr.averaging.wire_dtype: 'fp32' and 'int8'"),
        ([], {"ranks": 4}, "ranks: 2 and 4"),
        ([], {"device": "cuda"}, "device: 'cpu' and 'cuda'"),
        ([], {"ranks": None}, "ranks is None; needed is a number"),
        ([], {"averagings": None}, "averagings is None; needed is a number"),
        ([], {"seconds_training": "long"}, "seconds_training is 'long'"),
    ],
)
def test_runs_that_do_not_compare(
    tmp_path: Path,
    constant: Path,
    overrides: list[str],
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = run_folder(tmp_path / "other", *overrides, **changes)
    assert words in refusal(capsys, *DIGITS, "--fit", str(constant), str(other))


def test_runs_of_another_model_than_the_recipe(
    constant: Path, parallel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, VIT, "--fit", str(constant), str(parallel))
    assert "model.name: 'qsr/simple_vit_b16' and 'timm/vit_tiny_patch16_224'" in said


def test_a_run_from_before_a_key_existed(
    tmp_path: Path, constant: Path, parallel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = constant / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert recipe["qsr"]["averaging"].pop("two_level") == "auto"
    path.write_text(yaml.safe_dump(recipe))
    figures(capsys, *DIGITS, "--fit", str(constant), str(parallel))
    recipe["qsr"]["alpha"] = "x"
    path.write_text(yaml.safe_dump(recipe))
    assert "qsr.alpha: found 'x'" in refusal(capsys, *DIGITS, "--fit", str(constant), str(parallel))


def test_a_run_that_changed_its_workers(constant: Path, parallel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"step": 1, "seconds_waiting": None}
    for counts in ((2, 2), (2, 4)):
        rows = [
            {**row, **{name: [1.0] * n for name in ("seconds", "loss", "seconds_data", "skipped_samples")}}
            for n in counts
        ]
        (parallel / "workers.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
        if counts == (2, 2):
            figures(capsys, *DIGITS, "--fit", str(constant), str(parallel))
    said = refusal(capsys, *DIGITS, "--fit", str(constant), str(parallel))
    assert f"{parallel}: it ran on 2 and on 4 workers" in said


def test_an_unfinished_run(constant: Path, parallel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (parallel / "summary.json").unlink()
    said = refusal(capsys, *DIGITS, "--fit", str(constant), str(parallel))
    assert f"{parallel}: the run is unfinished (summary.json is missing)" in said
    (parallel / "summary.json").write_text("{")
    assert "summary.json: cannot be read" in refusal(capsys, *DIGITS, "--fit", str(constant), str(parallel))
    recipe = yaml.safe_load((constant / "recipe.yaml").read_text())
    assert recipe["qsr"]["strategy"] == "constant"


def test_the_papers_two_pairs_agree_on_the_compute_of_a_step() -> None:
    """Hours of the abstract: a GPU has 256 images a step on 16 GPUs and on 64, so its step must take as long.

    Hours are given to a tenth, which moves a step by less than 2 %.
    """

    def fit(parallel: float, qsr: float, base: str) -> Costs:
        plans = [make_plan(CONFIGS / "imagenet" / f"{base}{name}.yaml") for name in ("", "-qsr-h4")]
        runs = [
            Observed(plan.qsr.total_steps, len(plan.rounds), 3600 * hours)
            for plan, hours in zip(plans, (parallel, qsr), strict=True)
        ]
        return fit_two_runs(*runs)

    on_16, on_64 = fit(26.7, 20.2, "vit-b"), fit(8.6, 5.5, "vit-b-b16384")
    assert on_16.step_seconds == pytest.approx(0.748, abs=5e-4)  # by hand: (20.2 h - 9711 a) / 93600
    assert on_16.averaging_seconds == pytest.approx(6.5 * 3600 / (93600 - 9711))
    assert on_64.step_seconds == pytest.approx(on_16.step_seconds, rel=0.02)
    assert on_64.averaging_seconds > 1.5 * on_16.averaging_seconds, "and its averaging does not carry over"
