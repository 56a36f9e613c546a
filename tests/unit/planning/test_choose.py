"""`qsr plan --choose`: alphas and h_bases around a recipe's, against plans of each."""

from __future__ import annotations

import math

import pytest

from qsr_engine.cli.main import main
from tests.support.forecasts import CONFIGS, COSTS, SHORT, VIT, figures, refusal

RESNET = str(CONFIGS / "imagenet" / "resnet152-qsr-h2.yaml")


def test_each_row_is_the_plan_of_its_alpha_and_h_base(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, VIT, *SHORT, *COSTS, "--choose", "--failures", "10h")
    rows = found["choices"]
    assert [(row["h_base"], row["alpha"]) for row in rows] == [
        (h_base, alpha) for h_base in (2, 4, 8) for alpha in (0.00875, 0.0175, 0.035)
    ]
    assert [row["own"] for row in rows] == [False] * 4 + [True] + [False] * 4
    for row in (rows[0], rows[4], rows[8]):
        sets = ["--set", f"qsr.alpha={row['alpha']}", "--set", f"qsr.h_base={row['h_base']}"]
        planned = figures(capsys, VIT, *SHORT, *sets, *COSTS)
        (own,) = [strategy for strategy in planned["strategies"] if strategy["own"]]
        assert {key: row[key] for key in ("averagings", "averagings_percent", "bytes_percent", "hours")} == {
            key: own[key] for key in ("averagings", "averagings_percent", "bytes_percent", "hours")
        }
        longest = row["longest_round"]
        assert {key: longest[key] for key in ("start_step", "length")} == planned["longest_round"]
        assert longest["epochs"] == longest["length"] / 312
        hours = (longest["length"] * 0.7 + found["costs"]["averaging_seconds"]) / 3600
        assert longest["hours"] == pytest.approx(hours)
        assert longest["percent_of_run"] == pytest.approx(100 * longest["length"] / 9360)
        assert longest["failure_percent"] == pytest.approx(100 * (1 - math.exp(-hours / 10)))


@pytest.mark.parametrize(("recipe", "ratio", "h_base", "warmup"), [(VIT, 2.1875, 4, 1000), (RESNET, 0.25, 2, 156)])
def test_where_h_leaves_h_base(
    recipe: str, ratio: float, h_base: int, warmup: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """H > h_base once lr < alpha / sqrt(h_base + 1): early for the ViT, late for the ResNet, whose ratio is a ninth."""
    epochs = ["--set", "epochs=30" if recipe == VIT else "epochs=20"]  # a tenth
    warm = ["--set", "qsr.lr.warmup_steps=1000" if recipe == VIT else "qsr.lr.warmup_epochs=0.5"]
    found = figures(capsys, recipe, *epochs, *warm, "--choose")
    (own,) = [row for row in found["choices"] if row["own"]]
    assert own["alpha_over_peak"] == pytest.approx(ratio)
    leaves = own["leaves_h_base"]
    assert leaves["epoch"] == leaves["step"] / found["steps_per_epoch"]
    # lr / peak = (1 + cos(pi t)) / 2, where t goes from 0 to 1 after the warm-up; a round of h_base may be under way.
    t = math.acos(2 * ratio / math.sqrt(h_base + 1) - 1) / math.pi
    first = warmup + t * (found["total_steps"] - warmup)
    assert 0 <= leaves["step"] - first <= h_base
    assert (own["bytes_percent"], own["hours"], own["longest_round"]["hours"]) == (None, None, None)


def test_a_longer_period_in_the_warm_up_is_not_when_h_leaves_h_base(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, VIT, *SHORT, "--set", "qsr.h_warmup=9", "--choose")
    (own,) = [row for row in found["choices"] if row["own"]]
    assert own["leaves_h_base"]["step"] >= 1788


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", VIT, *SHORT, "--set", "qsr.h_max=6", *COSTS, "--choose", "--failures", "72h"]) == 0
    text = capsys.readouterr().out
    rows = [line.lstrip("* ").split() for line in text.split("longest round\n")[1].split("\n\n")[0].splitlines()[1:]]
    assert [row[2] for row in rows] == ["2"] * 3 + ["4"] * 3, "8 is beyond h_max"
    assert rows[4][:2] == ["0.0175", "2.19"]
    assert "at one in 72 h of the whole run" in text
    assert main(["plan", VIT, *SHORT, "--set", "qsr.h_base=9360", "--choose"]) == 0
    assert "never" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--choose", "--failures", "72h"], "--failures needs the hours of a round; write --step-seconds"),
        (["--failures", "72h"], "--failures 72h: it is for --choose"),
        (["--choose", "--failures", "0h"], "a time above 0 such as 72h"),
        (["--choose", "--failures", "often"], "--failures often: this is not a time"),
        (
            ["--choose", "--set", "qsr.alpha=0"],
            "qsr.alpha is not given; write qsr.alpha (the paper's are 2.2 of the peak rate",
        ),
    ],
)
def test_what_is_refused(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(capsys, VIT, *more)
