"""`qsr plan` on recipes of this repository: its figures as JSON, or its refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsr_engine.cli.main import main

CONFIGS = Path(__file__).parents[2] / "configs"
VIT = str(CONFIGS / "imagenet" / "vit-b-qsr-h4.yaml")
COSTS = [
    "--step-seconds",
    "0.7",
    "--bandwidth",
    "25gbit",
    "--workers",
    "16",
    "--parameters",
    "86e6",
]
# A tenth of the steps, where their number says little.
SHORT = ["--set", "epochs=30", "--set", "qsr.lr.warmup_steps=1000"]


def figures(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["plan", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv]) in (1, 2)
    return capsys.readouterr().err
