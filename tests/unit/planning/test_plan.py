"""`qsr plan`: the figures, without torch and without shards, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qsr_engine.cli.main import main
from qsr_engine.config.recipe_file import load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.planning.plan import make_plan
from tests.support.forecasts import figures

CONFIGS = Path(__file__).parents[3] / "configs"
VIT: dict[str, Any] = {
    "strategy": "qsr",
    "h_base": 4,
    "alpha": 0.0175,
    "total_steps": 93600,
    "lr": {"schedule": "cosine", "peak": 0.008, "min": 1e-6, "warmup_steps": 10000},
}


@pytest.fixture
def deepspeed_json(tmp_path: Path) -> Path:
    return write(tmp_path, VIT)


def write(folder: Path, block: Any, name: str = "ds.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"train_batch_size": 4096, "qsr": block}))
    return path


def test_the_papers_vit_b(deepspeed_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From DESIGN: one round of 8142 steps from epoch 273; the paper: 10.4 % of the averagings."""
    found = figures(capsys, str(deepspeed_json))
    assert found["total_steps"] == 93600
    assert found["averagings_percent"] == pytest.approx(100 * found["rounds"] / 93600)
    assert f"{found['averagings_percent']:.1f}" == "10.4"
    assert found["communication_percent"] == found["averagings_percent"], "its old name"
    assert found["longest_round"] == found["last_round"] == {"start_step": 85458, "length": 8142}
    assert found["steps_per_epoch"] is None

    recipe = figures(capsys, str(CONFIGS / "imagenet" / "vit-b-qsr-h4.yaml"))
    same = ("total_steps", "rounds", "averagings_percent", "longest_round", "last_round")
    assert [recipe[key] for key in same] == [found[key] for key in same]
    assert recipe["steps_per_epoch"] == 312


def test_the_table_follows_the_run(deepspeed_json: Path) -> None:
    """H of the round that holds each tenth, from the rounds one by one; the learning rate of the step itself."""
    plan = make_plan(deepspeed_json)
    rows = list(plan.table())
    assert [row["step"] for row in rows] == [0, 9360, 18720, 28080, 37440, 46800, 56160, 65520, 74880, 84240, 93599]
    for row in rows:
        (inside,) = [r for r in plan.rounds if r.start <= row["step"] < r.start + r.length]
        assert row["period"] == inside.length
        assert row["epoch"] is None
    assert rows[0]["lr"] == 1e-6
    assert rows[-1]["lr"] == pytest.approx(1e-6, rel=0.01)
    assert rows[1]["lr"] == pytest.approx(1e-6 + 0.936 * (0.008 - 1e-6))


def test_the_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "imagenet" / "vit-b-qsr-h4.yaml")]) == 0
    text = capsys.readouterr().out
    assert "qsr H>=4 alpha=0.0175" in text
    assert "93600 steps (300 epochs of 312 steps), 9711 rounds, 10.4 % of parallel's averagings" in text
    assert "longest round: 8142 steps from step 85458, in epoch 273.9" in text
    assert [line.split()[0] for line in text.splitlines()[5:]][:3] == ["step", "0", "9360"]
    assert text.splitlines()[-1].split() == ["93599", "300.0", "1.000e-06", "8142"]


def test_h_warmup_apart_from_h_base_and_a_stop_before_the_end() -> None:
    """As the authors' `--init-h` and `--min-h`, and `--epochs` below `--epochs-for-sche`: of the whole's rounds."""
    path = CONFIGS / "imagenet" / "vit-b-qsr-h4.yaml"
    plan = make_plan(path, overrides=["qsr.h_warmup=8", "stop_at_epoch=261"])
    assert {r.length for r in plan.rounds if r.start < 10_000} == {8}
    assert next(r.length for r in plan.rounds if r.start >= 10_000) == 4
    whole = make_plan(path, overrides=["qsr.h_warmup=8"])
    assert (plan.rounds, plan.stop_at_step, whole.stop_at_step) == (whole.rounds, 261 * 312, None)
    ended = sum(r.start + r.length <= 261 * 312 for r in plan.rounds)
    assert f"\nstops at step 81432, in epoch 261.0 (stop_at_step), after {ended} of these rounds;" in plan.text()
    assert (plan.as_dict()["stop_at_step"], "stops at" in whole.text()) == (81432, False)


def test_a_run_shorter_than_the_table(tmp_path: Path) -> None:
    path = write(tmp_path, {"strategy": "constant", "h_base": 2, "total_steps": 3})
    assert [(row["step"], row["period"], row["lr"]) for row in make_plan(path).table()] == [
        (0, 2, None),
        (1, 2, None),
        (2, 1, None),
    ]


def test_neither_torch_nor_shards_are_needed() -> None:
    code = (
        "import sys; from qsr_engine.cli.main import main; "
        f"code = main(['plan', {str(CONFIGS / 'imagenet' / 'resnet50-qsr-h2.yaml')!r}]); "
        "sys.exit(code or 'torch' in sys.modules or 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_samples_come_from_the_option_the_recipe_or_the_shards(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(CONFIGS / "digits-qsr.yaml")
    nowhere = ["--set", f"data.shards={tmp_path}"]
    for argv in (
        ["--set", f"data.shards={digits}"],
        [*nowhere, "--samples", "1437"],
        [*nowhere, "--set", "data.train_samples=1437"],
        [*nowhere, "--set", "data.train_samples=99", "--samples", "1437"],
    ):
        found = figures(capsys, recipe, *argv)
        assert (found["total_steps"], found["steps_per_epoch"], found["rounds"]) == (880, 22, 55)
    assert figures(capsys, recipe, *nowhere, "--samples", "1437", "--set", "qsr.strategy=parallel")["rounds"] == 880

    steps = ["epochs=null", "qsr.total_steps=100", "qsr.lr.warmup_epochs=null"]
    words = [word for override in steps for word in ("--set", override)]
    found = figures(capsys, recipe, *nowhere, *words)
    assert (found["total_steps"], found["steps_per_epoch"]) == (100, None), "all in steps: no samples are needed"


def test_samples_that_the_shards_do_not_have() -> None:
    recipe = load_recipe(CONFIGS / "digits-qsr.yaml", ["data.train_samples=1281167"])
    with pytest.raises(ConfigError, match=r"data\.train_samples is 1281167, and the split 'train' has 1437 samples"):
        resolve_recipe(recipe, samples=1437)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({**VIT, "lr": None, "warmup_steps": 10}, "there is no qsr.lr block, and H follows the learning rate"),
        ({**VIT, "h_bse": 4}, "unknown key; did you mean 'h_base'?"),
        ({**VIT, "total_steps": 0}, "qsr.total_steps: found 0"),
        ("no block", "qsr: found 'no block'"),
    ],
)
def test_blocks_that_are_refused(tmp_path: Path, block: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write(tmp_path, block))]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "more", "words"),
    [
        ("a.json", "{", [], "not a JSON file"),
        ("a.json", "{}", [], 'there is no "qsr" block'),
        ("a.yaml", "[1]", [], "a mapping of blocks"),
        (
            "a.yaml",
            f"extends: {CONFIGS / 'digits.yaml'}\ndata: {{shards: gone}}",
            [],
            "write --samples N, or data.train_samples",
        ),
        ("a.yaml", f"extends: {CONFIGS / 'digits.yaml'}", ["--samples", "63"], "fewer than one batch"),
        ("b.json", json.dumps({"qsr": VIT}), ["--samples", "9"], "--samples is for recipes"),
        ("b.json", json.dumps({"qsr": VIT}), ["--set", "qsr.h_base=2"], "--set is for recipes"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, name: str, text: str, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["plan", str(tmp_path / name), *more]) == 1
    assert words in capsys.readouterr().err


def test_a_missing_file_and_a_wrong_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("none.json", "none.yaml"):
        assert main(["plan", str(tmp_path / name)]) == 1
        assert "cannot read this" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "x.yaml", "--samples", "0"])
