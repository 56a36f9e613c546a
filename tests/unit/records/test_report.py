"""Runs written by the real Monitor are read back, tabled and drawn."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from qsr_engine.records.members import MemberEvent, counts, spans
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.plots import plots
from qsr_engine.records.records import Record, WorkersRecord
from qsr_engine.records.report import group_table, report, table
from qsr_engine.records.run_folder import open_run_folder
from qsr_engine.records.runs import ReportError, figures, find_runs, read_run, strategy_label
from qsr_engine.records.seeds import groups

QSR = {"strategy": "qsr", "h_base": 4, "alpha": 0.0175, "power": 2.0}


def write_run(
    folder: Path,
    qsr: dict[str, Any] = QSR,
    *,
    steps: int = 40,
    finished: bool = True,
    evaluated: bool = True,
    seed: int = 0,
    accuracy: float = 80,
    sharpness: float | None = None,
    waiting: tuple[float, ...] | None = None,
    measured: bool = False,
) -> Path:
    """A run of 40 steps in all, of which `steps` are done, with a record every 10."""
    recipe = {"qsr": {**qsr, "total_steps": 40}, "seed": seed, "logging": {"name": folder.name}}
    open_run_folder(folder, yaml.safe_dump(recipe))
    with Monitor(folder, 40, tensorboard=False, stream=io.StringIO()) as monitor:
        for step in range(10, steps + 1, 10):
            record = Record(
                step=step,
                images_seen=64 * step,
                round=step // 4,
                period=4 if step < 30 else 20,
                lr=0.008 - step * 1e-4,
                loss=1 / step,
                averagings=step // 4,
                bytes_sent=1e9 * step,
                averagings_percent=100 * (step // 4) / step,
                communication_percent=100 * (step // 4) / step,
                bytes_percent=12.3456,
                seconds_compute=36.0 * step,
                seconds_averaging=None if qsr["strategy"] == "parallel" else 3.6 * step,
                seconds_data=0.0,
                images_per_second=2.0,
                sharpness=sharpness,
                eval_top5_accuracy=accuracy + 10 if measured and step % 20 == 0 else None,
                train_accuracy=50.0 + step if measured else None,
                gradient_norm=1 / step if measured else None,
                eval_accuracy=accuracy + step / 8 if evaluated and step % 20 == 0 else None,
            )
            monitor.log(record)
        for step in range(5, steps + 1, 5) if waiting else ():
            none = [0.0] * len(waiting or ())
            told = None if step == 5 else list(waiting or ())
            accuracies = [float(step + worker) for worker in range(len(none))] if measured else None
            monitor.log_workers(WorkersRecord(step, [10.0] * len(none), none, none, told, [0] * len(none), accuracies))
        if finished:
            monitor.summary(accuracy=85.0)
    return folder


@pytest.mark.parametrize(
    ("qsr", "label"),
    [
        ({"strategy": "parallel", "h_base": 1}, "parallel"),
        ({"strategy": "constant", "h_base": 4}, "constant H=4"),
        ({"strategy": "post_local", "h_base": 4, "switch_step": 300}, "post_local H=4 @300"),
        ({"strategy": "swap", "h_base": 8, "switch_step": 0}, "swap H=8 @0"),
        (QSR, "qsr H>=4 alpha=0.0175"),
        ({"strategy": "qsr", "h_base": 2, "alpha": 0.2, "power": 3.0}, "power 3, H>=2, alpha 0.2"),
        ({**QSR, "h_warmup": 8, "h_max": 312}, "qsr H>=4 alpha=0.0175, h_warmup 8, h_max 312"),
        ({"strategy": "swap", "h_base": 8, "switch_step": 0, "h_max": 16}, "swap H=8 @0, h_max 16"),
        ({"strategy": "qsr", "h_base": 2, "alpha": 0, "power": 1.0}, "power 1, H>=2, alpha 0"),
    ],
)
def test_strategy_labels(qsr: dict[str, Any], label: str) -> None:
    assert strategy_label(qsr) == label


def test_a_run_is_read_back(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert (run.name, run.strategy, run.finished, run.total_steps) == ("a", "qsr H>=4 alpha=0.0175", True, 40)
    assert [record["step"] for record in run.records] == [10, 20, 30, 40]
    assert run.recipe["qsr"]["alpha"] == 0.0175
    assert run.notes == []
    row = figures(run)
    assert row["accuracy_percent"] == 85.0
    assert row["hours"] == pytest.approx(39.6 * 40 / 3600)
    assert row["hours"] == pytest.approx(row["hours_compute"] + row["hours_averaging"] + row["hours_data"])
    assert row["images_per_second"] == pytest.approx(64 / 39.6)


def test_a_run_that_has_stopped_where_its_recipe_says_is_told_from_a_finished_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=20)
    (folder / "summary.json").write_text('{"steps": 20, "partial": true}')
    run = read_run(folder)
    assert not run.finished
    assert run.notes == ["stopped at step 20/40, as its recipe says (stop_at_step)"]


def test_waiting_is_told_of_every_worker_and_a_slow_one_is_named(tmp_path: Path) -> None:
    slow = read_run(write_run(tmp_path / "slow", waiting=(1.0, 0.5, 0.0, 1.5)))
    assert figures(slow)["waiting_percent_of_workers"] == pytest.approx([10.0, 5.0, 0.0, 15.0])
    assert figures(slow)["waiting_percent"] == pytest.approx(7.5)
    (note,) = slow.notes
    assert note.startswith("worker 2 is slow throughout: the others waited 10 % of the time for it")
    assert note.endswith("in 7 of 7 records")
    even = read_run(write_run(tmp_path / "even", waiting=(0.3, 0.2, 0.0, 0.1)))
    assert even.notes == [], "2 % of the time is no reason to look at a machine"
    assert figures(read_run(write_run(tmp_path / "none")))["waiting_percent"] is None
    printed = report([tmp_path / "slow", tmp_path / "none"], tmp_path / "report")
    assert "waiting %" in printed
    assert note in printed
    assert (tmp_path / "report" / "waiting_over_steps.png").stat().st_size > 1000


def test_accuracies_and_norms_beside_a_run_of_an_older_version(tmp_path: Path) -> None:
    """Which told of its workers as well, without their accuracy; the best is found in its evaluations."""
    new = write_run(tmp_path / "new", waiting=(1.0, 0.5), measured=True, accuracy=70)
    metrics = new / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"eval_accuracy": 72.5', '"eval_accuracy": 90.0'))
    old = write_run(tmp_path / "old", waiting=(1.0, 0.5))
    told = [json.loads(line) for line in (old / "workers.jsonl").read_text().splitlines()]
    (old / "workers.jsonl").write_text("".join(json.dumps(row | {"accuracy": 0}) + "\n" for row in told[:1]))
    with (old / "workers.jsonl").open("a") as file:
        for row in told[1:]:
            del row["accuracy"]
            file.write(json.dumps(row) + "\n")
    printed = report([new, old], tmp_path / "out")
    header, _, first, second, *_ = (" ".join(line.split()) for line in printed.splitlines())
    assert "accuracy % top-5 % best % at step training % averagings" in header
    assert "40/40 75.00 80.00 90.00 20 40.50 10" in first, "the mean of the last that workers told"
    assert "40/40 85.00 \N{EN DASH} 85.00 40 \N{EN DASH} 10" in second
    one, other = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (one["train_percent_of_workers"], one["gradient_norm"]) == ([40.0, 41.0], 1 / 40)
    assert (other["train_percent_of_workers"], other["gradient_norm"]) == (None, None)
    assert len(read_run(old).workers) == len(told) - 1, "all that can be read"
    with Image.open(tmp_path / "out" / "norms_over_steps.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20


def test_a_run_that_went_on_with_other_workers(tmp_path: Path) -> None:
    """The IndexError that 4 workers, of which worker 3 was slow, and then 2 gave."""
    folder = write_run(tmp_path / "fewer", waiting=(1.0, 0.5, 0.5, 0.0))
    with (folder / "workers.jsonl").open("a") as file:
        for step in (45, 50):
            record = WorkersRecord(step, [10.0, 20.0], [0.1, 0.1], [0.0, 0.0], [2.0, 1.0], [0, 0])
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
    run = read_run(folder)
    assert figures(run)["waiting_percent_of_workers"] == pytest.approx([20.0, 5.0])
    assert run.notes == ["of 2 workers from step 40 on, and 4 before; waiting is told of the later part"]


@pytest.mark.parametrize(
    "change",
    [
        {"seconds_waiting": [0.1, None]},
        {"seconds_waiting": [0.1]},
        {"seconds": [0.0, 1.0]},
        {"step": None},
        {"accuracy": [50.0]},
    ],
    ids=str,
)
def test_a_workers_record_that_cannot_be_read_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "a", waiting=(1.0, 0.5))
    lines = (folder / "workers.jsonl").read_text().splitlines()
    odd = json.dumps({**json.loads(lines[-1]), **change})
    (folder / "workers.jsonl").write_text("\n".join([lines[1], odd, '"torn']))
    assert len(read_run(folder).workers) == 1
    report([folder], tmp_path / "report")


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "a", finished=False) / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-30])
    run = read_run(tmp_path / "a")
    assert [record["step"] for record in run.records] == [10, 20, 30]
    assert run.notes == ["unfinished at step 30/40", "the last line of metrics.jsonl is torn and left out"]
    assert table([run]).endswith("\n\na: unfinished at step 30/40\na: " + run.notes[1])


@pytest.mark.parametrize(
    "broken", ["{", "", "[]", "3", '{"loss": 2.0}', "null_step", "text_loss"], ids=lambda text: text or "blank"
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: str) -> None:
    metrics = write_run(tmp_path / "a") / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    row = json.loads(lines[1])
    changed = {"null_step": {"step": None}, "text_loss": {"loss": "low"}}
    lines[1] = json.dumps(row | changed[broken]) if broken in changed else broken
    metrics.write_text("\n".join(lines) + "\n")
    with pytest.raises(ReportError, match=r"metrics\.jsonl, line 2: not a record"):
        read_run(tmp_path / "a")


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with pytest.raises(ReportError, match=r"nowhere: not the folder of a run \(recipe.yaml: No such file"):
        report([tmp_path / "nowhere"])
    (run / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(ReportError, match="no record of metrics yet"):
        read_run(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="no record of metrics yet"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ReportError, match=r"metrics\.jsonl: No such file"):
        read_run(run)


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    (write_run(tmp_path / "runs" / "empty") / "metrics.jsonl").write_text("")
    said = report([tmp_path / "runs"])
    assert "\na " in said
    assert "\n\nleft out: " in said
    assert f"{tmp_path}/runs/empty/metrics.jsonl: no record of metrics yet" in said
    assert [row["run"] for row in json.loads((tmp_path / "runs" / "report" / "report.json").read_text())] == ["a"]
    assert "no record of metrics yet" in (tmp_path / "runs" / "report" / "report.html").read_text()


@pytest.mark.parametrize("kept", [{"step"}, {"step", "period", "loss", "seconds_compute"}])
def test_a_run_of_an_older_version_is_reported_as_far_as_it_goes(tmp_path: Path, kept: set[str]) -> None:
    metrics = write_run(tmp_path / "old") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("\n".join(json.dumps({name: row[name] for name in kept} | {"gone": 1}) for row in rows) + "\n")
    said = report([tmp_path / "old", write_run(tmp_path / "new")], tmp_path / "report")
    assert any(line.startswith("old ") and "40/40" in line for line in said.splitlines())
    assert "old: written by another version, without averagings, bytes_" in said
    (row, _) = json.loads((tmp_path / "report" / "report.json").read_text())
    assert row["hours"] == (pytest.approx(0.4) if "seconds_compute" in kept else None)


def test_an_older_run_whose_communication_was_of_bytes(tmp_path: Path) -> None:
    """Its averagings over steps are known all the same."""
    metrics = write_run(tmp_path / "old") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        del row["averagings_percent"], row["bytes_percent"]
        row["communication_percent"] = 1.67
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = figures(read_run(tmp_path / "old"))
    assert told["averagings_percent"] == told["communication_percent"] == 25
    assert told["bytes_percent"] is None


@pytest.mark.parametrize("text", ["qsr: [", "", "- 1", "qsr: {strategy: qsr}", "qsr: {total_steps: 4}"])
def test_a_broken_recipe_is_named(tmp_path: Path, text: str) -> None:
    (write_run(tmp_path / "a") / "recipe.yaml").write_text(text)
    with pytest.raises(ReportError, match=r"a/recipe\.yaml: not a"):
        read_run(tmp_path / "a")


def test_a_folder_of_runs_stands_for_its_runs(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "report").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("")
    other = write_run(tmp_path / "c")
    assert find_runs([other, str(tmp_path / "runs")]) == [other, tmp_path / "runs" / "a", tmp_path / "runs" / "b"]


def test_no_run_and_the_same_run_twice_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "a")
    with pytest.raises(ReportError, match="no run is given"):
        report([])
    monkeypatch.chdir(run)
    repeated: list[list[str | Path]] = [[run, run], [run, "."], [run, run.parent]]
    for twice in repeated:
        with pytest.raises(ReportError, match="given 2 times"):
            report(twice)
    assert not (run.parent / "report").exists()


def test_table(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "parallel", {"strategy": "parallel"})),
        read_run(write_run(tmp_path / "q", steps=10, finished=False)),
    ]
    header, rule, *lines = table(runs).splitlines()
    assert len({len(line) for line in (header, rule, *lines[:2])}) == 1
    assert " ".join(header.split()) == (
        "run strategy steps accuracy % best % at step averagings averagings % bytes % "
        "time min compute min averaging min data min images/s"
    )
    cells = [" ".join(line.replace("\N{EN DASH}", "none").split()) for line in lines[:2]]
    assert cells[0] == "parallel parallel 40/40 85.00 85.00 40 10 25.0 12.3 24.0 24.0 none 0.00 1.78"
    assert cells[1] == "q qsr H>=4 alpha=0.0175 10/40 none none none 2 20.0 12.3 6.60 6.00 0.600 0.00 1.62"
    assert lines[2:] == ["", "q: unfinished at step 10/40"]


def test_report_writes_plots_and_figures(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "parallel", {"strategy": "parallel"}),
        write_run(tmp_path / "qsr"),
        write_run(tmp_path / "short", steps=10, finished=False),
    ]
    text = report(runs)
    assert text.startswith(table([read_run(run) for run in runs]))
    folder = tmp_path / "report"
    flat = text.replace("\n", " ")
    assert "3 runs, 1 of them unfinished. parallel reached 85.00 %, averaging at 25 % of the steps, in 24 min." in flat
    assert "qsr reached 85.00 %, as much, averaging at 25 % of the steps, in 26.4 min (10 % more). Each is" in flat
    names = ["period_and_lr.png", "accuracy_over_communication.png", "accuracy_over_steps.png"]
    names += ["report.json", "report.html"]
    assert text.splitlines()[-5:] == [str(folder / name) for name in names]
    for name in names[:3]:
        assert (folder / name).with_suffix(".svg").read_text().startswith("<?xml")
        with Image.open(folder / name) as image:
            assert image.size >= (1200, 600)
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20  # lines were drawn, not an empty page
    rows = json.loads((folder / "report.json").read_text())
    assert rows == [figures(read_run(run)) for run in runs]
    assert "matplotlib.pyplot" not in sys.modules


def test_without_an_evaluation_only_the_period_is_drawn(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", evaluated=False))
    assert plots([run], tmp_path / "out") == [tmp_path / "out" / "period_and_lr.png"]


def test_null_figures_are_drawn_around(tmp_path: Path) -> None:
    metrics = write_run(tmp_path / "a") / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text().replace('"lr": 0.006', '"lr": null, "was": 0.006').replace("12.3456", "null")
    )
    text = report([tmp_path / "a"], tmp_path / "out")
    assert " 10 25.0 \N{EN DASH} " in " ".join(text.split())
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / "a") for place in ("x", "y")]
    report(runs, tmp_path / "out")
    assert [row["run"] for row in json.loads((tmp_path / "out" / "report.json").read_text())] == [str(r) for r in runs]


def test_an_out_dir_that_cannot_be_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with pytest.raises(ReportError, match=r"recipe\.yaml: cannot write the report"):
        report([run], run / "recipe.yaml")


def test_runs_that_differ_in_their_seed_are_a_group(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 80.0), (1, 81.0), (2, 83.0)):
        write_run(tmp_path / f"qsr-seed{seed}", seed=seed, accuracy=accuracy, sharpness=10.0 + seed)
    write_run(tmp_path / "parallel-seed0", {"strategy": "parallel"})
    write_run(tmp_path / "qsr-seed3", seed=3, accuracy=0.0, finished=False)
    runs = [read_run(path) for path in find_runs([tmp_path])]
    (group,) = groups(runs)
    assert (group.name, group.strategy, len(group.runs)) == ("qsr", "qsr H>=4 alpha=0.0175", 3)
    assert group.mean("accuracy_percent") == pytest.approx(5 + (80 + 81 + 83) / 3)
    assert group.deviation("accuracy_percent") == pytest.approx(np.std([80, 81, 83], ddof=1))
    assert group_table(groups(runs)).splitlines()[2].split() == [
        *("qsr", "qsr", "H>=4", "alpha=0.0175", "3"),
        *("86.33", "\N{PLUS-MINUS SIGN}", "1.53", "25.0", "12.3", "11.0", "\N{PLUS-MINUS SIGN}", "1.00"),
    ]


def test_a_branch_is_in_no_group_and_where_a_run_had_stopped_does_not_matter(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b", "branch")):
        write_run(tmp_path / name, seed=seed)
    (tmp_path / "branch" / "from.json").write_text("{}")
    recipe = yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())
    (tmp_path / "b" / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stop_at_step": 40}))
    (group,) = groups([read_run(tmp_path / name) for name in ("a", "b", "branch")])
    assert [run.name for run in group.runs] == ["a", "b"]


def test_another_batch_size_is_another_group(tmp_path: Path) -> None:
    runs = []
    for seed, name in enumerate(("a", "b")):
        path = write_run(tmp_path / name, seed=seed)
        recipe = yaml.safe_load((path / "recipe.yaml").read_text())
        (path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "batch": {"train_batch_size": 64 * (seed + 1)}}))
        runs.append(read_run(path))
    assert groups(runs) == []


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / f"runs/<b>{seed}", seed=seed, sharpness=3.0)
    said = report([tmp_path / "runs"], tmp_path / "out")
    assert said.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<b>0" not in text, "names are escaped"
    assert "&lt;b&gt;0" in text
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    drawn = ["period_and_lr", "accuracy_over_communication", "accuracy_over_steps", "sharpness_over_steps"]
    assert [base64.b64decode(image) for image in images] == [(tmp_path / f"out/{n}.png").read_bytes() for n in drawn]
    assert len(re.findall(r'(?:src|href)="(?!data:)', text)) == 0
    assert "Several seeds" in text


@pytest.mark.parametrize(("hours", "unit"), [(0.01, "s 36.0"), (0.4, "min 24.0"), (30.0, "h 30.0")])
def test_times_have_the_unit_that_suits_the_longest(tmp_path: Path, hours: float, unit: str) -> None:
    metrics = write_run(tmp_path / "a") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    parts = {"seconds_compute": 3600 * hours, "seconds_averaging": None}
    metrics.write_text("".join(json.dumps(row | parts) + "\n" for row in rows))
    header, _, line = (re.split(r"  +", row.strip()) for row in table([read_run(tmp_path / "a")]).splitlines())
    name, value = next(pair for pair in zip(header, line, strict=True) if pair[0].startswith("time"))
    assert f"{name.removeprefix('time ')} {value}" == unit


def test_the_best_is_bold_and_the_workers_have_a_table(tmp_path: Path) -> None:
    """The best of the finished runs; and nothing is bold where there is nothing to compare."""
    one = write_run(tmp_path / "one", accuracy=70, waiting=(1.0, 0.5), measured=True)
    other = write_run(tmp_path / "other", {"strategy": "parallel"}, accuracy=60)
    ahead = write_run(tmp_path / "ahead", accuracy=90, steps=20, finished=False)
    said = report([one, other, ahead], tmp_path / "out")
    assert "one reached 75.00 %, 10.00 points more, " in said.replace("\n", " ")
    text = (tmp_path / "out" / "report.html").read_text()
    runs, workers = re.findall(r"<table>.*?</table>", text)
    bold = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td><b>.*?</b></td>", runs)]
    assert bold == ["75.00", "75.00", "24.0", "1.78"], "accuracy, best accuracy, time, images a second"
    assert "<td>one</td><td>2</td><td>7.5 (5.0 to 10.0)</td><td>40.5 (40.0 to 41.0)</td><td>0</td>" in workers
    assert "<td>other</td>" not in workers
    report([one], tmp_path / "out")
    assert "<b>" not in (tmp_path / "out" / "report.html").read_text()


def test_who_took_part_is_drawn_from_the_events(tmp_path: Path) -> None:
    """Lines of a written file: some of no use, and events of other kinds."""
    folder = write_run(tmp_path / "elastic")
    lines = [
        {"step": 0, "event": "join", "member": "a", "members": 2},
        {"step": 0, "event": "join", "member": "b"},
        {"step": 8, "event": "failed", "member": "", "why": "timed out"},
        {"step": 8, "event": "leave", "member": "b"},
        {"step": 20, "event": "join", "member": "c"},
        {"step": 28, "event": "join", "member": "b"},
        {"step": 30, "event": "leave", "member": "c"},
        {"step": "x", "event": "leave", "member": "a"},
        {"event": "leave"},
        [1],
    ]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 31, "eve')
    run = read_run(folder)
    assert [event.event for event in run.events] == ["join", "join", "failed", "leave", "join", "join", "leave"]
    assert spans(run.events, 40) == {"a": [(0, 40)], "b": [(0, 8), (28, 40)], "c": [(20, 30)]}
    assert counts(run.events, 40) == [(0, 2), (8, 1), (20, 2), (28, 3), (30, 2), (40, 2)]
    alone = write_run(tmp_path / "alone")
    assert read_run(alone).events == []
    report([folder, alone], tmp_path / "report")
    picture = np.asarray(Image.open(tmp_path / "report" / "members_over_steps.png").convert("RGB"))
    assert (picture != 255).any(axis=2).mean() > 0.02
    assert "<h2>Members</h2>" in (tmp_path / "report" / "report.html").read_text()
    report([alone], tmp_path / "none")
    assert not (tmp_path / "none" / "members_over_steps.png").exists()


def test_a_member_that_leaves_without_having_joined_was_there_from_the_beginning() -> None:
    events = [MemberEvent(8, "leave", "a"), MemberEvent(9, "leave", "a"), MemberEvent(12, "join", "b")]
    assert spans(events, 40) == {"a": [(0, 8)], "b": [(12, 40)]}
    assert counts(events, 40) == [(0, 1), (8, 0), (12, 1), (40, 1)]
    assert counts([], 40) == []
