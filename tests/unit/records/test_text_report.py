"""Reports of language models: loss, perplexity and bits a byte in place of accuracies."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsr_engine.records.monitor import Monitor
from qsr_engine.records.records import Record
from qsr_engine.records.report import report
from qsr_engine.records.run_folder import open_run_folder

QSR = {"strategy": "qsr", "h_base": 4, "alpha": 0.0038}


def write_run(folder: Path, qsr: dict[str, Any], loss: float, *, seed: int = 0, task: str = "text") -> str:
    """20 steps, evaluated after 10 and 20. Returns what was shown of it on the way."""
    recipe = {"task": task, "qsr": {**qsr, "total_steps": 20}, "seed": seed, "logging": {"name": folder.name}}
    open_run_folder(folder, yaml.safe_dump(recipe))
    shown = io.StringIO()
    text = task == "text"
    with Monitor(folder, 20, tensorboard=False, stream=shown) as monitor:
        for step in (10, 20):
            reached: dict[str, Any] = {"eval_accuracy": 80.0 + step}
            if text:
                reached = {"eval_loss": loss + (20 - step) * 0.1, "eval_perplexity": 4.0, "eval_bits_per_byte": 2.0}
            monitor.log(
                Record(
                    step=step,
                    images_seen=None if text else 64 * step,
                    tokens_seen=1024 * step if text else None,
                    round=step // 4,
                    period=4,
                    lr=0.001,
                    loss=loss,
                    averagings=step // 4,
                    bytes_sent=1e6,
                    averagings_percent=25.0,
                    communication_percent=25.0,
                    bytes_percent=25.0,
                    seconds_compute=float(step),
                    seconds_averaging=None,
                    seconds_data=0.0,
                    images_per_second=None if text else 64.0,
                    tokens_per_second=1024.0 if text else None,
                    **reached,
                )
            )
        monitor.summary(steps=20, seconds_training=20.0, eval_loss=loss, eval_perplexity=4.0, eval_bits_per_byte=2.0)
    return shown.getvalue()


def test_runs_of_a_text_are_compared_by_their_loss(tmp_path: Path) -> None:
    shown = write_run(tmp_path / "parallel", {"strategy": "parallel"}, 1.5)
    assert "1024 tokens/s  perplexity 4" in shown
    assert "loss 1.5000; perplexity 4, 2.0000 bits a byte" in shown
    for seed, loss in ((0, 1.6), (1, 1.4)):
        write_run(tmp_path / f"qsr-seed{seed}", QSR, loss, seed=seed)
    printed = report([tmp_path], tmp_path / "report")
    header = printed.splitlines()[0].split("  ")
    for column in ("loss", "perplexity", "bits a byte", "best loss", "tokens/s"):
        assert column in map(str.strip, header)
    assert "accuracy" not in printed
    assert "images" not in printed
    assert "1.5000 \N{PLUS-MINUS SIGN} 0.1414" in printed, "of the two seeds"
    words = " ".join(printed.split())
    assert "parallel reached a loss of 1.5000, averaging at 25 % of the steps" in words
    assert "qsr reached a loss of 1.5000 \N{PLUS-MINUS SIGN} 0.1414 (2 runs), as much" in words
    rows = {row["run"]: row for row in json.loads((tmp_path / "report" / "report.json").read_text())}
    row = rows["qsr-seed1"]
    assert (row["loss"], row["best_loss"], row["best_step"]) == (1.4, 1.4, 20)
    assert (row["tokens_per_second"], row["images_per_second"], row["accuracy_percent"]) == (1024, None, None)
    for name in ("loss_over_steps", "loss_over_communication"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 0
    assert not (tmp_path / "report" / "accuracy_over_steps.png").exists()


def test_runs_of_both_tasks_stand_in_one_report(tmp_path: Path) -> None:
    write_run(tmp_path / "gpt", {"strategy": "parallel"}, 1.5)
    write_run(tmp_path / "gpt-qsr", QSR, 1.75)
    write_run(tmp_path / "vit", {"strategy": "parallel"}, 1.5, task="images")
    printed = " ".join(report([tmp_path], tmp_path / "report").split())
    assert "vit reached 100.00 %" in printed
    assert "gpt reached a loss of 1.5000" in printed
    assert "gpt-qsr reached a loss of 1.7500, 0.2500 more" in printed
    write_run(tmp_path / "gpt-best", {"strategy": "constant", "h_base": 4}, 1.25)
    words = " ".join(report([tmp_path / "gpt-qsr", tmp_path / "gpt-best"], tmp_path / "other").split())
    assert "gpt-qsr reached a loss of 1.7500, 0.5000 more" in words, "than the best, which has the lowest"
    rows = {row["run"]: row for row in json.loads((tmp_path / "report" / "report.json").read_text())}
    assert rows["vit"]["images_per_second"] == pytest.approx(64)
