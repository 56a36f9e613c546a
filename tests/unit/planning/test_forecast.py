"""`qsr plan` with costs: hours of every strategy, the planner's questions, measured files, and fits from runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qsr_engine.cli.main import main
from qsr_engine.config.qsr import LearningRateConfig, QSRConfig
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.planning.cost import CostModel, Network, StepTime
from qsr_engine.planning.forecast import Forecast, make_forecast, strategies
from qsr_engine.planning.plan import Plan, make_plan
from qsr_engine.schedule import rounds
from tests.support.forecasts import CONFIGS, COSTS, SHORT, VIT, figures, refusal

RECIPES = sorted(CONFIGS.rglob("*.yaml"))


# ---------------------------------------------------------------------------------------------- from the options


@pytest.mark.fast_cells(20)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_with_costs(path: Path) -> None:
    plan = make_plan(path, samples=None if "imagenet" in str(path) else 1437)
    forecast = make_forecast(
        plan, {"step_seconds": 0.7, "bandwidth": 25e9 / 8, "workers": 16, "parameters": 86_000_000}
    )
    rows = {row["strategy"]: row for row in forecast.rows()}
    (own,) = [row for row in rows.values() if row["own"]]
    assert own["averagings"] == len(plan.rounds)
    assert own["strategy"] == plan.as_dict()["strategy"]
    for row in rows.values():
        parts = row["hours_compute"] + row["hours_communication"] + row["hours_waiting"]
        assert row["hours"] == pytest.approx(parts)
        assert row["hours_compute"] == pytest.approx(plan.qsr.total_steps * 0.7 / 3600)
        # An averaging sends at most twice a step's gradients, and there are at least two steps to each.
        assert row["hours"] <= rows["parallel"]["hours"] * (1 + 1e-12)
    averagings = [row["averagings"] for row in rows.values()]
    assert averagings[0] > max(averagings[1:])


def test_hours_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """16 workers of one host each; 15/8 of a payload travels at 3.125 GB/s, in 30 messages of 50 us."""
    found = figures(capsys, VIT, *COSTS)
    averaging = 15 / 8 * 4 * 86e6 / 3.125e9 + 30 * 50e-6
    gradients = 15 / 8 * 2 * 86e6 / 3.125e9 + 30 * 50e-6  # in bf16, and DeepSpeed reduces them after the backward pass
    by_hand = [("parallel", 93600, gradients), ("constant H=4", 23400, averaging), (found["strategy"], 9711, averaging)]
    for row, (strategy, count, seconds) in zip(found["strategies"], by_hand, strict=True):
        assert (row["strategy"], row["averagings"]) == (strategy, count)
        assert row["hours_communication"] == pytest.approx(count * seconds / 3600)
        assert row["hours_waiting"] == 0
    assert found["strategies"][2]["bytes_sent"] == pytest.approx(9711 * 15 / 8 * 4 * 86e6)
    share = 100 * 9711 * averaging / (9711 * averaging + 93600 * 0.7)
    assert found["strategies"][2]["communication_percent_of_time"] == pytest.approx(share)


def test_options_change_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    def hours(*more: str, part: str = "hours_communication") -> list[float]:
        return [row[part] for row in figures(capsys, VIT, *SHORT, *COSTS, *more)["strategies"]]

    steps, averagings = 9360, figures(capsys, VIT, *SHORT)["rounds"]
    parallel, constant, qsr = hours()
    assert hours("--efficiency", "0.5")[2] == pytest.approx(2 * qsr, rel=0.01)  # but for latency
    assert hours("--tree")[2] == pytest.approx(qsr - averagings * (30 - 8) * 50e-6 / 3600)
    assert hours("--workers-per-host", "8", "--local-bandwidth", "1gbit")[2] == pytest.approx(25 * qsr, rel=0.02)
    assert hours("--workers-per-host", "8", "--two-level")[2] == pytest.approx(qsr * 8 / 15, rel=0.02)
    assert hours("--parallel-overlap", "0.1")[0] == pytest.approx(parallel - steps * 0.07 / 3600)
    hidden = (averagings - 1) * min(0.7 / 3, qsr * 3600 / averagings) / 3600  # of all averagings but the last
    assert hours("--overlap", "next_forward")[2] == pytest.approx(qsr - hidden)
    assert hours("--overlap", "none") == [parallel, constant, qsr]
    assert hours("--set", "qsr.averaging.wire_dtype=bf16")[2] == pytest.approx(qsr / 2, rel=0.01)
    assert hours("--set", "engine=fsdp")[0] < parallel / 2, "FSDP overlaps, though it sends twice as much"
    waiting = hours("--step-cv", "0.1", part="hours_waiting")
    assert waiting[0] > waiting[1] > waiting[2] > 0
    lasting = hours("--worker-cv", "0.1", part="hours_waiting")
    assert lasting == pytest.approx([lasting[0]] * 3), "a slow machine holds all strategies up alike"


def test_the_smallest_h_base(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, VIT, *SHORT, *COSTS, "--limit", "5")
    for strategy, h_base in found["smallest_h_base"].items():
        for value, under in ((h_base, True), (h_base - 1, False)):
            sets = ["--set", f"qsr.strategy={strategy}", "--set", f"qsr.h_base={value}"]
            (own,) = [row for row in figures(capsys, VIT, *SHORT, *COSTS, *sets)["strategies"] if row["own"]]
            assert (own["communication_percent_of_time"] <= 5) is under, (strategy, value)
    assert found["smallest_h_base"]["qsr"] < found["smallest_h_base"]["constant"]


def test_alpha_and_the_number_of_averagings(capsys: pytest.CaptureFixture[str]) -> None:
    rows = figures(capsys, VIT, *SHORT, *COSTS)["alphas"]
    assert [row["alpha"] for row in rows] == [0.00875, 0.0175, 0.035]
    for row in rows:
        planned = figures(capsys, VIT, *SHORT, "--set", f"qsr.alpha={row['alpha']}")
        assert row["averagings"] == planned["rounds"]
        assert row["percent_of_parallel"] == pytest.approx(planned["communication_percent"])
    constant = figures(capsys, str(CONFIGS / "imagenet" / "vit-b-constant-h4.yaml"), *COSTS)
    assert constant["alphas"] == []
    assert set(constant["smallest_h_base"]) == {"constant"}


def test_the_text_has_the_table_the_answers_and_the_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", VIT, *SHORT, *COSTS, "--limit", "1"]) == 0
    text = capsys.readouterr().out
    found = figures(capsys, VIT, *SHORT, *COSTS, "--limit", "1")
    (own,) = [row for row in found["strategies"] if row["own"]]
    (line,) = [line for line in text.splitlines() if line.startswith("* qsr")]
    assert f"{own['hours']:.4g}" in line
    assert f"communication under 1 % of the time: a constant H >= {found['smallest_h_base']['constant']}" in text
    assert "a host's port has 25 Gbit/s each way, 50 us latency" in text
    assert [line for line in found["assumptions"] if f"  {line}" not in text.splitlines()] == []


def test_no_period_is_long_enough() -> None:
    qsr = QSRConfig(
        strategy="qsr", h_base=2, alpha=0.1, total_steps=10, lr=LearningRateConfig(schedule="constant", peak=0.1)
    )
    plan = Plan("x", qsr, list(rounds(qsr)), None)
    costs = CostModel(StepTime(1.0), Network(1.0), 2, parameter_bytes=100, gradient_bytes=100)
    forecast = Forecast(plan, costs, [], strategies(plan))
    assert forecast.smallest_h_base() == {"constant": None, "qsr": None}
    assert "communication under 10 % of the time: no period does (qsr)" in forecast.text()


def test_without_times_the_bytes_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", VIT, "--parameters", "1e6"]) == 0
    assert capsys.readouterr().out.endswith("an averaging: 4 MB (1000000 parameters)\n")
    found = figures(capsys, VIT, "--parameters", "1e6", "--workers", "4")
    assert found["bytes_sent"] == 9711 * 1.5 * 4e6
    small = ["--set", "model={name: timm/vit_tiny_patch16_224, kwargs: {depth: 1, num_classes: 10}}"]
    found = figures(capsys, VIT, *small, "--workers", "4")
    assert 1e5 < found["parameters"] < 1e6, "counted in the model itself"


def test_costs_need_no_torch_where_the_parameters_are_given() -> None:
    argv = ["plan", VIT, *COSTS]
    code = f"import sys; from qsr_engine.cli.main import main; sys.exit(main({argv!r}) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.png"
    assert main(["plan", VIT, *SHORT, *COSTS, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    costs = CostModel(StepTime(0.7), Network(1e9), 16, 4 * 86e6, 2 * 86e6)
    plan = Plan("x", QSRConfig(strategy="constant", h_base=4, total_steps=400), [], None)
    found = {strategy.label: Forecast.curve(costs, strategy) for strategy in strategies_of(plan)}
    rates, hours = found["parallel"]
    assert (rates[0], rates[-1]) == pytest.approx((10e6, 400e9))
    assert hours == sorted(hours, reverse=True)
    assert found["constant H=4"][1][0] == pytest.approx(hours[0] / 2, rel=0.01), "a quarter as often, twice the bytes"
    one_host = ["--workers-per-host", "16", "--plot", str(path)]
    assert "all workers are on one host" in refusal(capsys, VIT, *SHORT, *COSTS, *one_host)
    assert "cannot be written" in refusal(capsys, VIT, *SHORT, *COSTS, "--plot", str(tmp_path / "none" / "x.png"))


def strategies_of(plan: Plan) -> Any:
    return strategies(Plan(plan.name, plan.qsr, list(rounds(plan.qsr, lambda step: 0.0)), None))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--bandwidth", "25gbit"], "--step-seconds and --workers are missing: write them, or"),
        (["--step-cv", "0.1"], "hours need --step-seconds, --bandwidth, --workers together; found --step-cv"),
        ([*COSTS, "--bandwidth", "0gbit"], "--bandwidth 0gbit: a link of this rate moves nothing"),
        ([*COSTS, "--bandwidth", "25gigs"], "--bandwidth 25gigs: this is not a rate; write for example 25gbit"),
        ([*COSTS, "--latency", "5 parsec"], "--latency 5 parsec: this is not a time"),
        ([*COSTS, "--step-seconds", "0"], "step_seconds: found 0.0; input should be greater than 0"),
        ([*COSTS, "--step-cv", "-1"], "step_cv: found -1.0"),
        ([*COSTS, "--efficiency", "0"], "--efficiency 0: write a share above 0 and up to 1"),
        ([*COSTS, "--parallel-overlap", "2"], "--parallel-overlap 2: write a share of a step from 0 to 1"),
        ([*COSTS, "--limit", "0"], "--limit 0: write a share of the time in per cent"),
        ([*COSTS, "--efficiency", "80"], "--efficiency 80: write a share above 0 and up to 1, such as 0.8 for 80 %"),
        (["--tree", "--parallel-overlap", "0.5"], "found --tree, --parallel-overlap, and --step-seconds"),
        (["--bandwidth", "25gbit", "--workers", "4"], "--step-seconds is missing: write it, or"),
        ([*COSTS, "--step-cv", "1e200"], "step_cv: found 1e+200; input should be less than or equal to 100"),
        ([*COSTS, "--plot", "x.pgf"], "--plot x.pgf: found no kind of plot that is drawn; write a file in .png, .svg"),
        ([*COSTS, "--plot", ""], "found no kind of plot"),
        ([*COSTS, "--save", ""], "this is a folder"),
        ([*COSTS, "--two-level", "--workers-per-host", "6"], "found 16 workers with 6 on a host, which leaves 4 on"),
        (["--write-header", "--plot", "x.png"], "leave the other options out"),
        (["--write-header", "--save", "x.json"], "leave the other options out"),
        (["--write-header", "--ranks", "2"], "leave the other options out"),
        (["--plot", "x.png"], "--plot needs costs"),
        (["--save", "x.json"], "--save needs costs"),
        (["--ranks", "2"], "--ranks 2 is for --measure"),
        ([*COSTS, "--write-header"], "leave the other options out"),
        (["--costs", "gone.json"], "--costs gone.json: cannot read this file"),
        (["--measure", "--fit", "a", "b"], "leave --fit and --costs out"),
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
    assert "write --parameters N" in refusal(capsys, str(path), *COSTS[:-2])
    assert "write --parameters N" in refusal(capsys, str(path), "--workers", "4")
    assert "--measure needs a recipe" in refusal(capsys, str(path), "--measure")


def test_saved_costs_are_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "costs.json"
    before = figures(capsys, VIT, *SHORT, *COSTS, "--step-cv", "0.1", "--save", str(path))
    after = figures(capsys, VIT, *SHORT, "--costs", str(path))
    assert after == before
    slower = figures(capsys, VIT, *SHORT, "--costs", str(path), "--step-seconds", "1.4")
    assert slower["strategies"][0]["hours_compute"] == pytest.approx(2 * before["strategies"][0]["hours_compute"])
    assert figures(capsys, VIT, *SHORT, "--costs", str(path), "--bandwidth", "unlimited")["costs"]["bandwidth"] is None

    raw = json.loads(path.read_text())
    for broken, words in (
        ("{", "not a JSON file"),
        ("[]", "found list"),
        ("[" * 100_000, "not a JSON file"),
        (json.dumps({**raw, "bandwith": 1.0}), "unknown key; did you mean 'bandwidth'?"),
        (json.dumps({**raw, "bandwidth": 0.0}), "bandwidth: found 0.0"),
        (json.dumps({key: raw[key] for key in raw if key != "workers"}), "workers: this key is missing"),
    ):
        path.write_text(broken)
        assert words in refusal(capsys, VIT, *SHORT, "--costs", str(path)), broken
    assert "--save" in refusal(capsys, VIT, *SHORT, *COSTS, "--save", str(tmp_path / "none" / "x"))


def test_a_folder_is_no_place_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a.png"
    folder.mkdir()
    for option in ("--plot", "--save"):
        assert f"{option} {folder}: this is a folder" in refusal(capsys, VIT, *SHORT, *COSTS, option, str(folder))
    assert list(tmp_path.iterdir()) == [folder]


def measured_file(folder: Path, **changes: Any) -> str:
    """The file of a measurement of VIT on one worker, or as changes say."""
    raw: dict[str, Any] = {"step_seconds": 0.7, "bandwidth": None, "workers": 1, "parameters": 86_000_000}
    raw["measured"] = {"model": load_recipe(VIT).model.name, "train_batch_size": 4096, "workers": 1, "micro_batch": 64}
    path = folder / "measured.json"
    path.write_text(json.dumps({**raw, **changes}))
    return str(path)


def test_links_that_were_not_measured_must_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = [VIT, *SHORT, "--costs", measured_file(tmp_path)]
    assert "are on 8 hosts, and the costs were measured inside one host" in refusal(capsys, *costs, "--workers", "8")
    one_host = ["--workers", "8", "--workers-per-host", "8"]
    assert "write --local-bandwidth RATE" in refusal(capsys, *costs, *one_host)
    assert figures(capsys, *costs, "--workers", "8", "--bandwidth", "unlimited")["costs"]["bandwidth"] is None
    assert figures(capsys, *costs, *one_host, "--local-bandwidth", "9GB/s")["costs"]["local_bandwidth"] == 9e9


def test_what_is_not_as_it_was_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = [VIT, *SHORT, "--costs", measured_file(tmp_path)]
    same = figures(capsys, *costs)["assumptions"]
    assert same[0] == (
        "measured: 700 ms a step, cv 0 from step to step, with 1 worker on 1 host; 0 s for a boundary beside its "
        "averaging"
    )
    assert not any(line.startswith("measured with") for line in same)
    micro = ["--set", "batch.train_micro_batch_size_per_gpu=32"]
    other = figures(capsys, *costs, "--workers", "2", "--bandwidth", "1gbit", "--step-cv", "0.5", *micro)["assumptions"]
    assert other[0] == same[0], "options are not what was measured"
    assert "measured with 1 worker, and taken for 2" in other
    assert any("4096 samples a step of one worker, and this run has 2048" in line for line in other)
    assert "measured with micro-batches of 64 samples a rank, and this run has 32" in other
    said = refusal(capsys, *costs, "--set", "model.name=timm/resnet50")
    assert "measured with the model 'qsr/vit_base_patch16_sincos', and the recipe's is 'timm/resnet50'" in said
    two = measured_file(tmp_path, workers=2, workers_per_host=2, local_bandwidth=1e9, local_latency=1e-5)
    text = figures(capsys, VIT, *SHORT, "--costs", two)["assumptions"][0]
    assert "with 2 workers on 1 host; 8 Gbit/s inside the host, latency 10 us; 0 s for" in text


def test_what_was_measured_is_kept_where_the_plot_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher that writes a measurement of two workers on one host stands in for the real one."""
    raw = {"step_seconds": 0.7, "bandwidth": None, "workers": 2, "workers_per_host": 2, "local_bandwidth": 1e9}
    launched = []

    def launcher(command: list[str]) -> int:
        launched.append(command)
        Path(command[-1]).write_text(json.dumps({**raw, "parameters": 1000, "measured": {"hosts": 1}}))
        return 0

    monkeypatch.setattr("qsr_engine.cli.launcher._run", launcher)
    saved = tmp_path / "m.json"
    measure = ["plan", VIT, *SHORT, "--measure", "--ranks", "2", "--save", str(saved)]
    assert main([*measure, "--plot", str(tmp_path / "m.png")]) == 2
    said = capsys.readouterr()
    assert "all workers are on one host" in said.err
    assert "measured: 700 ms a step" in said.out
    assert json.loads(saved.read_text())["step_seconds"] == 0.7
    saved.unlink()
    assert main([*measure, "--workers", "8"]) == 2
    assert f"What was measured is in {saved}" in capsys.readouterr().err
    assert json.loads(saved.read_text())["workers"] == 2
    count = len(launched)
    for places in (["--plot", str(tmp_path / "none" / "x.png")], ["--save", str(tmp_path / "none" / "x")]):
        assert "there is no folder" in refusal(capsys, *measure[1:], *places)
    assert len(launched) == count, "refused before anything was started"


@pytest.mark.parametrize(
    ("config", "element_bytes", "behind"),
    [
        ({}, 4, False),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, 2, False),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, 2, True),
        ({"fp16": {"enabled": True}, "communication_data_type": "fp32"}, 4, False),
        ({"bf16": {"enabled": False}, "zero_optimization": {"stage": 2, "overlap_comm": True}}, 4, True),
        ({"bf16": 3, "zero_optimization": []}, 4, False),
    ],
)
def test_a_deepspeed_configuration_says_its_gradients(
    tmp_path: Path, config: dict[str, Any], element_bytes: int, behind: bool
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**config, "qsr": {"strategy": "constant", "h_base": 5, "total_steps": 100}}))
    costs = {"step_seconds": 1.0, "bandwidth": 1e9, "workers": 4, "parameters": 1000}
    model = make_forecast(make_plan(path), costs).costs
    assert isinstance(model, CostModel)
    assert model.gradient_bytes == 1000 * element_bytes
    assert (model.backward_share > 0) is behind
