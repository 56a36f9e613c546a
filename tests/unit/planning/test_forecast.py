"""`qsr plan` with workers and costs: bytes, hours, the plot, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qsr_engine.cli.main import main
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import validate
from qsr_engine.planning.forecast import by_bandwidth, compared, make_forecast
from qsr_engine.planning.plan import Plan, make_plan
from qsr_engine.schedule import rounds
from tests.support.forecasts import CONFIGS, COSTS, SHORT, VIT, figures, refusal

RECIPES = sorted(CONFIGS.rglob("*.yaml"))
AVERAGING = 15 / 8 * 4 * 86e6  # bytes that leave one of 16 workers
GRADIENTS = AVERAGING / 2  # in bf16


@pytest.mark.fast_cells(6)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_with_costs(path: Path) -> None:
    plan = make_plan(path, samples=None if "imagenet" in str(path) else 1437)
    given = {"step_seconds": 0.7, "bandwidth": 25e9 / 8, "workers": 16, "parameters": 86_000_000}
    rows = {row["strategy"]: row for row in make_forecast(plan, given).rows()}
    (own,) = [row for row in rows.values() if row["own"]]
    assert own["averagings"] == len(plan.rounds)
    assert own["averagings_percent"] == pytest.approx(plan.averagings_percent)
    assert own["strategy"] == plan.as_dict()["strategy"]
    for row in rows.values():
        assert row["hours"] == pytest.approx(row["hours_compute"] + row["hours_communication"])
        assert row["hours_compute"] == pytest.approx(plan.qsr.total_steps * 0.7 / 3600)
        # An averaging sends at most twice a step's gradients, and there are at least two steps to each.
        assert row["hours"] <= rows["parallel"]["hours"] * (1 + 1e-12)
    averagings = [row["averagings"] for row in rows.values()]
    assert averagings[0] > max(averagings[1:])


def test_hours_and_both_shares_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's ViT-B: 10.4 % of the averagings are 20.7 % of the bytes, of fp32 parameters and bf16 gradients."""
    found = figures(capsys, VIT, *COSTS)
    rows = [("parallel", 93600, GRADIENTS), ("constant H=4", 23400, AVERAGING), (found["strategy"], 9711, AVERAGING)]
    for row, (strategy, count, nbytes) in zip(found["strategies"], rows, strict=True):
        assert (row["strategy"], row["averagings"], row["bytes_sent"]) == (strategy, count, count * nbytes)
        assert row["hours_communication"] == pytest.approx(count * nbytes / (25e9 / 8) / 3600)
        assert row["averagings_percent"] == pytest.approx(100 * count / 93600)
        assert row["bytes_percent"] == pytest.approx(100 * count * nbytes / (93600 * GRADIENTS))
    assert found["averagings_percent"] == found["communication_percent"] == pytest.approx(10.375)
    assert found["bytes_percent"] == pytest.approx(20.75)
    assert (found["averaging_bytes"], found["gradient_bytes"]) == (AVERAGING, GRADIENTS)
    assert main(["plan", VIT, *COSTS]) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if line.startswith("* qsr")]
    assert line.split()[-7:] == ["10.38", "18.2", "0.5568", "18.76", "6.264", "TB", "20.75"]
    assert [line for line in found["assumptions"] if f"  {line}" not in text.splitlines()] == []


def test_fragments_leave_a_worker_by_turns(capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes, but for the end of the run, which averages three fragments again; a quarter of them at once."""
    whole, found = figures(capsys, VIT, *COSTS), figures(capsys, VIT, *COSTS, "--set", "qsr.averaging.fragments=4")
    assert (whole["fragments"], whole["averaging_bytes_at_once"]) == (1, AVERAGING)
    assert (found["fragments"], found["averaging_bytes_at_once"]) == (4, AVERAGING / 4)
    sent = [row["bytes_sent"] for row in found["strategies"]]
    before = [row["bytes_sent"] for row in whole["strategies"]]
    assert sent == [before[0], before[1] + 3 * AVERAGING / 4, before[2] + 3 * AVERAGING / 4]
    assert main(["plan", VIT, *COSTS, "--set", "qsr.averaging.fragments=4"]) == 0
    assert "averaged in 4 fragments of about equal bytes" in capsys.readouterr().out


def test_what_is_not_known_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, VIT)
    assert found["bytes_percent"] is None
    assert not {"costs", "strategies", "parameters"} & set(found)
    found = figures(capsys, VIT, *SHORT, "--workers", "4", "--parameters", "1e6")
    assert found["bytes_percent"] == pytest.approx(2 * found["averagings_percent"])
    assert found["strategies"][0]["hours"] is None
    found = figures(capsys, VIT, *SHORT, "--step-seconds", "1", "--averaging-seconds", "2")
    assert (found["bytes_percent"], found["strategies"][0]["bytes_sent"]) == (None, None)
    assert found["costs"] == {"step_seconds": 1, "averaging_seconds": 2, "gradient_seconds": 2}
    small = ["--set", "model={name: timm/vit_tiny_patch16_224, kwargs: {depth: 1, num_classes: 10}}"]
    found = figures(capsys, VIT, *SHORT, *small, "--workers", "4")
    assert 1e5 < found["parameters"] < 1e6, "counted in the model itself"


def test_seconds_go_before_a_bandwidth_and_that_before_what_was_measured() -> None:
    plan = make_plan(VIT, overrides=["epochs=30", "qsr.lr.warmup_steps=1000"])
    measured = {"step_seconds": 0.7, "averaging_seconds": 0.5, "gradient_seconds": 0.3, "workers": 2}
    size = {"parameters": 86_000_000}

    def costs(**given: Any) -> tuple[float, float, float]:
        found = make_forecast(plan, {**size, **given}, measured=measured).costs
        assert found is not None
        return found.step_seconds, found.averaging_seconds, found.gradient_seconds

    assert costs() == (0.7, 0.5, 0.3)
    assert costs(step_seconds=0.6, gradient_seconds=0.1) == (0.6, 0.5, 0.1)
    assert costs(bandwidth=1e9) == pytest.approx((0.7, 0.344, 0.172))
    assert costs(bandwidth=1e9, averaging_seconds=0.4) == pytest.approx((0.7, 0.4, 0.172))
    lines = make_forecast(plan, {**size, "workers": 16}, measured=measured).assumptions
    assert lines[0] == "measured with 2 workers, and taken for 16"


def test_what_hides_behind_the_backward_pass() -> None:
    """FSDP reduces 4 bytes a parameter beside two thirds of a step; one bucket of 25 MB of 344 comes last."""
    plan = make_plan(VIT, overrides=["engine=fsdp"])
    sizes = make_forecast(plan, {"workers": 2, "parameters": 86_000_000}).sizes
    assert sizes is not None
    found = [by_bandwidth(sizes, 0.3, rate).gradient_seconds for rate in (1e9, 1e10)]
    assert found == pytest.approx([0.344 - 0.2, 0.0344 * 25 / 344])


@pytest.mark.parametrize("strategy", ["parallel", "constant"])
def test_alpha_power_and_h_base_of_another_strategy_are_compared(strategy: str) -> None:
    """They may stay in a recipe whose strategy does not train with them, since the table of costs reads them."""
    block: dict[str, Any] = {"strategy": strategy, "h_base": 2, "alpha": 0.2, "power": 3.0, "total_steps": 20}
    qsr = validate(QSRConfig, {**block, "lr": {"schedule": "constant", "peak": 0.1}}, where="test")
    found = compared(Plan("x", qsr, list(rounds(qsr)), None))
    table = {label: counts.all_averagings for label, counts in found.items()}
    assert table == {"parallel": 20, "constant H=2": 10, "power 3, H>=2, alpha 0.2": 3}


def test_costs_need_no_torch_where_the_parameters_are_given() -> None:
    argv = ["plan", VIT, *SHORT, *COSTS, "--choose"]
    code = f"import sys; from qsr_engine.cli.main import main; sys.exit(main({argv!r}) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.png"
    assert main(["plan", VIT, *SHORT, *COSTS, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "several workers" in refusal(capsys, VIT, *SHORT, *COSTS, "--workers", "1", "--plot", str(path))
    folder = tmp_path / "a.png"
    folder.mkdir()
    for place in (folder, tmp_path / "none" / "x.png"):
        assert f"--plot {place}: cannot be written" in refusal(capsys, VIT, *SHORT, *COSTS, "--plot", str(place))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--bandwidth", "25gbit"], "hours need --step-seconds, and --averaging-seconds or both --bandwidth"),
        (["--step-seconds", "1", "--bandwidth", "25gbit"], "found only --step-seconds, --bandwidth: write the others"),
        (["--gradient-seconds", "1"], "found only --gradient-seconds"),
        (["--parameters", "86e6"], "write --workers N too"),
        ([*COSTS, "--bandwidth", "0gbit"], "--bandwidth 0gbit: a link of this rate moves nothing"),
        ([*COSTS, "--bandwidth", "25gigs"], "--bandwidth 25gigs: this is not a rate; write for example 25gbit"),
        ([*COSTS, "--step-seconds", "5 parsec"], "--step-seconds 5 parsec: this is not a time"),
        ([*COSTS, "--step-seconds", "0"], "--step-seconds 0: a step takes time; write more than 0"),
        (
            [*COSTS, "--set", "batch.train_micro_batch_size_per_gpu=77"],
            "not a multiple of 16 ranks x train_micro_batch_size_per_gpu 77",
        ),
        ([*COSTS, "--plot", "x.pgf"], "--plot x.pgf: found no kind of plot that is drawn; write a file in .png, .svg"),
        (["--plot", "x.png"], "it needs the time of a step"),
        (["--ranks", "2"], "--ranks 2 is for --measure"),
        (["--measure", "--fit", "a", "b"], "leave --fit out"),
        ([*COSTS, "--fit", "a", "b"], "--fit finds its costs in two runs"),
        (["--fit", "gone", "away"], "gone: not the folder of a run"),
    ],
)
def test_options_that_are_refused(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(capsys, VIT, *more)


def test_a_deepspeed_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"qsr": {"strategy": "constant", "h_base": 5, "total_steps": 100}}))
    found = figures(capsys, str(path), *COSTS)
    assert [row["strategy"] for row in found["strategies"]] == ["parallel", "constant H=5"]
    assert found["bytes_percent"] == 20
    assert figures(capsys, str(path), "--workers", "4")["bytes_percent"] is None, "nobody says how large the model is"
    assert "--measure needs a recipe" in refusal(capsys, str(path), "--measure")


def test_a_measurement_by_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher that writes a measurement of two workers stands in for the real one."""
    raw = {"step_seconds": 0.7, "averaging_seconds": 0.4, "gradient_seconds": 0.2, "workers": 2}

    def launcher(command: list[str], more: dict[str, str]) -> int:
        Path(command[-1]).write_text(json.dumps(raw))
        return 0

    monkeypatch.setattr("qsr_engine.cli.launcher._run", launcher)
    found = figures(capsys, VIT, *SHORT, "--measure", "--ranks", "2", "--parameters", "86e6")
    assert found["costs"] == {name: raw[name] for name in raw if name != "workers"}
    assert (found["workers"], found["bytes_percent"]) == (2, pytest.approx(2 * found["averagings_percent"]))
    (own,) = [row for row in found["strategies"] if row["own"]]
    assert own["hours_communication"] == pytest.approx(found["rounds"] * 0.4 / 3600)
    assert found["strategies"][0]["hours_communication"] == pytest.approx(found["total_steps"] * 0.2 / 3600)
